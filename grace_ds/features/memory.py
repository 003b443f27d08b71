"""Keep data of the first sweep over the samples for the second, in memory, up to a limit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from grace_ds.data.tokens import TokenBlock, TokenReader
from grace_ds.features.tfidf import Terms
from grace_ds.records import Array, IntArray


class Memory:
    """Tokens of the first sweep, in the smallest integer type that holds them, and terms, each up to its limit.

    Kept tokens avoid reading the dataset again; kept terms avoid hashing and sorting.  Terms are larger, so they have a
    separate limit and do not displace tokens.
    """

    def __init__(self, reader: TokenReader, ids: IntArray, limit: int) -> None:
        self.reader, self.ids = reader, ids
        self.tokens, self.terms, self.arena = _Room(limit), _Room(limit), _Arena()
        self.kept: list[tuple[IntArray, Array, IntArray, Terms | None]] = []
        self.rows = 0

    def keep(self, block: TokenBlock, terms: Terms | None) -> None:
        """Keep the next block of the first sweep, if it fits and all blocks before it did."""
        flat = _narrow(block.flat)
        if self.tokens.take(flat.nbytes + block.offsets.nbytes):
            kept = None
            if terms is not None and self.terms.take(terms.nbytes):
                kept = Terms(self.arena.keep(terms.keys), self.arena.keep(terms.counts))
            self.kept.append((block.ids, self.arena.keep(flat), block.offsets, kept))
            self.rows += len(block)

    def replay(self) -> Iterator[tuple[TokenBlock, Terms | None]]:
        """Yield all samples again: from memory, then (beyond the limit) from the dataset."""
        for ids, flat, offsets, terms in self.kept:
            yield TokenBlock(ids, flat.astype(np.int64), offsets), terms
        for block in self.reader.blocks(self.ids[self.rows :]):
            yield block, None


class _Arena:
    """Arrays packed into large pieces of memory, which return to the system when freed; many small arrays would not."""

    PIECE = 1 << 26  # bytes: more than the C library retains when it is freed

    def __init__(self) -> None:
        self._free = np.empty(0, np.uint8)

    def keep(self, array: Array) -> Array:
        """Return a copy of ``array`` (n,)."""
        size = -(-array.nbytes // 8) * 8  # so that the next array is aligned
        if size > len(self._free):
            self._free = np.empty(max(self.PIECE, size), np.uint8)
        copy, self._free = self._free[: array.nbytes].view(array.dtype), self._free[size:]
        copy[:] = array
        return copy


class _Room:
    """Remaining bytes of a limit; negative after something did not fit."""

    def __init__(self, limit: int) -> None:
        self.remaining = limit

    def take(self, size: int) -> bool:
        """Return whether ``size`` bytes fit; after one failure nothing fits."""
        self.remaining = self.remaining - size if size <= self.remaining else -1
        return self.remaining >= 0


def _narrow(flat: IntArray) -> Array:
    """Return ``flat`` in the smallest of a few integer types, with the same values."""
    low, high = int(flat.min(initial=0)), int(flat.max(initial=0))
    for dtype in (np.uint16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return flat.astype(dtype)
    return flat
