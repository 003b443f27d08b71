"""From signals to one unnormalised log-probability a sample: filters multiply, copies share, a tilt leans.

    log p = log keep + log align_keep + log(.3 + loss_rank) - log(1 + density), a part that is None being left out.

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
LOSS_BASE = 0.3  # a sample of the lowest loss keeps 0.3 / 1.3 of the highest's chance


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


def combine(
    keep: Array | None,
    density: Array | None,
    loss_rank: Array | None,
    align_keep: Array | None,
    n: int | None = None,
) -> Float64Array:
    """The unnormalised log-probabilities that a coreset is drawn with.

    Args:
        keep: (n,) pass of the trusted filter, in (0, 1].
        density: (n,) copies in the pool beyond the sample itself, at least 0.
        loss_rank: (n,) in [0, 1], from :func:`rank01`.
        align_keep: (n,) pass of the gradient filter, in (0, 1].
        n: number of samples; needed only where all parts may be None, which gives zeros (all alike).

    Returns:
        (n,) float64, each row from its own numbers alone.

    Raises:
        ValueError: there is neither a part nor ``n``, or they differ in length.
    """
    parts: list[Any] = []
    for passed in (keep, align_keep):
        if passed is not None:
            parts.append(array_namespace(passed).log(_double(passed)))
    if loss_rank is not None:
        parts.append(array_namespace(loss_rank).log(LOSS_BASE + _double(loss_rank)))
    if density is not None:
        parts.append(-array_namespace(density).log(1.0 + _double(density)))
    sizes = [part.shape[0] for part in parts] + ([] if n is None else [n])
    if len(set(sizes)) != 1:
        raise ValueError(f"combine needs parts of one length, or n; got lengths {sizes}")
    if not parts:
        return np.zeros(sizes[0])
    total: Float64Array = sum(parts[1:], parts[0])
    return total
