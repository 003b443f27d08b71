"""Rows on a fixed grid, so that the similarities of the k-NN graph are exact numbers and not a matter of rounding.

Multiples of 2**-25 have products that are multiples of 2**-50; sums of them below 4 are exact in float64 in whatever order
a library adds them up.  float32 holds every such multiple up to 1, so nothing is spent on it.
"""

from __future__ import annotations

import numpy as np

from grace_ds.records import FloatArray

ROW_GRID = float(1 << 25)
_BLOCK = 1 << 18  # numbers at a time: 1 MiB, which stays in the cache


def on_grid(X: FloatArray) -> FloatArray:
    """``X`` (n, d) float32 rounded to multiples of 2**-25, equal numbers in equal bits (no -0).

    ``X`` itself where it is on the grid already and contiguous: whoever makes rows for the graph rounds them once, and no
    copy is made afterwards.
    """
    X = np.ascontiguousarray(X, np.float32)
    flat, out = X.reshape(-1), None
    for lo in range(0, flat.size, _BLOCK):
        part = flat[lo : lo + _BLOCK]
        rounded = part * np.float32(ROW_GRID)
        np.rint(rounded, out=rounded)
        rounded *= np.float32(1 / ROW_GRID)
        rounded += np.float32(0)  # -0 + 0 is 0
        if out is None and not np.array_equal(rounded.view(np.uint32), part.view(np.uint32)):
            out = flat.copy()
        if out is not None:
            out[lo : lo + _BLOCK] = rounded
    return X if out is None else out.reshape(X.shape)
