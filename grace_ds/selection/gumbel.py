"""Draw without replacement by the Gumbel top-k trick, with randomness that is a function of (seed, version, id).

Adding independent Gumbel noise to log-probabilities and keeping the k largest draws k items one after another, each in
proportion to its probability among those left.  The noise of an id depends on nothing else, so the draw does not depend on
the number of ranks, on other ids or on any generator of the job.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from grace_ds.comm.base import Comm
from grace_ds.comm.local import LocalComm
from grace_ds.comm.statistics import Keys, by_lower_id, exact_sum, float_keys, float_of, highest, top, total
from grace_ds.errors import DataError
from grace_ds.records import Array, Coreset, FloatArray, IntArray
from grace_ds.utils.hashing import GOLDEN, Words, finish, finish_one

Floats = npt.NDArray[np.float64]
CHUNK = 1 << 16  # ids hashed at once: the scratch arrays stay in the cache
ALONE: Comm = LocalComm()  # of a draw whose samples all lie on this rank


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


def sample_without_replacement(ids: IntArray, log_p: Array, k: int, seed: int, version: int, comm: Comm = ALONE) -> Coreset:
    """Draw k of all ranks' ``ids`` with probabilities in proportion to exp(log_p), successively without replacement.  Collective.

    Args:
        ids: (n,) int64, sorted, unique, this rank's samples; each on one rank only.
        log_p: (n,) float, unnormalised; -inf for an id that must never be chosen.
        k: ids wanted over all ranks; with fewer finite ``log_p`` all of those are taken.
        seed: of the run.
        version: of the coreset.
        comm: of all ranks.

    Returns:
        This rank's part: ids, sorted, with weights 1 / P(perturbed log-probability above the (k+1)-th largest one), which make
        weighted means over the sample consistent for means over the window; scaled to mean 1 over all ranks.

    Beyond its arguments and its result it holds at most 16 bytes per id and a constant.
    """
    log_p = check_log_p(ids, log_p)
    (possible,) = total(comm, int(np.count_nonzero(np.isfinite(log_p))))
    shift = _log_total(comm, log_p) if possible else 0.0
    threshold = -np.inf
    if 0 <= k < possible:
        keys = _perturbed_keys(ids, log_p, shift, seed, version)
        chosen = top(comm, k, keys, by_lower_id(ids))
        # The largest one that is left over.
        left = int(np.max(keys, where=~chosen, initial=float_keys(np.array([-np.inf]))[0]))
        threshold = highest(comm, np.array([float_of(left)]))
        del keys
    else:
        chosen = np.isfinite(log_p) if k > 0 else np.zeros(len(ids), bool)
    drawn, weights = ids[chosen], log_p[chosen]
    del chosen
    weights -= shift
    weights -= threshold
    with np.errstate(over="ignore"):
        np.exp(weights, out=weights)
        np.negative(weights, out=weights)
        np.expm1(weights, out=weights)
        np.divide(-1.0, weights, out=weights)
    return Coreset(drawn, mean_one(weights, comm))


def _log_total(comm: Comm, log_p: Floats) -> float:
    """Return the logarithm of the sum of all ranks' exp(log_p); not all may be -inf."""
    most = highest(comm, log_p)
    chances = log_p - most
    np.exp(chances, out=chances)
    return most + math.log(exact_sum(comm, chances))


def _perturbed_keys(ids: IntArray, log_p: Floats, shift: float, seed: int, version: int) -> Keys:
    """Return the keys of the perturbed log-probabilities, (n,) uint64; 8 bytes per id and a constant."""
    keys = np.empty(len(ids), np.uint64)
    for lo in range(0, len(ids), CHUNK):
        perturbed = gumbel(seed, version, ids[lo : lo + CHUNK])
        perturbed += log_p[lo : lo + CHUNK] - shift
        keys[lo : lo + CHUNK] = float_keys(perturbed)
    return keys


def mean_one(weights: Array, comm: Comm = ALONE) -> FloatArray:
    """Return ``weights`` (m,), not negative, scaled to mean 1 over all ranks, float32; m may be 0.  Collective."""
    (members,) = total(comm, len(weights))
    whole = exact_sum(comm, weights)
    return (np.asarray(weights, np.float64) * (members / whole if whole > 0 else 1.0)).astype(np.float32)
