"""Content vectors for the graph: hashed uni- and bigram TF-IDF, projected by a seeded sign-hash.

A term is a token or a pair of tokens, hashed to 2^18.  A sample's vector is the sum over its distinct terms of
log(1 + tf) * idf, each with a random sign into one of ``dim`` places, scaled to unit length.  Two near-duplicates share
almost all terms, so their cosine stays near 1; that of unrelated samples is small.  Terms are summed in the order of
their hashes, in float64, so a row does not depend on the block or rank that it was computed in.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from grace_ds.features.density import Allreduce
from grace_ds.features.tokens import TokenBlock
from grace_ds.records import FloatArray, IntArray

BITS = 18
TERMS = 1 << BITS
_UNI = np.uint64(0xD6E8FEB86659FD93)
_LEFT = np.uint64(0x9E3779B97F4A7C15)
_RIGHT = np.uint64(0xC2B2AE3D27D4EB4F)


def _finish(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's last steps: every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def term_counts(block: TokenBlock) -> tuple[IntArray, IntArray, IntArray]:
    """The distinct terms of each sample.

    Returns:
        row (m,), term (m,) in [0, 2^18) and how often it occurs there (m,), all int64, sorted by (row, term).
    """
    token = block.flat.view(np.uint64)
    row = np.repeat(np.arange(len(block)), np.diff(block.offsets))
    single = _hashed(token * _UNI + _UNI)  # + _UNI: else the token 0 and the pair (0, 0) are one term
    same = row[1:] == row[:-1]  # a pair never crosses from one sample to the next
    pair = _hashed((token[:-1] * _LEFT + token[1:] * _RIGHT)[same])
    keys = np.concatenate(((row << BITS) | single, (row[1:][same] << BITS) | pair))
    if len(block) < 1 << (32 - BITS):
        keys = keys.astype(np.uint32)  # sorts twice as fast
    keys = np.sort(keys)
    first = np.flatnonzero(np.concatenate((np.ones(min(len(keys), 1), np.bool_), keys[1:] != keys[:-1])))
    count = np.diff(np.append(first, len(keys)))
    distinct = keys[first].astype(np.int64)
    return distinct >> BITS, distinct & (TERMS - 1), count


def _hashed(x: npt.NDArray[np.uint64]) -> IntArray:
    bins: IntArray = (_finish(x) >> np.uint64(64 - BITS)).astype(np.int64)
    return bins


class TfIdf:
    """Document frequencies first (``add`` every block, ``reduce`` once), then vectors.

    Args:
        dim: width of the vectors.
        seed: of the projection.
    """

    def __init__(self, dim: int, seed: int) -> None:
        self.dim = dim
        self.frequency = np.zeros(TERMS, np.int64)
        self.samples = 0
        code = _finish(np.arange(TERMS, dtype=np.uint64) + np.uint64(seed * int(_LEFT) % 2**64))
        self._place = ((code >> np.uint64(1)) % np.uint64(dim)).astype(np.int64)
        self._sign = np.where(code & np.uint64(1), 1.0, -1.0)
        self._weight = self._sign

    def add(self, block: TokenBlock) -> None:
        """Counts, for every term, the samples of ``block`` that hold it."""
        _, term, _ = term_counts(block)
        np.add.at(self.frequency, term, np.int64(1))
        self.samples += len(block)

    def reduce(self, allreduce: Allreduce) -> None:
        """Sums the frequencies over all ranks (collective) and fixes the terms' weights."""
        total = allreduce(np.append(self.frequency, self.samples))
        self.frequency, self.samples = total[:-1], int(total[-1])
        self._weight = self._sign * (np.log((1.0 + self.samples) / (1.0 + self.frequency)) + 1.0)

    def vectors(self, block: TokenBlock) -> FloatArray:
        """(n, dim) float32, unit norm (zero for samples without tokens)."""
        row, term, count = term_counts(block)
        # the logarithm comes from a table, so that it is one value a count whatever block it stands in
        table = np.log1p(np.arange(int(count.max(initial=0)) + 1, dtype=np.float64))
        place = row * self.dim + self._place[term]
        flat = np.bincount(place, weights=table[count] * self._weight[term], minlength=len(block) * self.dim)
        rows = flat.astype(np.float64, copy=False).reshape(len(block), self.dim)  # bincount of nothing is int
        norm = np.sqrt(np.add.reduce(np.square(rows), axis=1, keepdims=True))
        return np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 0).astype(np.float32)
