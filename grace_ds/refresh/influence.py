"""Predict the influence of every sample of the window from collected alignments, on the scale of the trusted set.

An alignment, times its gradient's length, is the sample's influence: by how much a step on it would lower the trusted
loss, to first order.  A single influence is mostly noise, and all influences of a window drift together as the model
changes.  So they are predicted from content statistics, and a sample is judged by its position among the predictions for
*trusted* samples, which drift in the same way.

Belongs to the refresh's own layer, like :mod:`grace_ds.refresh.signals`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.features.content import ContentFeatures
from grace_ds.features.limits import tail_location
from grace_ds.features.quality import STATISTICS
from grace_ds.records import Array, FloatArray, IntArray, SampleRecords
from grace_ds.refresh.table import Table
from grace_ds.selection.ridge import TARGET_CLIP, Ridge, columns, design, normal_equations, weight_of
from grace_ds.utils.hashing import splitmix64

TOLERANCE = 0.1  # of the explained variance: a smaller error of the fit does not justify more labels
LEAST_DEVIATION = 0.02  # of the trusted predictions, in trusted medians: smaller deviations are not meaningful


@dataclass(frozen=True)
class ContentFit:
    """A signal of this rank's n samples, predicted from their content.

    Attributes:
        ridge: the fit, equal on all ranks.
        predicted: (n,) float32, in the signal's unit.
        labels: effective number of measured samples over all ranks: the sum of their confidences.
        explained: share of the labels' variance that a fit to the other half of them predicts; 0 if it predicts nothing.
    """

    ridge: Ridge
    predicted: FloatArray
    labels: float
    explained: float


@dataclass(frozen=True)
class Influence:
    """Predicted influence of this rank's n samples, in units of the trusted median at the fit of a label's basis.

    Attributes:
        fit: of the influences to content.
        centre, deviation: of the predictions for held-out trusted samples: their median, and a deviation from their lower tail.
    """

    fit: ContentFit
    centre: float
    deviation: float

    def standard(self, value: Array) -> FloatArray:
        """Return ``value`` (n,) in deviations from the trusted samples' predictions: (n,) float32."""
        return np.asarray((value - self.centre) / self.deviation, np.float32)


def labels(rows: SampleRecords, reference: Mapping[int, float]) -> FloatArray:
    """Return the influence of each row in units of its basis' trusted median: (n,) float32.

    Args:
        rows: n collected rows.
        reference: basis version → trusted median.

    Returns:
        NaN for rows whose median is unknown or not positive.
    """
    out = np.full(len(rows), np.nan, np.float32)
    for version, unit in reference.items():
        if unit > 0:
            of_basis = rows.basis == version
            out[of_basis] = rows.influence[of_basis] * rows.norm[of_basis] / np.float32(unit)
    return out


def enough_labels(explained: float) -> float:
    """Return the number of labels beyond which the predictions hardly improve; infinity while nothing is predicted.

    The expected squared error of p coefficients fitted to n labels is p sigma^2 / n above the smallest possible one (ordinary
    least squares); n is enough if that is :data:`TOLERANCE` of the explained variance.

    Args:
        explained: share of the labels' variance that is explained.
    """
    if explained <= 0:
        return float("inf")
    return columns(STATISTICS + 1) * (1 - explained) / (TOLERANCE * explained)


def fit_content(comm: Comm, content: ContentFeatures, label: FloatArray, confidence: Array) -> ContentFit | None:
    """Predict a signal of this rank's samples from all ranks' labels.  Collective; the same bits for any number of ranks.

    Args:
        content: of this rank's n samples.
        label: (n,) float32; NaN if the sample has none.
        confidence: (n,) in [0, 1], weight of a label at its age.

    Returns:
        None if there is nothing to learn from: no statistics, or no label on any rank.
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
    """Predict the influence of this rank's samples and of trusted ones.  Collective, as :func:`fit_content`.

    Args:
        trusted: (m, s) float32, statistics of held-out trusted samples, equal on all ranks; None without a trusted model.

    Returns:
        None without a trusted model, or if there is nothing to learn from.
    """
    fit = fit_content(comm, content, label, confidence) if trusted is not None else None
    if fit is None or trusted is None:
        return None
    # A trusted sample is no copy of a sample in the pool: density 0.
    predictions = fit.ridge.predict(design(_with_density(trusted, np.zeros(len(trusted), np.float32))))
    return Influence(fit, *tail_location(predictions, least=LEAST_DEVIATION))


def forecast(
    comm: Comm, content: ContentFeatures, table: Table[SampleRecords], old: Array, reference: Mapping[int, float]
) -> FloatArray:
    """Predict the influence of each sample of this rank's table from its old rows only.  Collective, as :func:`fit_content`.

    Content is the only predictor, because values spread along the graph already contain the new rows.

    Args:
        content: of this rank's samples of the window.
        old: (n,) bool, rows of ``table`` to predict from.

    Returns:
        (n,) float32; NaN if nothing can be predicted.
    """
    position = np.searchsorted(content.ids, table.ids)  # a table holds samples of the window
    label = np.full(len(content.ids), np.nan, np.float32)
    label[position] = np.where(old, labels(table.rows, reference), np.nan)
    fit = fit_content(comm, content, label, np.ones(len(label)))
    return fit.predicted[position] if fit is not None else np.full(len(position), np.nan, np.float32)


def _explained(comm: Comm, sums: IntArray, rows: Array, label: FloatArray, halves: Sequence[IntArray]) -> float:
    """Return the share of the labels' variance that a fit to their other half predicts.

    Collective; the same bits for any number of ranks.
    """
    fitted = [Ridge.solve(equations) for equations in sums]
    if fitted[0] is None or fitted[1] is None:
        return 0.0
    parts = []
    for half, other in zip(halves, (fitted[1], fitted[0]), strict=True):
        clipped = np.clip(label[half].astype(np.float64), -TARGET_CLIP, TARGET_CLIP)
        error = clipped - other.predict(rows[half])
        parts.append(
            [len(half), *(np.rint(values * 2.0**16).astype(np.int64).sum() for values in (error**2, clipped**2, clipped))]
        )
    n, squares, total, first = comm.allreduce(np.sum(parts, axis=0).astype(np.int64)) / np.array([1, *[2.0**16] * 3])
    variance = total - first**2 / max(n, 1)
    return max(0.0, 1 - squares / variance) if variance > 0 else 0.0


def _with_density(statistics: FloatArray, density: FloatArray) -> FloatArray:
    return np.column_stack([statistics, np.log1p(density)])
