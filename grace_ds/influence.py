"""What harvested alignments say of every sample of the window, in the trusted set's own measure.

An alignment, times its gradient's length, is the sample's influence: by how much a step on it would lower the trusted
loss, to first order.  A single one is mostly noise, and all of a window drift together as the model moves.  So they are
predicted from content statistics, and a sample is judged by where it stands among the *trusted* samples' predictions:
what drifts for all, drifts for those too.

Belongs to the refresh's own layer, beside :mod:`grace_ds.signals`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.features import ContentFeatures
from grace_ds.records import Array, FloatArray, Rows
from grace_ds.selection.limits import tail_location
from grace_ds.selection.ridge import Ridge, design, normal_equations

LEAST_DEVIATION = 0.02  # of the trusted predictions, in trusted medians: below it they say nothing about their spread


@dataclass(frozen=True)
class Influence:
    """Of this rank's n samples, in units of the trusted median at the fit of a label's basis.

    Attributes:
        label: (n,) float32, of the sample's own harvest; NaN where there is none.
        predicted: (n,) float32, from content.
        centre, deviation: of the predictions for held-out trusted samples: their median, and a deviation from their lower tail.
    """

    label: FloatArray
    predicted: FloatArray
    centre: float
    deviation: float

    def standard(self, value: Array) -> FloatArray:
        """``value`` (n,) in deviations from the trusted samples' predictions."""
        return np.asarray((value - self.centre) / self.deviation, np.float32)


def labels(rows: Rows, reference: Mapping[int, float]) -> FloatArray:
    """(n,) float32 influence of each row in units of its basis' trusted median; NaN where that is unknown or not positive."""
    out = np.full(len(rows), np.nan, np.float32)
    for version, unit in reference.items():
        if unit > 0:
            mine = rows.basis == version
            out[mine] = rows.align[mine] * rows.norm[mine] / np.float32(unit)
    return out


def influence(
    comm: Comm, content: ContentFeatures, trusted: FloatArray | None, label: FloatArray, confidence: Array
) -> Influence | None:
    """Predicts the influence of this rank's samples from all ranks' labels.  Collective; the same bits for any number of ranks.

    Args:
        content: of this rank's n samples.
        trusted: (m, s) float32, statistics of held-out trusted samples, all ranks alike.
        label: (n,) float32; NaN where the sample has none.
        confidence: (n,) in [0, 1], what a label is worth at its age.

    Returns:
        None where there is nothing to learn from: no statistics, or no label on any rank.
    """
    if content.statistics is None or trusted is None:
        return None
    rows = design(_with_density(content.statistics, content.density))
    known = np.isfinite(label)
    ridge = Ridge.solve(comm.allreduce(normal_equations(rows[known], label[known], np.asarray(confidence)[known])))
    if ridge is None:
        return None
    # A trusted sample is no copy of anything in the pool: density 0.
    among = ridge.predict(design(_with_density(trusted, np.zeros(len(trusted), np.float32))))
    centre, deviation = tail_location(among, least=LEAST_DEVIATION)
    return Influence(label, ridge.predict(rows), centre, deviation)


def _with_density(statistics: FloatArray, density: FloatArray) -> FloatArray:
    return np.column_stack([statistics, np.log1p(density)])
