"""Round rows to a fixed grid, so that the similarities of the k-NN graph are exact and independent of rounding.

Multiples of 2**-25 have products that are multiples of 2**-50; sums of them below 4 are exact in float64 in any order of
addition.  float32 holds every such multiple up to 1, so the grid needs no extra memory.
"""

from __future__ import annotations

import numpy as np

from grace_ds.records import FloatArray

ROW_GRID = float(1 << 25)
_BLOCK = 1 << 18  # numbers processed at a time: 1 MiB, which fits the cache


def on_grid(X: FloatArray) -> FloatArray:
    """Return ``X`` (n, d) float32 rounded to multiples of 2**-25, with one bit pattern per number (no -0).

    ``X`` itself is returned if it is contiguous and on the grid already.  So the code that makes rows for the graph rounds them
    once, and no copy is made afterwards.
    """
    X = np.ascontiguousarray(X, np.float32)
    flat, result = X.reshape(-1), None
    for start in range(0, flat.size, _BLOCK):
        part = flat[start : start + _BLOCK]
        rounded = part * np.float32(ROW_GRID)
        np.rint(rounded, out=rounded)
        rounded *= np.float32(1 / ROW_GRID)
        rounded += np.float32(0)  # -0 + 0 is 0
        if result is None and not np.array_equal(rounded.view(np.uint32), part.view(np.uint32)):
            result = flat.copy()
        if result is not None:
            result[start : start + _BLOCK] = rounded
    return X if result is None else result.reshape(X.shape)
