"""A stand-in for a trusted set: the most typical samples of a draw from the pool.

Each sample is scored by a bigram model of the others; junk is unlike everything, itself included, and copies are too like
each other.  What lies between, above the median and below the top tenth, is taken.  This is a vote of the pool about
itself: it holds while good text is the majority, and knows nothing that the pool does not.
"""

from __future__ import annotations

import numpy as np

from grace_ds.records import IntArray
from grace_ds.selection.prior import held_out_statistics

LOOKED_AT = 4096  # samples that are scored
TAKEN = 384  # at most
BAND = (0.5, 0.9)  # quantiles of the score between which samples are typical
LEAST = 64  # samples below which no vote is held


def typical(flat: IntArray, offsets: IntArray) -> IntArray:
    """(m,) int64, sorted: positions of at most 384 typical ones among ``flat[offsets[i]:offsets[i + 1]]``; empty below 64.

    Samples without a bigram, or with a negative token id (no trusted sample may have one), are never among them.
    """
    negative = np.concatenate([[0], np.cumsum(flat < 0)])
    usable = np.flatnonzero((np.diff(offsets) >= 2) & (negative[offsets[1:]] == negative[offsets[:-1]]))
    if len(usable) < LEAST:
        return np.empty(0, np.int64)
    rows = [flat[offsets[i] : offsets[i + 1]] for i in usable]
    score = held_out_statistics(rows, int(flat.max()) + 1)[:, 0]
    order = usable[np.argsort(score, kind="stable")]
    band = order[int(BAND[0] * len(order)) : int(BAND[1] * len(order))]
    at = np.linspace(0, len(band) - 1, min(TAKEN, len(band))).astype(np.int64)
    chosen: IntArray = np.sort(band[np.unique(at)])
    return chosen
