"""What the first sweep over the samples keeps for the second, in memory, up to a limit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from grace_ds.data.tokens import TokenBlock, TokenReader
from grace_ds.features.tfidf import Terms
from grace_ds.records import Array, IntArray


class Memory:
    """Tokens of the first sweep, in the smallest integer type that holds them, and terms, each until its limit is reached.

    Tokens spare reading the dataset again, terms spare hashing and sorting; the latter are larger, so they have a limit of
    their own instead of taking the tokens' room.
    """

    def __init__(self, reader: TokenReader, ids: IntArray, limit: int) -> None:
        self.reader, self.ids = reader, ids
        self.tokens, self.terms, self.arena = _Room(limit), _Room(limit), _Arena()
        self.kept: list[tuple[IntArray, Array, IntArray, Terms | None]] = []
        self.rows = 0

    def keep(self, block: TokenBlock, terms: Terms | None) -> None:
        """Keeps the next block of the first sweep, if there is room for it and was for all before it."""
        flat = _narrow(block.flat)
        if self.tokens.take(flat.nbytes + block.offsets.nbytes):
            kept = None
            if terms is not None and self.terms.take(terms.nbytes):
                kept = Terms(self.arena.keep(terms.keys), self.arena.keep(terms.counts))
            self.kept.append((block.ids, self.arena.keep(flat), block.offsets, kept))
            self.rows += len(block)

    def replay(self) -> Iterator[tuple[TokenBlock, Terms | None]]:
        """All samples again: from memory, then (beyond the limit) from the dataset."""
        for ids, flat, offsets, terms in self.kept:
            yield TokenBlock(ids, flat.astype(np.int64), offsets), terms
        for block in self.reader.blocks(self.ids[self.rows :]):
            yield block, None


class _Arena:
    """Arrays side by side in large pieces of memory, which go back to the system whole; many small ones freed would not."""

    PIECE = 1 << 26  # bytes: more than the C library keeps to itself

    def __init__(self) -> None:
        self._free = np.empty(0, np.uint8)

    def keep(self, array: Array) -> Array:
        """A copy of ``array`` (n,)."""
        size = -(-array.nbytes // 8) * 8  # the next one is aligned
        if size > len(self._free):
            self._free = np.empty(max(self.PIECE, size), np.uint8)
        place, self._free = self._free[: array.nbytes].view(array.dtype), self._free[size:]
        place[:] = array
        return place


class _Room:
    """Bytes left, and whether everything fitted so far."""

    def __init__(self, limit: int) -> None:
        self.left = limit

    def take(self, size: int) -> bool:
        """Whether ``size`` bytes fit; once something has not, nothing does."""
        self.left = self.left - size if size <= self.left else -1
        return self.left >= 0


def _narrow(flat: IntArray) -> Array:
    """``flat`` in the smallest of a few integer types, with the same values."""
    low, high = int(flat.min(initial=0)), int(flat.max(initial=0))
    for kind in (np.uint16, np.int32):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return flat.astype(kind)
    return flat
