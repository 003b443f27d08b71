"""Arms on the content graph: facility location and D2 pruning on the TF-IDF 15-NN graph, and sampling by density."""

from __future__ import annotations

import numpy as np

from benchmarks.selection.arms.base import SubsetArm, View
from grace_ds.comm.local import LocalComm
from grace_ds.features.content import ContentFeatures, TokenReader, content_features
from grace_ds.graph import backends
from grace_ds.graph.ring import nearest
from grace_ds.graph.rows import Request
from grace_ds.records import Array, IntArray, Neighbours
from grace_ds.selection.gumbel import sample_without_replacement
from grace_ds.selection.objectives import select

NEIGHBOURS, DIM = 15, 128  # the system's own defaults


def content(view: View, *, density: bool, tfidf: bool) -> ContentFeatures:
    """Content statistics of the whole pool."""
    return content_features(
        TokenReader(view.rows),
        view.ids,
        dim=DIM,
        seed=view.plan.seed,
        allreduce=lambda x: x,
        want_density=density,
        want_tfidf=tfidf,
    )


def content_graph(view: View) -> Neighbours:
    """(n, 15): each row's nearest rows by TF-IDF cosine."""
    vectors = content(view, density=False, tfidf=True).vectors
    assert vectors is not None
    return nearest(LocalComm(), Request.of(view.ids, vectors, NEIGHBOURS), backends.choose("auto", view.n))


class Facility(SubsetArm):
    """Facility location on the content graph, once (submodular data subset selection, Wei, Iyer, Bilmes, ICML 2015).

    Lazy greedy. Simplified: similarities beyond the 15 nearest count as 0.
    """

    def choose(self, version: int) -> IntArray | None:
        """The greedy cover, at the start only."""
        view = self.view
        if version:
            return None
        graph = content_graph(view)
        weights = np.zeros(view.n)
        found = select("facility_location", view.ids, weights, view.k, seed=self.plan.seed, version=0, neighbours=graph)
        return found.ids


class D2Pruning(SubsetArm):
    """D2 pruning (arXiv 2310.07931): difficulty spread along the graph, then greedy picks that push their neighbours down.

    Difficulty is the loss in one scoring pass after the first interval (uniform before, the subset is kept after it).
    Simplified: the content graph takes the place of the model's embeddings, and both temperatures are 1, not tuned.
    """

    def choose(self, version: int) -> IntArray | None:
        """The greedy picks, at the first refresh after the start."""
        if version != 1:
            return None
        difficulty = self.view.scorer.losses(self.view.rows).astype(np.float64)
        return d2_picks(difficulty, content_graph(self.view), self.view.k)


def d2_picks(difficulty: Array, graph: Neighbours, k: int) -> IntArray:
    """The k picks of D2 pruning in the order in which they are made.

    Args:
        difficulty: (n,) float64.
        graph: (n, j) neighbours, positions as ids; -1 for none.
        k: at most n.
    """
    # Of unit vectors, distance^2 = 2 - 2 cosine; a missing neighbour passes no message.
    present = graph.ids >= 0
    kernel = np.where(present, np.exp(-(2 - 2 * np.where(present, graph.similarity, 0.0).astype(np.float64))), 0.0)
    score = difficulty + (kernel * difficulty[graph.ids]).sum(axis=1)
    picks = np.empty(k, np.int64)
    for i in range(k):
        best = picks[i] = int(np.argmax(score))
        np.subtract.at(score, graph.ids[best][present[best]], kernel[best][present[best]] * score[best])
        score[best] = -np.inf
    return picks


class Density(SubsetArm):
    """Draws in proportion to 1 / (1 + copies in the pool), anew at each refresh: soft deduplication.

    As in SoftDedup (arXiv 2407.06654), which weights samples by how common their n-grams are; here by the system's own 6-gram
    density, without a trusted set or a model.
    """

    def __init__(self, view: View) -> None:
        super().__init__(view)
        self._log_p = np.empty(0)

    def choose(self, version: int) -> IntArray | None:
        """A Gumbel draw; the density is counted once."""
        view = self.view
        if not len(self._log_p):
            self._log_p = -np.log1p(content(view, density=True, tfidf=False).density.astype(np.float64))
        return sample_without_replacement(view.ids, self._log_p, view.k, self.plan.seed, version).ids
