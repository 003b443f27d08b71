"""Map a few samples of the window to two axes by their content.

Each sample is represented by its TF-IDF vector, with the formula of the k-NN graph (:mod:`grace_ds.features.tfidf`), but with
document frequencies of the mapped samples alone and of their first tokens only.  The axes are the two principal ones: those
that hold most of the vectors' variance.  The map shows groups that share words (a language, a kind of junk, copies of one
text).  It does not show most of the variance (``explained`` says how little of it two axes hold), so samples that lie close
together may differ.  It shows nothing of gradients, of the graph's edges or of distances beyond these axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.comm.statistics import by_lower_id, top
from grace_ds.features.content import TokenReader, content_features
from grace_ds.records import Array, FloatArray, IntArray
from grace_ds.selection.gumbel import ALONE, random_words

POINTS = 1500  # samples mapped
TOKENS = 512  # of each sample that are read
_PURPOSE = 0x3A9


@dataclass(frozen=True)
class ProjectedSamples:
    """Where samples lie.

    Attributes:
        ids: (n,) int64, sorted.
        xy: (n, 2) float32.
        explained: share of the variance of the vectors on each axis.
    """

    ids: IntArray
    xy: FloatArray
    explained: tuple[float, float]


class PCAProjection:
    """Maps a uniform draw of the window's samples; the samples are read only when the draw changes.  Local, on root.

    Args:
        dataset: the job's, map-style.
        key: of the token ids, as for :class:`~grace_ds.features.content.TokenReader`.
        dim: width of the vectors.
        seed: of the run.
    """

    def __init__(self, dataset: Any, key: str, dim: int, seed: int) -> None:
        self.reader, self.dim, self.seed = TokenReader(dataset, key, TOKENS), dim, seed
        self._last: ProjectedSamples | None = None

    def __call__(self, window: IntArray) -> ProjectedSamples:
        """Map at most ``POINTS`` of ``window`` (n,) int64, sorted: a hash of the ids picks the same samples in every version."""
        ids = window[mapped(ALONE, self.seed, window)]
        if self._last is None or not np.array_equal(self._last.ids, ids):
            features = content_features(
                self.reader, ids, dim=self.dim, seed=self.seed, allreduce=lambda counts: counts, want_density=False
            )
            assert features.vectors is not None  # they are computed by default
            self._last = ProjectedSamples(ids, *principal(features.vectors))
        return self._last


def mapped(comm: Comm, seed: int, ids: IntArray) -> Array:
    """Return which of this rank's samples ``ids`` (n,) are on the map: ``POINTS`` of all ranks', (n,) bool.  Collective."""
    return top(comm, POINTS, ~random_words(seed, 0, _PURPOSE, ids), by_lower_id(ids))


def principal(vectors: FloatArray) -> tuple[FloatArray, tuple[float, float]]:
    """Return vectors (n, d) on their two principal axes, (n, 2) float32, and the share of their variance on each axis.

    The sign of each axis makes its largest coordinate positive, so that the same vectors give the same map.
    """
    centred = vectors.astype(np.float64) - vectors.mean(0, dtype=np.float64)
    values, axes = np.linalg.eigh(centred.T @ centred)
    two = axes[:, -1:-3:-1]
    xy = centred @ two
    if len(xy):
        xy *= np.where(np.take_along_axis(xy, np.abs(xy).argmax(0)[None], 0) < 0, -1.0, 1.0)
    total = float(values.sum())
    first, second = (float(value) / total if total > 0 else 0.0 for value in values[-1:-3:-1])
    return xy.astype(np.float32), (first, second)
