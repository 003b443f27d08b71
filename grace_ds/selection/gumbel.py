"""Draw without replacement by the Gumbel top-k trick, with randomness that is a function of (seed, version, id).

Adding independent Gumbel noise to log-probabilities and keeping the k largest draws k items one after another, each in
proportion to its probability among those left.  The noise of an id depends on nothing else, so the draw does not depend on
the number of ranks, on other ids or on any generator of the job.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from grace_ds.errors import DataError
from grace_ds.records import Array, Coreset, FloatArray, IntArray
from grace_ds.utils.hashing import GOLDEN, Words, finish, finish_one

Floats = npt.NDArray[np.float64]
CHUNK = 1 << 16  # ids hashed at once: the scratch arrays stay in the cache


def random_words(seed: int, version: int, purpose: int, ids: IntArray) -> Words:
    """Return one pseudo-random word for each of ``ids`` (n,) int64, (n,) uint64: splitmix64 keyed by the other arguments.

    Uses 8 bytes per id and a constant.
    """
    key = 0
    for part in (seed, version, purpose):
        key = finish_one((key ^ (part % 2**64)) + GOLDEN)
    words = np.asarray(ids, np.int64).astype(np.uint64)
    for lo in range(0, len(words), CHUNK):
        block = words[lo : lo + CHUNK]
        block *= np.uint64(GOLDEN)
        block += np.uint64(key)
        finish(block)
        # Mix twice, so that neighbouring keys share no sequence.  The word mixed in is that of id -1, which no sample has:
        # the word of a real id would cancel to 0 there and give that id the same noise in every version.
        block ^= np.uint64(finish_one(key - GOLDEN))
        finish(block)
    return words


def gumbel(seed: int, version: int, ids: IntArray) -> Floats:
    """Return the standard Gumbel noise of ``ids`` (n,) int64, (n,) float64; 16 bytes per id."""
    noise = np.empty(len(ids))
    for lo in range(0, len(noise), CHUNK):
        words = random_words(seed, version, 1, ids[lo : lo + CHUNK])
        words >>= np.uint64(11)
        block = noise[lo : lo + CHUNK]
        block[:] = words
        block += 0.5
        block *= 2.0**-53  # in (0, 1), both ends excluded
        np.log(block, out=block)
        np.negative(block, out=block)
        np.log(block, out=block)
        np.negative(block, out=block)
    return noise


def largest(values: Array, k: int) -> IntArray:
    """Return the positions of the k largest of ``values`` (n,) float64 without NaN, ascending; the first ones of equal values."""
    n = len(values)
    if k >= n:
        return np.arange(n)
    if k <= 0:
        return np.empty(0, np.int64)
    bar = np.partition(values, n - k)[n - k]
    above = np.flatnonzero(values > bar)
    level = np.flatnonzero(values == bar)[: k - len(above)]
    return np.sort(np.concatenate([above, level]))


def check_log_p(ids: IntArray, log_p: Array) -> Floats:
    """Check that ``log_p`` (n,) fits ``ids`` and that ids are sorted and unique; return it as float64.

    Raises:
        DataError: lengths differ, ids are unsorted or repeat, or a value is NaN or +inf.
    """
    if log_p.shape != ids.shape:
        raise DataError(f"{len(ids)} ids came with log-probabilities of shape {log_p.shape}: give one for each id")
    if (np.diff(ids) <= 0).any():
        at = int(np.argmax(np.diff(ids) <= 0))
        raise DataError(f"ids must be sorted and unique, but {ids[at]} is followed by {ids[at + 1]}")
    bad = np.isnan(log_p) | np.isposinf(log_p)
    if bad.any():
        at = int(np.argmax(bad))
        raise DataError(f"log-probability of sample {ids[at]} is {log_p[at]}: scores must be finite, or -inf for never")
    return np.asarray(log_p, np.float64)


def sample_without_replacement(ids: IntArray, log_p: Array, k: int, seed: int, version: int) -> Coreset:
    """Draw k of ``ids`` with probabilities in proportion to exp(log_p), successively without replacement.

    Args:
        ids: (n,) int64, sorted, unique, the whole window, on the root.
        log_p: (n,) float, unnormalised; -inf for an id that must never be chosen.
        k: ids wanted; with fewer finite ``log_p`` all of those are taken.
        seed: of the run.
        version: of the coreset.

    Returns:
        Ids, sorted, with weights 1 / P(perturbed log-probability above the (k+1)-th largest one), which make weighted means over
        the sample consistent for means over the window; scaled to mean 1.

    Beyond its arguments and its result it holds at most 16 bytes per id and a constant.
    """
    log_p = check_log_p(ids, log_p)
    possible = int(np.count_nonzero(np.isfinite(log_p)))
    shift = _log_total(log_p) if possible else 0.0
    threshold = -np.inf
    if 0 <= k < possible:
        threshold, bar, level = _bars(ids, log_p, shift, seed, version, k)
        chosen = _reaching(ids, log_p, shift, seed, version, bar, level, k)
    else:
        chosen = np.flatnonzero(np.isfinite(log_p)) if k > 0 else np.empty(0, np.int64)
    drawn, weights = ids[chosen], log_p[chosen]
    del chosen
    weights -= shift
    weights -= threshold
    with np.errstate(over="ignore"):
        np.exp(weights, out=weights)
        np.negative(weights, out=weights)
        np.expm1(weights, out=weights)
        np.divide(-1.0, weights, out=weights)
    return Coreset(drawn, mean_one(weights))


def _log_total(log_p: Floats) -> float:
    """Return the logarithm of the sum of exp(log_p); not all may be -inf."""
    top = float(log_p.max())
    return top + math.log(math.fsum(float(np.exp(log_p[lo : lo + CHUNK] - top).sum()) for lo in range(0, len(log_p), CHUNK)))


def _perturbed(ids: IntArray, log_p: Floats, shift: float, seed: int, version: int, lo: int) -> Floats:
    """Return the perturbed log-probabilities of one chunk of ids, from ``lo``; the same numbers at every call."""
    perturbed = gumbel(seed, version, ids[lo : lo + CHUNK])
    perturbed += log_p[lo : lo + CHUNK] - shift
    return perturbed


def _bars(ids: IntArray, log_p: Floats, shift: float, seed: int, version: int, k: int) -> tuple[float, float, int]:
    """Return the (k+1)-th and the k-th largest perturbed log-probability, and how many of the k largest equal the latter."""
    perturbed = np.empty(len(ids))
    for lo in range(0, len(ids), CHUNK):
        perturbed[lo : lo + CHUNK] = _perturbed(ids, log_p, shift, seed, version, lo)
    perturbed.partition(len(ids) - k - 1)
    highest = perturbed[len(ids) - k :]
    bar = float(highest.min(initial=np.inf))
    return float(perturbed[len(ids) - k - 1]), bar, int(np.count_nonzero(highest == bar))


def _reaching(ids: IntArray, log_p: Floats, shift: float, seed: int, version: int, bar: float, level: int, k: int) -> IntArray:
    """Return the positions, ascending, of the k perturbed log-probabilities above ``bar``, or the first ``level`` equal to it.

    They are computed a second time, which is cheaper than keeping them next to the copy that was partitioned.
    """
    positions = np.empty(k, np.int64)
    count = 0
    for lo in range(0, len(ids), CHUNK):
        perturbed = _perturbed(ids, log_p, shift, seed, version, lo)
        reaching = perturbed > bar
        equal = np.flatnonzero(perturbed == bar)[:level]
        level -= len(equal)
        reaching[equal] = True
        found = np.flatnonzero(reaching)
        positions[count : count + len(found)] = found
        positions[count : count + len(found)] += lo
        count += len(found)
    return positions


def mean_one(weights: Array) -> FloatArray:
    """Return ``weights`` (m,) scaled to mean 1, float32; m may be 0."""
    total = float(np.sum(weights, dtype=np.float64))
    return (np.asarray(weights, np.float64) * (len(weights) / total if total > 0 else 1.0)).astype(np.float32)
