"""Turn a signal into a factor of a sample's importance: filters, ranks, shares.

Threshold hard, then sample: in prototypes, top-k of the same score, soft thresholds and uniform mixing each reduced a gain
or turned it into a loss.  Written on the array API: NumPy, torch and CuPy arrays are accepted on their own device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from array_api_compat import array_namespace

from grace_ds.records import Array

Float64Array = npt.NDArray[np.float64]

FLOOR = 0.02  # factor of a rejected sample, so that none is excluded permanently
SPARSE = 0.25  # quantile of the graph's density at which a sample keeps a quarter of its chance


def soft_pass(value: Array, cut: float, softness: float) -> Float64Array:
    """Return the pass of a filter, (n,) float64 in [0.02, 1], near a half at ``cut``; NaN (unknown) passes."""
    xp = array_namespace(value)
    x = xp.clip((_double(value) - cut) / softness, -700.0, 700.0)  # beyond these limits the sigmoid is 0 or 1
    passed = FLOOR + (1 - FLOOR) / (1.0 + xp.exp(-x))
    result: Float64Array = xp.where(xp.isnan(x), 1.0, passed)
    return result


def rank01(values: Array) -> Float64Array:
    """Return ranks scaled to [0, 1], (n,) float64; equal values share their mean rank; NaN, and a single value, get 0.5."""
    xp = array_namespace(values)
    values = _double(values)
    known = xp.nonzero(~xp.isnan(values))[0]
    ranks = xp.full_like(values, 0.5)
    if known.shape[0] > 1:
        known_values = values[known]
        ordered = xp.sort(known_values)
        ends = xp.searchsorted(ordered, known_values, side="left") + xp.searchsorted(ordered, known_values, side="right") - 1
        ranks[known] = _double(ends) / 2.0 / (known.shape[0] - 1)
    result: Float64Array = ranks
    return result


def _double(x: Array) -> Any:
    xp = array_namespace(x)
    return xp.astype(x, xp.float64, copy=False)


def shared(copies: Array) -> Float64Array:
    """Return 1 / (1 + copies), (n,) float64 in (0, 1]: all copies of a text together are as likely as one unique text."""
    result: Float64Array = 1.0 / (1.0 + _double(copies))
    return result


def uncrowded(crowding: Array, sparse: float) -> Float64Array:
    """Return (c / (c + crowding))², (n,) float64 in (0, 1]; NaN (unknown) counts as 0.

    Relative to the window itself it depends neither on the number of neighbours nor on the width of the vectors.

    Args:
        crowding: (n,) density of the graph at each sample.
        sparse: c, the :data:`SPARSE` quantile of the window's; 0: nobody is crowded.
    """
    xp = array_namespace(crowding)
    x = _double(crowding)
    result: Float64Array = xp.square(sparse / (sparse + xp.where(xp.isnan(x), 0.0, x))) if sparse > 0 else xp.ones_like(x)
    return result


def any_known(values: Array) -> bool:
    """Return whether any of ``values`` (n,) is finite."""
    xp = array_namespace(values)
    return bool(xp.any(xp.isfinite(values)))
