"""What collected alignments say of every sample of the window, in the trusted set's own measure.

An alignment, times its gradient's length, is the sample's influence: by how much a step on it would lower the trusted
loss, to first order.  A single one is mostly noise, and all of a window drift together as the model moves.  So they are
predicted from content statistics, and a sample is judged by where it stands among the *trusted* samples' predictions:
what drifts for all, drifts for those too.

Belongs to the refresh's own layer, beside :mod:`grace_ds.refresh.signals`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.comm.buckets import splitmix64
from grace_ds.features.content import ContentFeatures
from grace_ds.features.limits import tail_location
from grace_ds.features.quality import STATISTICS
from grace_ds.records import Array, FloatArray, IntArray, SampleRecords
from grace_ds.refresh.table import Table
from grace_ds.selection.ridge import TARGET_CLIP, Ridge, columns, design, normal_equations, weight_of

TOLERANCE = 0.1  # of the variance that is explained: an error of the fit below it is not worth more labels
LEAST_DEVIATION = 0.02  # of the trusted predictions, in trusted medians: below it they say nothing about their spread


@dataclass(frozen=True)
class ContentFit:
    """A signal of this rank's n samples, predicted from what their content tells.

    Attributes:
        ridge: the fit, equal on all ranks.
        predicted: (n,) float32, in the signal's unit.
        labels: effective number of samples over all ranks that the signal was measured of, each counted by what it is worth.
        explained: share of their variance that the other half of them predicts; 0 where it is none.
    """

    ridge: Ridge
    predicted: FloatArray
    labels: float
    explained: float


@dataclass(frozen=True)
class Influence:
    """Of this rank's n samples, in units of the trusted median at the fit of a label's basis.

    Attributes:
        fit: of the influences to content.
        centre, deviation: of the predictions for held-out trusted samples: their median, and a deviation from their lower tail.
    """

    fit: ContentFit
    centre: float
    deviation: float

    def standard(self, value: Array) -> FloatArray:
        """``value`` (n,) in deviations from the trusted samples' predictions."""
        return np.asarray((value - self.centre) / self.deviation, np.float32)


def labels(rows: SampleRecords, reference: Mapping[int, float]) -> FloatArray:
    """(n,) float32 influence of each row in units of its basis' trusted median; NaN where that is unknown or not positive."""
    out = np.full(len(rows), np.nan, np.float32)
    for version, unit in reference.items():
        if unit > 0:
            mine = rows.basis == version
            out[mine] = rows.influence[mine] * rows.norm[mine] / np.float32(unit)
    return out


def enough_labels(explained: float) -> float:
    """Labels from which on more of them would hardly improve the predictions; infinity where nothing is predicted yet.

    The expected squared error of p coefficients fitted to n labels is p sigma^2 / n above the least one (ordinary least
    squares); n is enough where that is :data:`TOLERANCE` of the variance that is explained.
    """
    if explained <= 0:
        return float("inf")
    return columns(STATISTICS + 1) * (1 - explained) / (TOLERANCE * explained)


def fit_content(comm: Comm, content: ContentFeatures, label: FloatArray, confidence: Array) -> ContentFit | None:
    """Predicts a signal of this rank's samples from all ranks' labels.  Collective; the same bits for any number of ranks.

    Args:
        content: of this rank's n samples.
        label: (n,) float32; NaN where the sample has none.
        confidence: (n,) in [0, 1], what a label is worth at its age.

    Returns:
        None where there is nothing to learn from: no statistics, or no label on any rank.
    """
    if content.statistics is None:
        return None
    rows = design(_with_density(content.statistics, content.density))
    known = np.isfinite(label)
    half = splitmix64(content.ids) & np.uint64(1) == 1  # by id: the same for any number of ranks
    weight = np.asarray(confidence)
    halves = [np.flatnonzero(known & half), np.flatnonzero(known & ~half)]
    sums = comm.allreduce(np.stack([normal_equations(rows[part], label[part], weight[part]) for part in halves]))
    ridge = Ridge.solve(sums[0] + sums[1])
    if ridge is None:
        return None
    explained = _explained(comm, sums, rows, label, halves)
    return ContentFit(ridge, ridge.predict(rows), weight_of(sums[0] + sums[1]), explained)


def predict_influence(
    comm: Comm, content: ContentFeatures, trusted: FloatArray | None, label: FloatArray, confidence: Array
) -> Influence | None:
    """Predicts the influence of this rank's samples, and where trusted samples stand.  Collective, as :func:`fit_content`.

    Args:
        trusted: (m, s) float32, statistics of held-out trusted samples, all ranks alike; None without a trusted model.
    """
    fit = fit_content(comm, content, label, confidence) if trusted is not None else None
    if fit is None or trusted is None:
        return None
    # A trusted sample is no copy of anything in the pool: density 0.
    among = fit.ridge.predict(design(_with_density(trusted, np.zeros(len(trusted), np.float32))))
    return Influence(fit, *tail_location(among, least=LEAST_DEVIATION))


def forecast(
    comm: Comm, content: ContentFeatures, table: Table[SampleRecords], old: Array, reference: Mapping[int, float]
) -> FloatArray:
    """(n,) float32: what the rows ``old`` (n,) bool of this rank's table say of the influence of each; NaN: nothing.

    Collective, as :func:`fit_content`; from content alone, since what goes along the graph has heard of the new rows.
    """
    at = np.searchsorted(content.ids, table.ids)  # a table holds samples of the window
    label = np.full(len(content.ids), np.nan, np.float32)
    label[at] = np.where(old, labels(table.rows, reference), np.nan)
    fit = fit_content(comm, content, label, np.ones(len(label)))
    return fit.predicted[at] if fit is not None else np.full(len(at), np.nan, np.float32)


def _explained(comm: Comm, sums: IntArray, rows: Array, label: FloatArray, halves: Sequence[IntArray]) -> float:
    """Share of the labels' variance that the other half of them predicts.  Collective; the same bits for any number of ranks."""
    fitted = [Ridge.solve(equations) for equations in sums]
    if fitted[0] is None or fitted[1] is None:
        return 0.0
    parts = []
    for half, other in zip(halves, (fitted[1], fitted[0]), strict=True):
        clipped = np.clip(label[half].astype(np.float64), -TARGET_CLIP, TARGET_CLIP)
        error = clipped - other.predict(rows[half])
        parts.append([len(half), *(np.rint(v * 2.0**16).astype(np.int64).sum() for v in (error**2, clipped**2, clipped))])
    n, squares, total, first = comm.allreduce(np.sum(parts, axis=0).astype(np.int64)) / np.array([1, *[2.0**16] * 3])
    variance = total - first**2 / max(n, 1)
    return max(0.0, 1 - squares / variance) if variance > 0 else 0.0


def _with_density(statistics: FloatArray, density: FloatArray) -> FloatArray:
    return np.column_stack([statistics, np.log1p(density)])
