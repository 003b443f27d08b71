"""Keep data of the first sweep over the samples for the second, in memory, up to a limit."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

import numpy as np

from grace_ds.data.tokens import TokenBlock
from grace_ds.features.duplicates import Grams
from grace_ds.features.tfidf import Terms
from grace_ds.records import Array, IntArray


@dataclass
class Kept:
    """What the second sweep needs of some samples.

    Attributes:
        counted: (m,) int64, ascending positions of the samples whose densities are wanted.
        grams: their 6-grams; None: not kept.
        placed: (k,) int64, ascending positions of the samples whose vectors are wanted.
        terms: their terms; None: not kept.
        tokens: (flat, offsets) of the samples at :attr:`needed`; None: not kept.
    """

    counted: IntArray
    grams: Grams | None
    placed: IntArray
    terms: Terms | None
    tokens: tuple[Array, IntArray] | None = None

    @property
    def needed(self) -> IntArray:
        """(j,) int64, ascending: positions of the samples whose tokens the second sweep needs."""
        none = np.empty(0, np.int64)
        return np.union1d(none if self.grams is not None else self.counted, none if self.terms is not None else self.placed)

    def block(self) -> TokenBlock:
        """Return the kept tokens, with positions for ids."""
        assert self.tokens is not None
        flat, offsets = self.tokens
        return TokenBlock(self.needed, flat.astype(np.int64), offsets)

    def forget(self) -> None:
        """Release the memory."""
        self.grams = self.terms = self.tokens = None


class Memory:
    """6-grams, terms and tokens of the first sweep in the smallest integer types, each up to the limit.

    Kept 6-grams and terms avoid hashing and sorting; where there is no room for them, kept tokens avoid reading the dataset
    again.  Several threads may keep at a time.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self._grams, self._terms, self._tokens, self._arena = _Room(limit), _Room(limit), _Room(limit), _Arena()
        self.kept: list[Kept] = []  # in any order

    def keep(self, found: Kept, block: TokenBlock | None) -> None:
        """Keep what was found of some samples, as far as it fits.

        Args:
            found: with all that was found.
            block: tokens of these samples at least, with positions for ids; None: not read.
        """
        kept = replace(found)
        grams, terms = found.grams, found.terms
        if grams is not None:
            bins = grams.bins
            times, kept.grams = grams.times, None
            if self._grams.take(bins.nbytes + grams.lengths.nbytes + (0 if times is None else times.nbytes)):
                times = None if times is None else self._arena.keep(times)
                kept.grams = Grams(self._arena.keep(bins), grams.lengths, times)
        if terms is not None:
            fits = self._terms.take(terms.nbytes)
            kept.terms = Terms(self._arena.keep(terms.keys), self._arena.keep(terms.counts)) if fits else None
        if block is not None and len(kept.needed):
            part = block if len(kept.needed) == len(block) else block.take(np.isin(block.ids, kept.needed))
            flat = _narrow(part.flat)
            if self._tokens.take(flat.nbytes + part.offsets.nbytes):
                kept.tokens = self._arena.keep(flat), part.offsets
        self.kept.append(kept)


class _Arena:
    """Arrays packed into large pieces of memory, which return to the system when freed; many small arrays would not."""

    PIECE = 1 << 26  # bytes: more than the C library retains when it is freed

    def __init__(self) -> None:
        self._free = np.empty(0, np.uint8)
        self._lock = threading.Lock()

    def keep(self, array: Array) -> Array:
        """Return a copy of ``array`` (n,)."""
        size = -(-array.nbytes // 8) * 8  # so that the next array is aligned
        with self._lock:
            if size > len(self._free):
                self._free = np.empty(max(self.PIECE, size), np.uint8)
            place, self._free = self._free[: array.nbytes], self._free[size:]
        copy = place.view(array.dtype)
        copy[:] = array  # the first touch of new memory takes longest
        return copy


class _Room:
    """Remaining bytes of a limit; negative after something did not fit."""

    def __init__(self, limit: int) -> None:
        self.remaining, self._lock = limit, threading.Lock()

    def take(self, size: int) -> bool:
        """Return whether ``size`` bytes fit; after one failure nothing fits."""
        with self._lock:
            self.remaining = self.remaining - size if size <= self.remaining else -1
            return self.remaining >= 0


def _narrow(flat: Array) -> Array:
    """Return ``flat`` in the smallest of a few integer types, with the same values."""
    low, high = int(flat.min(initial=0)), int(flat.max(initial=0))
    for dtype in (np.uint16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return flat.astype(dtype)
    return flat
