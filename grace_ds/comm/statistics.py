"""Compute sums, order statistics, ranks and top-k over the values of all ranks, with no rank holding more than its own.

Every result is the same to the last bit on all ranks, and for any number of ranks that the values are spread over.  Floats are
compared as integers in the same order, and are added as integers on a fixed grid, so no order of addition is left.

A threshold is found digit by digit: the ranks add up a histogram of one digit of their keys, and go on with the keys in the bin
that holds the threshold (a radix selection).  Each of the at most four digits costs one sum of ``DIGITS`` numbers over the ranks,
whatever the number of keys.

Every function is collective.  Shapes: n = values of this rank; n may be 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from grace_ds.comm.base import Comm, ReduceOp
from grace_ds.errors import DataError
from grace_ds.records import Array, IntArray

Keys = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Tie = Callable[[IntArray], Keys]

DIGIT_BITS = 16
DIGITS = 1 << DIGIT_BITS
FEW = 1 << 12  # keys of all ranks that every rank takes, to sort them, instead of going on digit by digit
CHUNK = 1 << 18  # values processed at once: bounds the scratch arrays
LIMB_BITS, LIMBS = 22, 3  # of a number on the grid of sums: sums of 2^31 such limbs are exact even in float64
SPLITS = 64  # values of each rank that suggest where to split the values between the ranks
_SIGN = np.uint64(1 << 63)


def float_keys(values: Array) -> Keys:
    """Return keys (n,) uint64 in the order of ``values`` (n,) float, without NaN; 0 and -0 have the same key."""
    keys: Keys = (np.asarray(values, np.float64) + 0.0).view(np.uint64)
    ordered: Keys = np.where(keys & _SIGN, ~keys, keys | _SIGN)
    return ordered


def float_of(key: int) -> float:
    """Return the value that has this key."""
    word = key ^ (1 << 63) if key >> 63 else key ^ (2**64 - 1)
    return float(np.array([word], np.uint64).view(np.float64)[0])


def int_keys(values: Array) -> Keys:
    """Return keys (n,) uint64 in the order of ``values`` (n,) int64."""
    keys: Keys = np.asarray(values, np.int64).view(np.uint64) ^ _SIGN
    return keys


def reduced(comm: Comm, array: Array, op: ReduceOp = "sum") -> Array:
    """Return ``array`` reduced over the ranks; a rank alone does without the transport, whose headers cost more than a draw."""
    return array if comm.size == 1 else comm.allreduce(array, op)


def total(comm: Comm, *counts: int) -> list[int]:
    """Return the sum of each of this rank's integers over all ranks."""
    return [int(n) for n in reduced(comm, np.array(counts, np.int64))]


def highest(comm: Comm, values: Array, default: float = -math.inf) -> float:
    """Return the largest of all ranks' ``values`` (n,) float without NaN, at least ``default``."""
    return float(reduced(comm, np.array([np.max(values, initial=default)], np.float64), "max")[0])


def kth_largest(comm: Comm, keys: Keys, k: int) -> tuple[int, int]:
    """Return the k-th largest of all ranks' keys, and how many are larger than it.

    Args:
        keys: (n,) uint64.
        k: from 1 to the number of keys of all ranks.
    """
    (left,) = total(comm, len(keys))
    if not 1 <= k <= left:
        raise DataError(f"the {k}-th largest of {left} values was asked for: ask for one that there is")
    key, above = 0, 0
    for shift in range(64 - DIGIT_BITS, -1, -DIGIT_BITS):
        if left <= FEW:
            ordered = np.sort(np.concatenate(comm.allgather(keys)))
            key = int(ordered[above - k])
            return key, above + int(np.count_nonzero(ordered > np.uint64(key)))
        counts = np.zeros(DIGITS, np.int64)
        for lo in range(0, len(keys), CHUNK):
            counts += np.bincount(_digit(keys[lo : lo + CHUNK], shift), minlength=DIGITS)
        counts = reduced(comm, counts)
        from_top = np.cumsum(counts[::-1])
        bin_ = int(np.searchsorted(from_top, k - above))
        digit = DIGITS - 1 - bin_
        left = int(counts[digit])
        above += int(from_top[bin_]) - left
        key = key << DIGIT_BITS | digit
        keys = np.concatenate([part[_digit(part, shift) == digit] for part in np.array_split(keys, len(keys) // CHUNK + 1)])
    return key, above


def _digit(keys: Keys, shift: int) -> IntArray:
    digits: IntArray = ((keys >> np.uint64(shift)) & np.uint64(DIGITS - 1)).astype(np.int64)
    return digits


def by_lower_id(ids: IntArray) -> Tie:
    """Return the tie-break of :func:`top` that prefers the lower of ``ids`` (n,) int64."""
    return lambda at: ~int_keys(ids[at])


def top(comm: Comm, k: int, keys: Keys, *ties: Tie) -> Mask:
    """Return which of this rank's items are among the k largest of all ranks, (n,) bool.

    Args:
        k: items wanted over all ranks; 0 or less: none; more than there are: all.
        keys: (n,) uint64.
        ties: decide between items that are equal so far: positions (m,) of this rank's items → their keys (m,).  No two items
            of all ranks may be equal in all of them.

    Raises:
        DataError: items are equal throughout, so that k of them cannot be told from the others; on every rank.
    """
    (items,) = total(comm, len(keys))
    if k <= 0 or k >= items:
        return np.full(len(keys), k > 0)
    bar, above = kth_largest(comm, keys, k)
    chosen: Mask = keys > np.uint64(bar)
    open_ = np.flatnonzero(keys == np.uint64(bar))
    k -= above
    for tie in ties:
        if total(comm, len(open_)) == [k]:
            break
        keys = tie(open_)
        bar, above = kth_largest(comm, keys, k)
        chosen[open_[keys > np.uint64(bar)]] = True
        open_ = open_[keys == np.uint64(bar)]
        k -= above
    if total(comm, len(open_)) != [k]:
        raise DataError(f"{k} of several equal items were asked for: give every item an id of its own")
    chosen[open_] = True
    return chosen


def exact_sums(comm: Comm, values: Array, group: IntArray, groups: int) -> Floats:
    """Return the sums of all ranks' ``values`` by group, (groups,) float64.

    The values are rounded to a grid of 2^-64 of the largest of them; their sums on it are exact.

    Args:
        values: (n,) float, finite.
        group: (n,) int64, from 0 to ``groups`` - 1.
        groups: the same on all ranks.
    """
    largest = highest(comm, np.array([np.max(values, initial=0.0), -np.min(values, initial=0.0)]))
    exponent = math.frexp(largest)[1]
    limbs = np.zeros((LIMBS, groups), np.int64)
    for lo in range(0, len(values), CHUNK):
        rest = np.asarray(values[lo : lo + CHUNK], np.float64)
        scale = -exponent
        for limb in range(LIMBS):
            rest = np.ldexp(rest, LIMB_BITS + scale)
            whole = np.rint(rest) if limb == LIMBS - 1 else np.floor(rest)
            limbs[limb] += np.bincount(group[lo : lo + CHUNK], whole, groups).astype(np.int64)
            rest, scale = rest - whole, 0
    limbs = reduced(comm, limbs)
    sums = [sum(int(limbs[i, g]) << LIMB_BITS * (LIMBS - 1 - i) for i in range(LIMBS)) for g in range(groups)]
    return np.array([math.ldexp(float(one), exponent - LIMB_BITS * LIMBS) for one in sums], np.float64)


def exact_sum(comm: Comm, values: Array) -> float:
    """Return the sum of all ranks' ``values`` (n,) float, finite; see :func:`exact_sums`."""
    return float(exact_sums(comm, values, np.broadcast_to(np.int64(0), len(values)), 1)[0])


def quantile(comm: Comm, values: Array, share: float) -> float | None:
    """Return the value at position int(share (m - 1)) of the m sorted values of all ranks that are not NaN; None if m is 0."""
    known = np.asarray(values)[~np.isnan(values)]
    (m,) = total(comm, len(known))
    return float_of(kth_largest(comm, float_keys(known), m - int(share * (m - 1)))[0]) if m else None


def rank01(comm: Comm, values: Array) -> Floats:
    """Return the ranks of this rank's ``values`` (n,) float among those of all ranks, scaled to [0, 1], (n,) float64.

    Equal values share their mean rank; NaN, and a single value, get 0.5.  All are NaN if no rank has a value.  Each distinct
    value goes to one rank with its count, which numbers them: a rank holds its share of the distinct values, no more.
    """
    known = np.flatnonzero(~np.isnan(values))
    (m,) = total(comm, len(known))
    ranks = np.full(len(values), 0.5 if m else np.nan)
    if m < 2:
        return ranks
    distinct, place, counts = np.unique(float_keys(values[known]), return_inverse=True, return_counts=True)
    cuts = np.cumsum(np.bincount(_owners(comm, distinct), minlength=comm.size))[:-1]
    asked = comm.exchange(np.split(distinct, cuts))
    sizes = comm.exchange(np.split(counts.astype(np.int64), cuts))
    merged, at = np.unique(np.concatenate(asked), return_inverse=True)
    held = np.zeros(len(merged), np.int64)
    np.add.at(held, at, np.concatenate(sizes))
    before = [int(part[0]) for part in comm.allgather(np.array([held.sum()]))]
    last = np.cumsum(held) + sum(before[: comm.rank])
    ends = 2 * last - held - 1  # of a value: the position of its first, and that of its last
    answers = np.split(ends[at], np.cumsum([len(part) for part in asked])[:-1])
    ranks[known] = np.concatenate(comm.exchange(answers)).astype(np.float64)[place] / 2.0 / (m - 1)
    return ranks


def _owners(comm: Comm, distinct: Keys) -> IntArray:
    """Return the rank that numbers each of ``distinct`` (u,), sorted: ranks in rising order, about as many for each."""
    picked = distinct[np.linspace(0, len(distinct) - 1, SPLITS).astype(np.int64)] if len(distinct) else distinct
    every = np.sort(np.concatenate(comm.allgather(picked.view(np.int64))).view(np.uint64))
    cuts = every[np.linspace(0, len(every) - 1, comm.size + 1).astype(np.int64)[1:-1]]
    return np.searchsorted(cuts, distinct, side="right").astype(np.int64)


def broadcast_json(comm: Comm, value: Any, root: int = 0) -> Any:
    """Return ``root``'s JSON-able ``value`` on all ranks; that of the other ranks is ignored."""
    text = json.dumps(value).encode() if comm.rank == root else b""
    return json.loads(comm.broadcast(np.frombuffer(text, np.uint8), root).tobytes())
