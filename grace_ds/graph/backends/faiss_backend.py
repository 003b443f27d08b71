"""Search with faiss: exact below 100,000 rows; above, a compressed scan (and lists, if they help) tuned to the recall.

Real text has little cluster structure: an inverted file alone had to probe 711 of 1,024 lists of 100,000 projected TF-IDF
rows for a recall of .99 and was five times slower than the exact search.  So it is the codes that save work: 4-bit product
quantisation scanned in registers (André, Kermarrec, Le Scouarnec 2015), and the best candidates compared again in float32.
An inverted file goes in front of it only if an eighth of its lists is enough.  The recall is measured, not assumed: on a
sample of the real queries against an exact search.  Every choice depends on the data alone, never on a clock.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from grace_ds.graph.backends import FLAT_ROWS
from grace_ds.records import FloatArray, IntArray

log = logging.getLogger(__name__)

SAMPLE_QUERIES = 500  # standard error of a recall of .99 on 500 x k neighbours: below .001
TRAIN_ROWS = 40  # per centroid: k-means in faiss warns below 39 and gains little above
QUERY_BLOCK = 8_192  # bounds what faiss holds at once: 64 times k candidates of 12 bytes per query
LIST_SHARE = 8  # an inverted file that must probe more than an eighth of its lists is slower than scanning all codes
LIST_CANDIDATES = 32  # candidates behind an inverted file, in multiples of k
CANDIDATES = (4, 8, 16, 32, 64)  # candidates of a scan of all codes, in multiples of k


@dataclass(frozen=True)
class Tuned:
    """An approximate structure and the effort that reaches the recall.

    Attributes:
        nlist: lists of the inverted file; 0: none, all codes are scanned.
        nprobe: number of lists searched.
        candidates: number of rows compared again in float32, in multiples of k.
        recall: measured on the sample.
    """

    nlist: int
    nprobe: int
    candidates: int
    recall: float

    def build(self, X: FloatArray) -> Any:
        """Return the faiss index of ``X`` (m, d) float32, ready to be searched."""
        core = _structure(X, self.nlist)
        _set_effort(core, self.nprobe, self.candidates)
        return core


@dataclass
class FaissIndex:
    """An index with the ids of its rows.

    Attributes:
        core: the faiss index; None until the first search has chosen it.
        X: (m, d) float32, the rows.
        ids: (m,) int64.
        tuned: the chosen settings; None for an exact search.
    """

    core: Any
    X: FloatArray
    ids: IntArray
    tuned: Tuned | None = None


class FaissBackend:
    """``IndexFlatIP`` below :data:`~grace_ds.graph.backends.FLAT_ROWS`, else the index that reaches the recall with least work.

    Args:
        recall: share of the true k nearest that a search must find on average, in (0, 1].
    """

    name = "faiss"

    def __init__(self, recall: float) -> None:
        self.recall = recall

    def build(self, X: FloatArray, ids: IntArray) -> FaissIndex:
        """See :class:`grace_ds.graph.backends.Backend`."""
        X = np.ascontiguousarray(X, np.float32)
        return FaissIndex(_flat(X) if self.is_exact(len(X)) else None, X, ids)

    def is_exact(self, rows: int) -> bool:
        """Return whether there are fewer rows than :data:`~grace_ds.graph.backends.FLAT_ROWS`, or the recall must be 1."""
        return rows < FLAT_ROWS or self.recall >= 1.0

    def search(self, index: FaissIndex, Q: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
        """See :class:`grace_ds.graph.backends.Backend`; the first search of a large index tunes it on its own queries."""
        out_ids = np.full((len(Q), k), -1, np.int64)
        out_similarity = np.full((len(Q), k), -np.inf, np.float32)
        kept = min(k, len(index.ids))
        if not kept or not len(Q):
            return out_ids, out_similarity
        Q = np.ascontiguousarray(Q, np.float32)
        if index.core is None:
            index.core, index.tuned = self.tune(index.X, Q, kept)
        for lo in range(0, len(Q), QUERY_BLOCK):
            similarity, position = index.core.search(Q[lo : lo + QUERY_BLOCK], kept)
            found = position >= 0  # faiss pads by -1 and the lowest float when the probed lists hold fewer than k rows
            out_ids[lo : lo + QUERY_BLOCK, :kept] = np.where(found, index.ids[position], -1)
            out_similarity[lo : lo + QUERY_BLOCK, :kept] = np.where(found, similarity, -np.inf)
        return out_ids, out_similarity

    def tune(self, X: FloatArray, Q: FloatArray, k: int) -> tuple[Any, Tuned | None]:
        """Choose the faiss index of ``X`` that reaches the recall on a sample of ``Q``.

        Returns:
            The index and its settings; the settings are None for the exact index.
        """
        sample = np.ascontiguousarray(Q[np.linspace(0, len(Q) - 1, min(SAMPLE_QUERIES, len(Q))).astype(np.int64)])
        kth_similarity = (
            _flat(X).search(sample, k)[0][:, -1:] - 1e-6
        )  # by similarity, not by id: any of equally near rows is correct

        def reached(core: Any, nprobe: int, candidates: int) -> float:
            _set_effort(core, nprobe, candidates)
            return float(np.mean(core.search(sample, k)[0] >= kth_similarity))

        def least(nlist: int) -> tuple[Any, Tuned] | None:
            core, efforts = _structure(X, nlist), _efforts(nlist)
            if nlist and reached(core, *efforts[-1]) < self.recall:
                return None  # even the most that an inverted file may cost is not enough
            for nprobe, candidates in efforts:
                recall = reached(core, nprobe, candidates)
                if recall >= self.recall:
                    return core, Tuned(nlist, nprobe, candidates, recall)
            log.info("graph.backend faiss: %d rows, exact: codes reach a recall of %.4f, asked %.4f", len(X), recall, self.recall)
            return None

        for nlist in (2 ** round(math.log2(4 * math.sqrt(len(X)))), 0):  # one after another: each holds a copy of the rows
            found = least(nlist)
            if found is not None:
                log.info(
                    "graph.backend faiss: %d rows, %s on %d queries (asked: %.4f)", len(X), found[1], len(sample), self.recall
                )
                return found
        return _flat(X), None


def _efforts(nlist: int) -> list[tuple[int, int]]:
    """Return the pairs (nprobe, candidates) to try in turn, least effort first."""
    if not nlist:
        return [(0, c) for c in CANDIDATES]
    most = max(1, nlist // LIST_SHARE)
    return [(most >> s, LIST_CANDIDATES) for s in range(5, -1, -1) if most >> s]


def _flat(X: FloatArray) -> Any:
    import faiss

    core = faiss.IndexFlatIP(X.shape[1])
    core.add(X)
    return core


def _structure(X: FloatArray, nlist: int) -> Any:
    """Build 4-bit codes of ``X`` behind ``nlist`` lists (0: none), with the rows kept for the second comparison."""
    import faiss

    dim = X.shape[1]
    parts = dim // 2 if dim % 2 == 0 else dim
    if nlist:
        codes: Any = faiss.IndexIVFPQFastScan(faiss.IndexFlatIP(dim), dim, nlist, parts, 4, faiss.METRIC_INNER_PRODUCT)
        codes.cp.max_points_per_centroid = TRAIN_ROWS  # faiss draws the sample with a seed of its own
        codes.cp.niter = 10
    else:
        codes = faiss.IndexPQFastScan(dim, parts, 4, faiss.METRIC_INNER_PRODUCT)
    core = faiss.IndexRefineFlat(codes)
    core.train(X)
    core.add(X)
    return core


def _set_effort(core: Any, nprobe: int, candidates: int) -> None:
    import faiss

    core.k_factor = float(candidates)
    if nprobe:
        codes: Any = faiss.downcast_index(core.base_index)
        codes.nprobe = nprobe
