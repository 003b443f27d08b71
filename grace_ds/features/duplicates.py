"""Measure how many near-duplicates a sample has: hashed 6-gram counts over the pool.

A 6-gram is hashed to 64 bits by a polynomial, built by doubling (2-grams, then 4-grams, then 6-grams), and its finished
hash to one of the table's bins.  A sample's density is the 40th percentile over its positions of (bin's count - 1).  So a text
of which 40 % occurs once is unique, and boilerplate around it does not matter; a copy with a few edits is as dense as its
source.

The number of bins, and which 6-grams are counted: :mod:`grace_ds.features.ngrams`.  If some are left out, the percentile is
over a sample's distinct 6-grams and not over its positions: padding that happens to be among the few that are counted would
otherwise outweigh them all.  Then it is not interpolated either: of a text's four or five 6-grams, one that shares its bin
would weigh too much.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from grace_ds.data.tokens import BREAK, TokenBlock
from grace_ds.features.ngrams import FLOOR, GRAM, SMALLEST, Allreduce, Sampling
from grace_ds.records import Array, IntArray

QUANTILE = 0.4
SATURATION = 1 << 30  # maximum density: padding can repeat one 6-gram billions of times
COPIES = 5  # copies of the text that a table is tested on: its chance is 1 / COPIES of a unique text's
_SAFE = 2**31  # below this number of 6-grams int32 counts cannot overflow
_SLICE = 1 << 22  # counts summed at once, so that no second table is needed for it
_BASE = 0x9E3779B97F4A7C15  # odd, so that powers never vanish mod 2^64
_BASE2 = np.uint64(_BASE * _BASE % 2**64)
_FINISH = np.uint64(0xBF58476D1CE4E5B9)
_CLASS = np.uint64(5)  # bits 36 ... 5 give the class: no bin depends on them, and the lowest bits are not mixed well
_ELSEWHERE = np.intp(0x2AAAAAAAAAAAAAA)

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Grams:
    """The counted 6-grams of n samples, sample after sample.

    Attributes:
        bins: (total,) intp, of the table; uint32 after :meth:`narrow`.
        lengths: (n,) int64, number of 6-grams of each sample.
        times: (total,) int32, number of positions of each 6-gram; None: one each.
    """

    bins: Array
    lengths: IntArray
    times: npt.NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def positions(self) -> int:
        """Number of positions that are counted."""
        return len(self.bins) if self.times is None else int(self.times.sum())

    def narrow(self) -> Grams:
        """Return the same 6-grams in half the memory."""
        return Grams(self.bins.astype(np.uint32), self.lengths, self.times)

    def take(self, selected: npt.NDArray[np.bool_]) -> Grams:
        """Return those of the samples that ``selected`` (n,) bool names."""
        keep = np.repeat(selected, self.lengths)
        return Grams(self.bins[keep], self.lengths[selected], None if self.times is None else self.times[keep])


def ngram_bins(block: TokenBlock, sampling: Sampling = SMALLEST) -> Grams:
    """Return the bins of the counted 6-grams, each of which lies within one sample.

    Without sampling there is an entry for every position; with sampling, one for each distinct 6-gram of a sample.
    """
    hashes, lengths = _hashes(block)
    times = None
    if sampling.level:
        hashes, lengths, times = _class(hashes, lengths, sampling.level)
    bins = (hashes >> np.uint64(64 - sampling.bits)).view(np.int64)
    return Grams(bins.astype(np.intp, copy=False), lengths, times)


def _hashes(block: TokenBlock) -> tuple[Words, IntArray]:
    """Hash every 6-gram within one document of a sample.

    Returns:
        (total,) finished hashes, sample after sample; (n,) number of 6-grams of each sample.
    """
    lengths = np.diff(block.offsets)
    grams = np.maximum(lengths - (GRAM - 1), 0)
    size = len(block.flat) - (GRAM - 1)
    if size <= 0:
        return np.empty(0, np.uint64), grams
    token = block.flat.view(np.uint64)
    pair = token[:-1] * np.uint64(_BASE)
    pair += token[1:]
    quad = pair[:-2] * _BASE2
    quad += pair[2:]
    six = quad[:-2] * _BASE2
    six += pair[4:]
    six ^= six >> np.uint64(32)
    six *= _FINISH
    within = np.ones(size, np.bool_)
    for distance in range(1, GRAM):  # a 6-gram that starts in a sample's last 5 positions runs into the next sample
        starts = block.offsets[1:-1] - distance
        within[starts[(starts >= 0) & (starts < size)]] = False
    breaks = np.flatnonzero(block.flat == BREAK)
    if len(breaks):
        for distance in range(GRAM):
            starts = breaks - distance
            within[starts[(starts >= 0) & (starts < size)]] = False
        of_sample = np.searchsorted(block.offsets, np.flatnonzero(within), "right") - 1
        grams = np.bincount(of_sample, minlength=len(lengths))
    return six[within], grams


def _class(hashes: Words, lengths: IntArray, level: int) -> tuple[Words, IntArray, npt.NDArray[np.int32]]:
    """Select the distinct 6-grams of one class in 2^level; of samples with fewer than ``FLOOR`` of these, their smallest hashes.

    Returns:
        hashes (kept,), sample after sample; the number for each sample, (n,); the times each occurs in its sample, (kept,) int32.
    """
    key = (hashes >> _CLASS).astype(np.uint32)
    ends = np.cumsum(lengths)
    position = np.flatnonzero(key < np.uint32(1 << (32 - level)))
    sample, position, times = _distinct(key, ends, position)
    found = np.bincount(sample, minlength=len(lengths))
    parts, short = [(sample, position, times)], (found < FLOOR) & (lengths > found)
    # Most samples that are short have enough in a class 8 times as large; for the rest take all 6-grams.
    for wider in (max(level - 3, 0), 0):
        if not short.any():
            break
        candidates = np.flatnonzero(np.repeat(short, lengths))
        candidates = candidates[key[candidates] <= np.uint32(2 ** (32 - wider) - 1)]
        sample, position, times = _distinct(key, ends, candidates)
        found = np.bincount(sample, minlength=len(lengths))
        done = short & (found >= FLOOR) if wider else short
        rank = np.arange(len(sample)) - (np.cumsum(found) - found)[sample]
        parts = [tuple(column[~done[part[0]]] for column in part) for part in parts]  # type: ignore[misc]
        taken = done[sample] & (rank < FLOOR)
        parts.append((sample[taken], position[taken], times[taken]))
        short &= ~done
    sample, position, times = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.argsort(sample, kind="stable")
    return hashes[position[order]], np.bincount(sample, minlength=len(lengths)), times[order].astype(np.int32)


def _distinct(key: npt.NDArray[np.uint32], ends: IntArray, position: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Find the first of every distinct 6-gram of every sample among the positions ``position``.

    Returns:
        (sample, position, times) of each, ordered by sample and key.
    """
    sample = np.searchsorted(ends, position, "right")
    combined = sample.astype(np.uint64) << np.uint64(32) | key[position]
    _, first, times = np.unique(combined, return_index=True, return_counts=True)
    return sample[first], position[first], times


class NgramCounts:
    """6-gram counts of the window: this rank's samples are added block by block, then summed once over the ranks.

    Several threads may add and subtract at a time; integers add up to the same in any order.

    Args:
        sampling: which 6-grams are counted; the same on all ranks.
        known: (2^bits,) integers, counts of the previous window over all ranks; not modified.

    Attributes:
        total: (2^bits,) int32 over all ranks after :meth:`reduce`, int64 if the window has 2^31 6-grams or more.
    """

    def __init__(self, sampling: Sampling = SMALLEST, known: Array | None = None) -> None:
        self.sampling, self._known = sampling, known
        self.counts: Array = np.zeros(1 << sampling.bits, np.int32)
        self.total: Array = np.zeros(0, np.int32)
        self._counted = 0
        self._lock = threading.Lock()

    def add(self, part: TokenBlock | Grams) -> None:
        """Add the 6-grams of samples of the window."""
        self._count(self.grams(part), 1)

    def drop(self, part: TokenBlock | Grams) -> None:
        """Subtract the 6-grams of samples that have left the window from the counts ``known``."""
        self._count(self.grams(part), -1)

    def grams(self, part: TokenBlock | Grams) -> Grams:
        """Return the 6-grams that are counted of some samples."""
        return part if isinstance(part, Grams) else ngram_bins(part, self.sampling)

    def _count(self, grams: Grams, sign: int) -> None:
        with self._lock:
            self._counted += grams.positions
            if self._counted >= _SAFE:
                self.counts = self.counts.astype(np.int64, copy=False)
            dtype = self.counts.dtype.type  # adding the table's own type is NumPy's fast path
            np.add.at(self.counts, grams.bins, dtype(sign) if grams.times is None else grams.times.astype(dtype) * dtype(sign))

    def reduce(self, allreduce: Allreduce) -> None:
        """Sum the counts over all ranks (collective)."""
        known = 0 if self._known is None else int(self._known.sum(dtype=np.int64))
        counted = int(allreduce(np.array([self._counted], np.int64))[0])
        counts = self.counts.astype(np.int32 if known + counted < _SAFE else np.int64, copy=False)
        for start in range(0, len(counts), _SLICE):
            part = slice(start, start + _SLICE)
            counts[part] = allreduce(counts[part])
            if self._known is not None:
                counts[part] += self._known[part].astype(counts.dtype, copy=False)
        self.counts, self.total = counts[:0], counts

    def degree(self, part: TokenBlock | Grams) -> npt.NDArray[np.float64]:
        """Return the number of copies in the window beyond the sample itself, (n,) float64; 0 for samples without a 6-gram."""
        grams = self.grams(part)
        return self._quantile(grams.bins, grams, minus=1)

    def tried(self, part: TokenBlock | Grams) -> npt.NDArray[np.float64]:
        """Return the chances 1 / (1 + density) of new texts, (m, 2) float64: present once, and present ``COPIES`` times.

        A new text has the 6-grams of a sample, moved to other bins; there is one for each of the m samples with a 6-gram.  The
        correct values are 1 and 1 / ``COPIES``; a table that is too full gives both nearly the same.
        """
        grams = self.grams(part)
        elsewhere = grams.bins ^ (_ELSEWHERE & np.intp((1 << self.sampling.bits) - 1))
        once = self._quantile(elsewhere, grams, minus=0)
        once = once[grams.lengths > 0]
        return np.stack([1 / (1 + once), 1 / (COPIES + once)], 1)

    def _quantile(self, bins: Array, grams: Grams, minus: int) -> npt.NDArray[np.float64]:
        """Return the quantile of the counts of ``bins``, grouped as in ``grams``; not interpolated if 6-grams are sampled."""
        found = np.minimum(self.total[bins], SATURATION).astype(np.int32, copy=False)
        return row_quantile(found, grams.lengths, QUANTILE, minus, between=grams.times is None)


def row_quantile(
    values: npt.NDArray[np.int32], lengths: IntArray, q: float, minus: int, between: bool = True
) -> npt.NDArray[np.float64]:
    """Return the q-quantile of each row of ``values``, minus a constant; 0 for empty rows.

    Args:
        values: (total,) int32, at least 0, row after row.
        lengths: (n,) int64, values of each row.
        q: the quantile, in [0, 1].
        minus: subtracted from the quantile of every row that is not empty.
        between: interpolate linearly between two values; False: take the lower one.
    """
    quantiles = np.zeros(len(lengths))
    filled = np.flatnonzero(lengths)
    if not len(filled):
        return quantiles
    sizes = lengths[filled]
    rank = q * (sizes - 1)
    low = np.floor(rank).astype(np.int64)
    high = np.minimum(low + 1, sizes - 1)
    if (sizes == sizes[0]).all():  # rows of one length, the usual case: select instead of sorting
        table = np.partition(values.reshape(len(sizes), sizes[0]), (low[0], high[0]), axis=1)
        a, b = table[:, low[0]], table[:, high[0]]
    else:
        row = np.repeat(np.arange(len(sizes)), sizes)
        ordered = np.sort((row << 32) | values) & 0xFFFFFFFF
        first = np.cumsum(sizes) - sizes
        a, b = ordered[first + low], ordered[first + high]
    lower, upper = a.astype(np.float64), b.astype(np.float64)
    quantiles[filled] = lower + (rank - low) * between * (upper - lower) - minus
    return quantiles
