"""How a window's 6-grams are counted: the bins of the table, and the share of the 6-grams that has a place in it.

A table is right as long as its bins outnumber its 6-grams: with 1.5 bins or more a 6-gram, less than half of the 6-grams that
occur once share their bin with another (1 - e^(-1/1.5) = 0.49), so the 40th percentile over a text does not see them.  A table
that is too full adds the same to every density, and copies stop being seen.  So the table grows with the window, and where it
would grow too large only a class of all 6-grams is counted, chosen by their hash alone: the same for every text, so that copies
still meet (FracMinHash; Irber et al. 2022, doi:10.1101/2022.01.11.475838).  A sample that the class leaves too little of keeps
its least hashes (MinHash's bottom-k; Broder 1997), which copies share too.  A count-min sketch would not help: at the same
memory its d rows are each d times as full, and at the loads here the minimum over them is no better than one row's count.
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
PLENTY_BITS = 24  # a table of 64 MiB: beyond it 6-grams are left out first, while PLENTY a sample remain
MOST_BITS = 26  # a table of 256 MiB: never a larger one
BINS_A_GRAM = 1.5
PLENTY = 48  # 6-grams a sample, on average, that tell its density well
FLOOR = 4  # 6-grams that a sample keeps at the least, if it has them: of four, one may be edited and one share its bin
LOOKED_AT = 512  # samples whose lengths stand for all


@dataclass(frozen=True)
class Sampling:
    """What is counted.

    Attributes:
        bits: the table has 2^bits bins, of 4 bytes.
        level: one in 2^level of all 6-grams is counted.
    """

    bits: int = BITS
    level: int = 0

    @staticmethod
    def of(grams: int, samples: int) -> Sampling:
        """For a window of ``samples`` samples that have ``grams`` 6-grams together, over all ranks."""
        level = 0
        while _bits(grams >> level) > PLENTY_BITS and grams >> (level + 1) >= PLENTY * samples:
            level += 1
        while _bits(grams >> level) > MOST_BITS:
            level += 1
        return Sampling(max(BITS, _bits(grams >> level)), level)

    @property
    def table_bytes(self) -> int:
        """Of the counts, on every rank."""
        return 4 << self.bits


SMALLEST = Sampling()


def _bits(grams: int) -> int:
    """Of the smallest table that ``grams`` 6-grams leave enough room in."""
    return max(int(np.ceil(BINS_A_GRAM * grams)) - 1, 0).bit_length()


def agree_sampling(reader: TokenReader, ids: IntArray, allreduce: Allreduce) -> Sampling:
    """The sampling for a window of which this rank holds the samples ``ids`` (n,).  Collective.

    A window that the smallest table holds whatever its lengths are is not read.  Of another the lengths of about
    ``LOOKED_AT`` samples are, chosen by their ids alone, so that any number of ranks comes to the same.
    """
    samples = int(allreduce(np.array([len(ids)], np.int64))[0])
    longest = max(reader.max_tokens - (GRAM - 1), 0)
    if _bits(samples * longest) <= BITS:
        return SMALLEST
    looked_at = ids[some(ids, LOOKED_AT, samples)]
    grams = sum(int(np.maximum(np.diff(block.offsets) - (GRAM - 1), 0).sum()) for block in reader.blocks(looked_at))
    found, total = allreduce(np.array([len(looked_at), grams], np.int64)).tolist()
    return Sampling.of(-(-total * samples // found) if found else samples * longest, samples)


def some(ids: IntArray, wanted: int, samples: int) -> npt.NDArray[np.bool_]:
    """(n,) bool: about ``wanted`` of ``samples`` samples over all ranks, by a hash of each id and nothing else."""
    if samples <= wanted:
        return np.ones(len(ids), np.bool_)
    return np.asarray(mixed(ids) < np.uint64(wanted * 2**64 // samples), np.bool_)


def mixed(ids: IntArray) -> npt.NDArray[np.uint64]:
    """(n,) uint64, evenly spread whatever the ids are."""
    code: Array = ids.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.asarray((code ^ (code >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9), np.uint64)
