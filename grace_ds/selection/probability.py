"""From signals to one unnormalised log-probability a sample: filters multiply, copies share, a tilt leans.

    log p = log keep + log align_keep + log(.3 + loss_rank) - log(1 + density), a part that is None being left out.

Threshold hard, then sample: top-k of the same score, soft thresholds and uniform mixing each turned a win into little or
a loss in prototypes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from grace_ds.records import Array

Float64Array = npt.NDArray[np.float64]

FLOOR = 0.02  # what a filter leaves of a rejected sample, so that none is excluded for good
LOSS_BASE = 0.3  # a sample of the lowest loss keeps 0.3 / 1.3 of the highest's chance


def soft_pass(value: Array, cut: float, softness: float) -> Float64Array:
    """(n,) float64 in [0.02, 1]: pass of a filter, half of it at ``cut``; NaN (nothing known) passes."""
    x = np.clip((np.asarray(value, np.float64) - cut) / softness, -700.0, 700.0)  # beyond, the result is 0 or 1 anyhow
    passed = FLOOR + (1 - FLOOR) / (1.0 + np.exp(-x))
    return np.where(np.isnan(x), 1.0, passed)


def rank01(values: Array) -> Float64Array:
    """(n,) float64: ranks scaled to [0, 1], equal values sharing their mean rank; NaN, and a value alone, get 0.5."""
    values = np.asarray(values, np.float64)
    out = np.full(len(values), 0.5)
    known = np.flatnonzero(~np.isnan(values))
    if len(known) > 1:
        _, inverse, counts = np.unique(values[known], return_inverse=True, return_counts=True)
        last = np.cumsum(counts)
        mean_rank = (last - counts + last - 1) / 2.0
        out[known] = mean_rank[inverse] / (len(known) - 1)
    return out


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
    parts: list[Float64Array] = []
    for passed in (keep, align_keep):
        if passed is not None:
            parts.append(np.log(np.asarray(passed, np.float64)))
    if loss_rank is not None:
        parts.append(np.log(LOSS_BASE + np.asarray(loss_rank, np.float64)))
    if density is not None:
        parts.append(-np.log(1.0 + np.asarray(density, np.float64)))
    sizes = [len(part) for part in parts] + ([] if n is None else [n])
    if len(set(sizes)) != 1:
        raise ValueError(f"combine needs parts of one length, or n; got lengths {sizes}")
    log_p = np.zeros(sizes[0])
    for part in parts:
        log_p = log_p + part
    return log_p
