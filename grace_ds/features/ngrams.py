"""Choose how a window's 6-grams are counted: the size of the table, and the share of the 6-grams that it counts.

A table works as long as its bins outnumber its 6-grams.  With 1.5 bins or more per 6-gram, less than half of the 6-grams that
occur once share their bin with another (1 - e^(-1/1.5) = 0.49), so the 40th percentile over a text ignores them.  A table
that is too full adds the same to every density, and copies are no longer recognised.  So the table grows with the window.  If
it would grow too large, only a class of all 6-grams is counted, chosen by their hash alone: the same for every text, so that
copies still match (FracMinHash; Irber et al. 2022, doi:10.1101/2022.01.11.475838).  A sample with too few 6-grams in the class
keeps its smallest hashes (MinHash's bottom-k; Broder 1997), which copies share too.  A count-min sketch would not help: at the
same memory its d rows are each d times as full, and at the loads here the minimum over them is no better than one row's count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from grace_ds.data.tokens import TokenReader
from grace_ds.records import Array, IntArray

Allreduce = Callable[[Array], Array]  # sums an array over the ranks, element by element
GRAM = 6
BITS = 22  # of the smallest table: 16 MiB
PLENTY_BITS = 24  # a table of 64 MiB: before it grows beyond, 6-grams are left out while PLENTY per sample remain
MOST_BITS = 26  # the largest table: 256 MiB
BINS_A_GRAM = 1.5
PLENTY = 48  # 6-grams per sample, on average, that are enough to estimate its density
FLOOR = 4  # minimum 6-grams kept per sample, if it has them: of four, one may be edited and one share its bin
LOOKED_AT = 512  # samples whose lengths are read to estimate the total


@dataclass(frozen=True)
class Sampling:
    """Size of the table, and the share of 6-grams that it counts.

    Attributes:
        bits: the table has 2^bits bins, of 4 bytes.
        level: one in 2^level of all 6-grams is counted.
    """

    bits: int = BITS
    level: int = 0

    @staticmethod
    def of(grams: int, samples: int) -> Sampling:
        """Choose for a window of ``samples`` samples that have ``grams`` 6-grams in total, over all ranks."""
        level = 0
        while _bits(grams >> level) > PLENTY_BITS and grams >> (level + 1) >= PLENTY * samples:
            level += 1
        while _bits(grams >> level) > MOST_BITS:
            level += 1
        return Sampling(max(BITS, _bits(grams >> level)), level)

    @property
    def table_bytes(self) -> int:
        """Bytes of the counts, on every rank."""
        return 4 << self.bits


SMALLEST = Sampling()


def _bits(grams: int) -> int:
    """Return the bits of the smallest table that is large enough for ``grams`` 6-grams."""
    return max(int(np.ceil(BINS_A_GRAM * grams)) - 1, 0).bit_length()


def agree_sampling(reader: TokenReader, ids: IntArray, allreduce: Allreduce, samples: int = 0) -> Sampling:
    """Choose the sampling for a window of which this rank holds the samples ``ids`` (n,).  Collective.

    A window that fits the smallest table for any lengths is not read.  Otherwise the lengths of about ``LOOKED_AT`` samples
    are read; they are chosen by their ids alone, so that any number of ranks gets the same result.

    Args:
        reader: of the dataset.
        ids: this rank's samples, or those of them whose lengths are to be read.
        allreduce: sums an int64 array over the ranks.
        samples: of the window; 0: those of ``ids`` over all ranks.
    """
    samples = samples or int(allreduce(np.array([len(ids)], np.int64))[0])
    longest = max(reader.max_tokens - (GRAM - 1), 0)
    if _bits(samples * longest) <= BITS:
        return SMALLEST
    looked_at = ids[some(ids, LOOKED_AT, samples)]
    grams = sum(int(np.maximum(np.diff(block.offsets) - (GRAM - 1), 0).sum()) for block in reader.blocks(looked_at))
    found, total = allreduce(np.array([len(looked_at), grams], np.int64)).tolist()
    return Sampling.of(-(-total * samples // found) if found else samples * longest, samples)


def some(ids: IntArray, wanted: int, samples: int) -> npt.NDArray[np.bool_]:
    """Select about ``wanted`` of ``samples`` samples over all ranks by a hash of each id alone; return (n,) bool."""
    if samples <= wanted:
        return np.ones(len(ids), np.bool_)
    return np.asarray(mixed(ids) < np.uint64(wanted * 2**64 // samples), np.bool_)


def mixed(ids: IntArray) -> npt.NDArray[np.uint64]:
    """Return hashes of the ids, (n,) uint64, evenly spread for any ids."""
    code: Array = ids.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.asarray((code ^ (code >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9), np.uint64)
