"""How crowded a sample's neighbourhood is: hashed 6-gram counts over the pool.

A 6-gram is hashed to 64 bits by a polynomial, built by doubling (2-grams, then 4-grams, then 6-grams), and its finished
hash to one of 2^22 bins.  A sample's density is the 40th percentile over its positions of (bin's count - 1): a text of
which 40 % occurs once is unique, boilerplate around it does not matter; a copy with a few edits is as dense as its
source.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from grace_ds.features.tokens import TokenBlock
from grace_ds.records import Array, IntArray

GRAM = 6
BITS = 22
QUANTILE = 0.4
SATURATION = 1 << 30  # a density stops here: padding can repeat one 6-gram billions of times
_BASE = 0x9E3779B97F4A7C15  # odd, so that powers never vanish mod 2^64
_BASE2 = np.uint64(_BASE * _BASE % 2**64)
_FINISH = np.uint64(0xBF58476D1CE4E5B9)

Allreduce = Callable[[Array], Array]


def ngram_bins(block: TokenBlock) -> tuple[npt.NDArray[np.intp], IntArray]:
    """The bin of every 6-gram that lies within one sample.

    Returns:
        bins: (total,) intp in [0, 2^22), sample after sample; and the number of 6-grams of each sample, (n,) int64.
    """
    lengths = np.diff(block.offsets)
    grams = np.maximum(lengths - (GRAM - 1), 0)
    size = len(block.flat) - (GRAM - 1)
    if size <= 0:
        return np.empty(0, np.intp), grams
    token = block.flat.view(np.uint64)
    pair = token[:-1] * np.uint64(_BASE)
    pair += token[1:]
    quad = pair[:-2] * _BASE2
    quad += pair[2:]
    six = quad[:-2] * _BASE2
    six += pair[4:]
    six ^= six >> np.uint64(32)
    six *= _FINISH
    six >>= np.uint64(64 - BITS)
    bins = six.view(np.int64)
    within = np.ones(size, np.bool_)
    for back in range(1, GRAM):  # a 6-gram that starts in a sample's last 5 positions runs into the next sample
        starts = block.offsets[1:-1] - back
        within[starts[(starts >= 0) & (starts < size)]] = False
    return bins[within].astype(np.intp, copy=False), grams


class NgramCounts:
    """6-gram counts of the window: this rank's samples are added block by block, then summed over the ranks once.

    Args:
        less: (2^22,) integers, counts of samples of this rank that have left the window.
        known: (2^22,) int64, counts of the window over all ranks before it moved on.

    Attributes:
        total: (2^22,) int64, over all ranks, after :meth:`reduce`.
    """

    def __init__(self, less: Array | None = None, known: IntArray | None = None) -> None:
        self.counts = np.zeros(1 << BITS, np.int64)
        self.total: IntArray = np.zeros(0, np.int64)
        self._less, self._known = less, known
        self._bounded = np.zeros(0, np.int32)

    def add(self, bins: npt.NDArray[np.intp]) -> None:
        """Counts the bins of one block (see :func:`ngram_bins`)."""
        np.add.at(self.counts, bins, np.int64(1))  # a scalar of the table's own type: NumPy's fast path

    def reduce(self, allreduce: Allreduce) -> None:
        """Sums the counts over all ranks (collective)."""
        total = allreduce(self.counts if self._less is None else self.counts - self._less)
        self.total = np.asarray(total if self._known is None else total + self._known, np.int64)
        self._bounded = np.minimum(self.total, SATURATION).astype(np.int32)

    def degree(self, block: TokenBlock) -> npt.NDArray[np.float64]:
        """(n,) float64: copies in the window beyond the sample itself; 0 for samples without a 6-gram."""
        bins, grams = ngram_bins(block)
        return row_quantile(self._bounded[bins], grams, QUANTILE, minus=1)


def row_quantile(values: npt.NDArray[np.int32], lengths: IntArray, q: float, minus: int) -> npt.NDArray[np.float64]:
    """The q-quantile (interpolated linearly) of each row of ``values``, minus a constant; 0 for empty rows.

    Args:
        values: (total,) int32, at least 0, row after row.
        lengths: (n,) int64, values of each row.
        q: the quantile, in [0, 1].
        minus: taken off every quantile of a row that is not empty.
    """
    out = np.zeros(len(lengths))
    full = np.flatnonzero(lengths)
    if not len(full):
        return out
    m = lengths[full]
    place = q * (m - 1)
    low = np.floor(place).astype(np.int64)
    high = np.minimum(low + 1, m - 1)
    if (m == m[0]).all():  # rows of one length, the usual case: select instead of sorting
        table = np.partition(values.reshape(len(m), m[0]), (low[0], high[0]), axis=1)
        a, b = table[:, low[0]], table[:, high[0]]
    else:
        row = np.repeat(np.arange(len(m)), m)
        ordered = np.sort((row << 32) | values) & 0xFFFFFFFF
        first = np.cumsum(m) - m
        a, b = ordered[first + low], ordered[first + high]
    lower, upper = a.astype(np.float64), b.astype(np.float64)
    out[full] = lower + (place - low) * (upper - lower) - minus
    return out
