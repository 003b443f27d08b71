"""Compute content vectors for the graph: hashed uni- and bigram TF-IDF, projected by a seeded sign-hash.

A term is a token or a pair of tokens, hashed to 2^18.  A sample's vector is the sum over its distinct terms of
log(1 + tf) * idf, each with a random sign in one of ``dim`` places, scaled to unit length.  Two near-duplicates share
almost all terms, so their cosine stays near 1; that of unrelated samples is small.  Terms are summed in the order of
their hashes, in float64, so a row does not depend on the block or rank that it was computed in.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from grace_ds.data.tokens import BREAK, TokenBlock
from grace_ds.features.ngrams import Allreduce
from grace_ds.records import Array, FloatArray, IntArray
from grace_ds.utils.grid import on_grid
from grace_ds.utils.hashing import GOLDEN, finish

BITS = 18
TERMS = 1 << BITS
_UNI = np.uint64(0xD6E8FEB86659FD93)
_LEFT = np.uint64(GOLDEN)
_RIGHT = np.uint64(0xC2B2AE3D27D4EB4F)
CHUNK = 1 << 13  # approximate tokens hashed and sorted at once: the arrays fit the nearest caches


def _pieces(block: TokenBlock) -> Iterator[Array]:
    """Yield the keys, row * 2^18 + term, of every term of a few whole rows at a time, ascending.

    They are uint32 if that holds them, else uint64.  Rows ascend from piece to piece, so the concatenated pieces are sorted.
    Many short sorts in the nearest caches are faster than a long one.
    """
    narrow = len(block) < 1 << (32 - BITS)  # sorts twice as fast
    dtype: type[np.unsignedinteger[Any]] = np.uint32 if narrow else np.uint64
    cuts = np.searchsorted(block.offsets, np.arange(CHUNK, len(block.flat), CHUNK))
    for first, last in pairwise([0, *cuts.tolist(), len(block)]):
        offsets = block.offsets[first : last + 1] - block.offsets[first]
        token = block.flat[block.offsets[first] : block.offsets[last]].view(np.uint64)
        total = len(token)
        keys = np.empty(max(2 * total - 1, 0), dtype)
        _hash_into(keys[:total], token * _UNI + _UNI)  # + _UNI: else 0 and (0, 0) are one term
        _hash_into(keys[total:], token[:-1] * _LEFT + token[1:] * _RIGHT)
        row = np.repeat(np.arange(first, last, dtype=dtype) << dtype(BITS), np.diff(offsets))
        keys[:total] |= row
        keys[total:] |= row[1:]
        ends = np.unique(offsets[(offsets > 0) & (offsets < total)])
        none = np.zeros(len(keys), np.bool_)
        none[total + ends - 1] = True  # a pair across two samples is not a term
        breaks = block.flat[block.offsets[first] : block.offsets[last]] == BREAK
        if breaks.any():
            none[:total] |= breaks
            none[total:] |= breaks[1:] | breaks[:-1]
        keys[none] = np.iinfo(dtype).max  # sorted to the end
        keys.sort()
        yield keys[: len(keys) - int(none.sum())]


def _hash_into(out: Array, x: npt.NDArray[np.uint64]) -> None:
    """Write the bins in [0, 2^18) of ``x`` to ``out``: the top bits of its hashes.  Overwrites ``x``."""
    np.right_shift(finish(x), np.uint64(64 - BITS), out=out, casting="unsafe")


def _distinct(keys: Array) -> tuple[Array, IntArray]:
    """Return each of the sorted ``keys`` once, and the number of its occurrences."""
    new = np.ones(len(keys), np.bool_)
    np.not_equal(keys[1:], keys[:-1], out=new[1:])
    first = np.flatnonzero(new)
    return keys[first], np.diff(first, append=len(keys))


@dataclass(frozen=True)
class Terms:
    """The distinct terms of each sample of a block, in the smallest integer types.

    Attributes:
        keys: (m,) uint32 or uint64, ascending: row * 2^18 + term.
        counts: (m,) unsigned, occurrences of each in its row.
    """

    keys: Array
    counts: Array

    @staticmethod
    def of(block: TokenBlock) -> Terms:
        """Find the terms of ``block``."""
        keys, counts = (np.concatenate(parts) for parts in zip(*map(_distinct, _pieces(block)), strict=True))
        return Terms(keys, counts.astype(np.min_scalar_type(int(counts.max(initial=0)))))

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.keys.nbytes + self.counts.nbytes


class TfIdf:
    """TF-IDF model: count document frequencies first (``add`` every block, ``reduce`` once), then compute vectors.

    Args:
        dim: width of the vectors.
        seed: of the projection.

    Attributes:
        totals: (2^18 + 1,) int64, samples that hold each term, then all samples; empty before :meth:`reduce`.
    """

    def __init__(self, dim: int, seed: int) -> None:
        self.dim, self.seed = dim, seed
        self._free: queue.SimpleQueue[IntArray] = queue.SimpleQueue()  # tables that no thread is adding to
        code = finish(np.arange(TERMS, dtype=np.uint64) + np.uint64(seed * GOLDEN % 2**64))
        self._place = ((code >> np.uint64(1)) % np.uint64(dim)).astype(np.int64)
        self._sign = np.where(code & np.uint64(1), 1.0, -1.0)
        self._weight = self._sign
        self.totals: IntArray = np.zeros(0, np.int64)

    @staticmethod
    def of(dim: int, seed: int, totals: IntArray) -> TfIdf:
        """Build a model with the fixed ``totals`` of an earlier one: further samples do not change its weights."""
        fixed = TfIdf(dim, seed)
        fixed._fix(totals)
        return fixed

    def add(self, block: TokenBlock) -> Terms:
        """Count, for every term, the samples of ``block`` that hold it; return the block's terms.

        Several threads may add at a time, each to a table of its own.
        """
        terms = Terms.of(block)
        term = (terms.keys & terms.keys.dtype.type(TERMS - 1)).astype(np.intp)
        try:
            own = self._free.get_nowait()
        except queue.Empty:
            own = np.zeros(TERMS + 1, np.int64)
        if len(term) > TERMS // 4:
            own[:-1] += np.bincount(term, minlength=TERMS)
        else:
            np.add.at(own, term, np.int64(1))
        own[-1] += len(block)
        self._free.put(own)
        return terms

    def reduce(self, allreduce: Allreduce) -> None:
        """Sum the frequencies over all ranks (collective) and fix the terms' weights, if they are not fixed yet."""
        if not len(self.totals):
            counted = np.zeros(TERMS + 1, np.int64)
            while not self._free.empty():
                counted += self._free.get()
            self._fix(allreduce(counted))

    def _fix(self, totals: IntArray) -> None:
        self.totals = totals
        self._weight = self._sign * (np.log((1.0 + int(totals[-1])) / (1.0 + totals[:-1])) + 1.0)

    def vectors(self, n: int, terms: Terms) -> FloatArray:
        """Return the vectors of a block of ``n`` samples from its terms, (n, dim) float32, unit norm.

        Samples without tokens get zeros.  The rows are on the grid of :mod:`grace_ds.utils.grid`, as the k-NN graph requires.
        """
        wide, count = terms.keys.astype(np.int64), terms.counts
        row, term = wide >> BITS, wide & (TERMS - 1)
        # The logarithm comes from a table, so that each count has one value in every block.
        table = np.log1p(np.arange(int(count.max(initial=0)) + 1, dtype=np.float64))
        weight = self._weight[term]
        often = np.flatnonzero(count > 1)  # most terms occur once
        factor = table[count[often]]
        factor *= weight[often]
        weight *= table[min(1, len(table) - 1)]
        weight[often] = factor
        row *= self.dim
        row += self._place[term]
        flat = np.bincount(row, weights=weight, minlength=n * self.dim)
        rows = flat.astype(np.float64, copy=False).reshape(n, self.dim)  # bincount of nothing is int
        norm = np.sqrt(np.add.reduce(np.square(rows), axis=1, keepdims=True))
        return on_grid(np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 0).astype(np.float32))
