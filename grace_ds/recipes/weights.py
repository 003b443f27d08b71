"""From a signal to a factor of a sample's importance: filters, ranks, shares.

Threshold hard, then sample: top-k of the same score, soft thresholds and uniform mixing each turned a win into little or
a loss in prototypes.  Written on the array API: NumPy, torch and CuPy arrays are taken alike, where they lie.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from array_api_compat import array_namespace

from grace_ds.records import Array

Float64Array = npt.NDArray[np.float64]

FLOOR = 0.02  # what a filter leaves of a rejected sample, so that none is excluded for good
SPARSE = 0.25  # quantile of the graph's density at which a sample keeps a quarter of its chance


def soft_pass(value: Array, cut: float, softness: float) -> Float64Array:
    """(n,) float64 in [0.02, 1]: pass of a filter, half of it at ``cut``; NaN (nothing known) passes."""
    xp = array_namespace(value)
    x = xp.clip((_double(value) - cut) / softness, -700.0, 700.0)  # beyond, the result is 0 or 1 anyhow
    passed = FLOOR + (1 - FLOOR) / (1.0 + xp.exp(-x))
    result: Float64Array = xp.where(xp.isnan(x), 1.0, passed)
    return result


def rank01(values: Array) -> Float64Array:
    """(n,) float64: ranks scaled to [0, 1], equal values sharing their mean rank; NaN, and a value alone, get 0.5."""
    xp = array_namespace(values)
    values = _double(values)
    known = xp.nonzero(~xp.isnan(values))[0]
    out = xp.full_like(values, 0.5)
    if known.shape[0] > 1:
        found = values[known]
        ordered = xp.sort(found)
        ends = xp.searchsorted(ordered, found, side="left") + xp.searchsorted(ordered, found, side="right") - 1
        out[known] = _double(ends) / 2.0 / (known.shape[0] - 1)
    result: Float64Array = out
    return result


def _double(x: Array) -> Any:
    xp = array_namespace(x)
    return xp.astype(x, xp.float64, copy=False)


def shared(copies: Array) -> Float64Array:
    """(n,) float64 in (0, 1]: 1 / (1 + copies), so that all copies of a text together are as likely as one unique text."""
    result: Float64Array = 1.0 / (1.0 + _double(copies))
    return result


def uncrowded(crowding: Array) -> Float64Array:
    """(n,) float64 in (0, 1]: (c / (c + crowding))², c the :data:`SPARSE` quantile; NaN (nothing known) is not crowded.

    Measured against the window itself, it depends neither on the number of neighbours nor on the width of the vectors.
    """
    xp = array_namespace(crowding)
    x = _double(crowding)
    known = xp.sort(x[~xp.isnan(x)])
    c = float(known[int(SPARSE * (known.shape[0] - 1))]) if known.shape[0] else 0.0
    result: Float64Array = xp.square(c / (c + xp.where(xp.isnan(x), 0.0, x))) if c > 0 else xp.ones_like(x)
    return result


def any_known(values: Array) -> bool:
    """Whether any of ``values`` (n,) is finite."""
    xp = array_namespace(values)
    return bool(xp.any(xp.isfinite(values)))
