"""The faiss leaf: exact below 30,000 rows, an inverted file tuned to the asked recall above.

The recall is measured, not assumed: on a sample of the real queries against an exact search, with nprobe raised until
it is reached.  Thread settings of faiss are left as they are.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grace_ds.graph.leaves import FLAT_ROWS
from grace_ds.records import FloatArray, IntArray

log = logging.getLogger(__name__)

SAMPLE_QUERIES = 500  # standard error of a recall of .99 on 500 x k neighbours: below .001
TRAIN_ROWS_PER_LIST = 40  # k-means in faiss warns below 39 and gains little above
QUERY_BLOCK = 65_536  # bounds what faiss holds at once


@dataclass
class FaissIndex:
    """An index with the names of its rows.

    Attributes:
        core: faiss.IndexFlatIP or faiss.IndexIVFFlat.
        X: (m, d) float32, the rows, for the exact search that the tuning compares with.
        ids: (m,) int64.
        report: {} until an inverted file has been tuned, then nlist, nprobe and the measured recall.
    """

    core: Any
    X: FloatArray
    ids: IntArray
    report: dict[str, float] = field(default_factory=dict)


class FaissLeaf:
    """``IndexFlatIP`` below :data:`~grace_ds.graph.leaves.FLAT_ROWS`, else ``IndexIVFFlat``.

    Args:
        recall: share of the true k nearest that a search must find on average, in (0, 1].
    """

    name = "faiss"

    def __init__(self, recall: float) -> None:
        self.recall = recall

    def build(self, X: FloatArray, ids: IntArray) -> FaissIndex:
        """See :class:`grace_ds.graph.leaves.Leaf`."""
        import faiss

        X = np.ascontiguousarray(X, np.float32)
        rows, dim = X.shape
        if rows < FLAT_ROWS or self.recall >= 1.0:
            core: Any = faiss.IndexFlatIP(dim)
        else:
            nlist = 2 ** round(math.log2(4 * math.sqrt(rows)))
            core = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, nlist, faiss.METRIC_INNER_PRODUCT)
            core.cp.max_points_per_centroid = TRAIN_ROWS_PER_LIST  # faiss draws the sample with a seed of its own
            core.cp.niter = 10
            core.train(X)
        core.add(X)
        return FaissIndex(core, X, ids)

    def search(self, index: FaissIndex, Q: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
        """See :class:`grace_ds.graph.leaves.Leaf`; the first search of an inverted file tunes it on its own queries."""
        out_ids = np.full((len(Q), k), -1, np.int64)
        out_similarity = np.full((len(Q), k), -np.inf, np.float32)
        kept = min(k, len(index.ids))
        if not kept or not len(Q):
            return out_ids, out_similarity
        Q = np.ascontiguousarray(Q, np.float32)
        if hasattr(index.core, "nprobe") and not index.report:
            self._tune(index, Q, kept)
        for lo in range(0, len(Q), QUERY_BLOCK):
            similarity, position = index.core.search(Q[lo : lo + QUERY_BLOCK], kept)
            found = position >= 0  # faiss pads by -1 and the lowest float when the probed lists hold fewer than k rows
            out_ids[lo : lo + QUERY_BLOCK, :kept] = np.where(found, index.ids[position], -1)
            out_similarity[lo : lo + QUERY_BLOCK, :kept] = np.where(found, similarity, -np.inf)
        return out_ids, out_similarity

    def _tune(self, index: FaissIndex, Q: FloatArray, k: int) -> None:
        """Raises nprobe until the sampled recall is reached; all lists at the latest, which is exact."""
        import faiss

        sample = np.ascontiguousarray(Q[np.linspace(0, len(Q) - 1, min(SAMPLE_QUERIES, len(Q))).astype(np.int64)])
        exact = faiss.IndexFlatIP(index.X.shape[1])
        exact.add(index.X)
        bar, _ = exact.search(sample, k)
        core = index.core
        core.nprobe = 4
        while True:
            # By similarity, not by id: among equally near rows any is right.
            found, _ = core.search(sample, k)
            reached = float(np.mean(found >= bar[:, -1:] - 1e-6))
            if reached >= self.recall or core.nprobe >= core.nlist:
                break
            core.nprobe = min(core.nlist, max(core.nprobe + 1, core.nprobe * 3 // 2))
        index.report.update(nlist=core.nlist, nprobe=core.nprobe, recall=reached)
        log.info(
            "graph.leaf faiss: %d rows, nlist %d, nprobe %d, recall %.4f on %d queries (asked: %.4f)",
            len(index.ids), core.nlist, core.nprobe, reached, len(sample), self.recall,
        )  # fmt: skip
