"""Arms that clean or reweight the pool once, by its text alone: deduplication with a quality filter, and DSIR."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.selection.arms.base import Arm, Laps, SubsetArm, View
from grace_ds.records import Array, IntArray
from grace_ds.selection.gumbel import random_words, sample_without_replacement

GRAM, JACCARD = 5, 0.7
BANDS, BAND_ROWS = 32, 4  # a pair of similarity 0.7 shares a band in 99.98 % of all cases
BUCKETS = 10_000  # of hashed n-grams, as in the paper on DSIR
Words = npt.NDArray[np.uint64]
_BASE = np.uint64(0x9E3779B97F4A7C15)


def shingles(rows: Array) -> Words:
    """(n, T - 4) uint64: the hashed 5-grams of each row."""
    width = rows.shape[1] - GRAM + 1
    hashed = np.zeros((len(rows), width), np.uint64)
    for at in range(GRAM):
        hashed = hashed * _BASE + rows[:, at : at + width].astype(np.uint64) + np.uint64(1)
    hashed ^= hashed >> np.uint64(29)
    hashed *= np.uint64(0xBF58476D1CE4E5B9)
    hashed ^= hashed >> np.uint64(32)
    return hashed


def minhashes(grams: Words, seed: int) -> Words:
    """(n, 128) uint64: the least of each row's 5-grams under each of 128 hash functions."""
    words = random_words(seed, 0, 5, np.arange(2 * BANDS * BAND_ROWS, dtype=np.int64))
    factors, offsets = words[::2] | np.uint64(1), words[1::2]
    out = np.empty((len(grams), len(factors)), np.uint64)
    for i, (factor, offset) in enumerate(zip(factors, offsets, strict=True)):
        mixed = (grams ^ offset) * factor
        mixed ^= mixed >> np.uint64(31)  # the low bits of a product depend on low bits only
        out[:, i] = (mixed * factor).min(axis=1)
    return out


def duplicates(rows: Array, seed: int) -> npt.NDArray[np.bool_]:
    """(n,) bool: rows that are near-copies of an earlier row: MinHash bands propose, the true Jaccard similarity decides."""
    grams = shingles(rows)
    signature = minhashes(grams, seed)
    root = np.arange(len(rows))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = int(root[i])
        return i

    sets: dict[int, frozenset[int]] = {}

    def grams_of(i: int) -> frozenset[int]:
        if i not in sets:
            sets[i] = frozenset(grams[i].tolist())
        return sets[i]

    for band in range(BANDS):
        part = np.ascontiguousarray(signature[:, band * BAND_ROWS : (band + 1) * BAND_ROWS])
        _, bucket = np.unique(part, axis=0, return_inverse=True)
        order = np.argsort(bucket.reshape(-1), kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(bucket.reshape(-1)[order])) + 1)
        for group in groups:
            first = int(group[0])
            for other in map(int, group[1:]):
                a, b = find(first), find(other)
                if a != b and jaccard(grams_of(first), grams_of(other)) >= JACCARD:
                    root[max(a, b)] = min(a, b)
    return np.array([find(i) != i for i in range(len(rows))])


def jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    """Shared members over all members."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


def compression_ratios(texts: list[str]) -> Array:
    """(n,) float64: bytes after zlib over bytes before; 1 for an empty text."""
    raw = [text.encode("utf-8", "replace") for text in texts]
    return np.array([len(zlib.compress(data)) / len(data) if data else 1.0 for data in raw])


class DedupFilter(Arm):
    """What a data pipeline does first: fuzzy deduplication and a quality rule, then uniform over what is left.

    MinHash at a Jaccard similarity of 0.7 of token 5-grams, the first of a group of near-copies being kept (Broder 1997; Lee et
    al., arXiv 2107.06499), and a compression-ratio rule, for which the trusted rows' 1st and 99th percentile are the bounds.
    Simplified: candidates are compared with the first of their bucket only.
    """

    def __init__(self, view: View) -> None:
        super().__init__(view)
        self.left = 0

    def begin(self, engine: Any) -> None:
        """Both filters, once."""
        view = self.view
        low, high = np.quantile(compression_ratios(view.decode(view.trusted)), [0.01, 0.99])
        ratio = compression_ratios(view.decode(view.rows))
        keep = np.flatnonzero(~duplicates(view.rows, self.plan.seed) & (ratio >= low) & (ratio <= high))
        self.left = len(keep)
        self.laps = Laps(keep if len(keep) else view.ids, self.rng)

    def end(self) -> dict[str, Any]:
        """How much is left."""
        return {"left": self.left}


class Dsir(SubsetArm):
    """DSIR (arXiv 2302.03169): importance resampling by hashed uni- and bigram bags, trusted rows as the target.

    Gumbel top-k on the log ratio of the two bag models, once. Simplified: n-grams of the job's tokens, not of words.
    """

    SMOOTHING = 1.0  # pseudo-count of a bucket

    def choose(self, version: int) -> IntArray | None:
        """The resampled fifth, at the start only."""
        view = self.view
        if version:
            return None
        log_ratio = dsir_log_ratio(view.rows, view.trusted, self.SMOOTHING)
        return sample_without_replacement(view.ids, log_ratio, view.k, self.plan.seed, 0).ids


def bags(rows: Array) -> IntArray:
    """(n, 2T - 1) int64: the bucket of every token and of every pair of tokens of each row."""
    token = rows.astype(np.uint64) + np.uint64(1)
    codes = np.concatenate([token, (token[:, :-1] * _BASE) ^ (token[:, 1:] << np.uint64(20))], axis=1)
    codes = codes * np.uint64(0xD6E8FEB86659FD93)
    codes ^= codes >> np.uint64(32)
    mixed: IntArray = (codes % np.uint64(BUCKETS)).astype(np.int64)
    return mixed


def dsir_log_ratio(rows: Array, target: Array, smoothing: float) -> Array:
    """(n,) float64: log p_target - log p_pool of each row's bag."""
    pool, wanted = bags(rows), bags(target)
    log_p = [np.log(np.bincount(bag.reshape(-1), minlength=BUCKETS) + smoothing) for bag in (wanted, pool)]
    log_p = [values - np.log(np.exp(values).sum()) for values in log_p]
    return np.asarray((log_p[0] - log_p[1])[pool].sum(axis=1))
