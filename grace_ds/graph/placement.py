"""How far the clusters must overlap: the recall that every overlap would reach, measured before anything is searched.

Two rows are compared where they share a cluster.  So for a sample of queries whose true neighbours are found exactly, the
share of neighbours that share one of the first ``o`` clusters *is* the recall of the clustered tier at overlap ``o``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.graph.clusters import SAMPLE_ROWS, draw, fit, nearest_centroids
from grace_ds.graph.leaves.torch_leaf import TorchLeaf
from grace_ds.graph.merge import ID_BITS, PAD, without_self
from grace_ds.graph.rows import collapse, distinct
from grace_ds.graph.search import search
from grace_ds.records import Array, FloatArray, IntArray

MOST = 8  # clusters that a row may go to
SAMPLE_QUERIES = 500  # standard error of a recall of .99 on 500 x k neighbours: about .002, as neighbours come in crowds


@dataclass(frozen=True)
class Placement:
    """Clusters, and where this rank's rows go.

    Attributes:
        clusters: how many there are.
        overlap: clusters that each row goes to.
        recall: measured on the sample at that overlap; 1 where it could not be measured (no neighbours at all).
        queries: (n, overlap) int32, of this rank's queries.
        index: (m, overlap) int32, of this rank's index rows; the same array where they are the queries.
        n_queries, n_index: (clusters,) int64, rows of each over all ranks.
    """

    clusters: int
    overlap: int
    recall: float
    queries: Array
    index: Array
    n_queries: IntArray
    n_index: IntArray

    @property
    def pairs(self) -> int:
        """Similarities to be computed over all ranks."""
        return int((self.n_queries * self.n_index).sum())


def place(
    comm: Comm,
    q_ids: IntArray,
    Q: FloatArray,
    ids: IntArray,
    X: FloatArray,
    k: int,
    clusters: int,
    recall: float,
    overlap: int,
    exclude_self: bool,
) -> Placement:
    """Clusters the index rows and assigns all rows.  Collective; the same for any number of ranks.

    Args:
        q_ids, Q, ids, X: as for :func:`grace_ds.graph.ring.nearest`, rows prepared.
        clusters: wanted.
        recall: to be reached by the smallest overlap that does; the largest one where none does.
        overlap: fixes it; 0: by the recall.
    """
    centroids = fit(draw(comm, ids, SAMPLE_ROWS * clusters, X)[1], clusters)
    most = min(overlap or MOST, len(centroids))
    index = nearest_centroids(X, centroids, most)
    queries = index if Q is X else nearest_centroids(Q, centroids, most)
    measured = _measured(comm, q_ids, Q, queries, ids, X, index, k, exclude_self)
    reached = np.flatnonzero(measured >= recall)
    o = overlap or (int(reached[0]) + 1 if len(reached) else most)
    o = min(o, most)
    index, queries = index[:, :o], queries[:, :o]
    n_index, n_queries = (
        comm.allreduce(np.bincount(a.reshape(-1), minlength=len(centroids)).astype(np.int64)) for a in (index, queries)
    )
    return Placement(len(centroids), o, float(measured[o - 1]), queries, index, n_queries, n_index)


def _measured(
    comm: Comm,
    q_ids: IntArray,
    Q: FloatArray,
    queries: Array,
    ids: IntArray,
    X: FloatArray,
    index: Array,
    k: int,
    exclude_self: bool,
) -> FloatArray:
    """(overlaps,) float64: recall at overlap 1, 2, ..., over a sample of all ranks' queries."""
    most = queries.shape[1]
    sample, rows, theirs = draw(comm, q_ids, SAMPLE_QUERIES, Q, queries)
    wanted = k + int(exclude_self)
    unique, which = distinct(sample, rows)
    keys = search(unique, collapse(ids, X, wanted), wanted, TorchLeaf())[which]
    order = np.argsort(ids, kind="stable")
    named = np.minimum(np.searchsorted(ids, keys & ((1 << ID_BITS) - 1), sorter=order), max(len(ids) - 1, 0))
    found = index[order[named]] if len(ids) else np.zeros((*keys.shape, most), np.int32)
    every, clusters = comm.gather(keys), comm.gather(found)
    shares = np.ones(most)
    if every is not None and clusters is not None and len(sample):
        shares = _shares(np.concatenate(every, 1), np.concatenate(clusters, 1), sample, theirs, k, exclude_self)
    return np.asarray(comm.broadcast(shares))


def _shares(keys: IntArray, clusters: Array, sample: IntArray, theirs: IntArray, k: int, exclude_self: bool) -> Array:
    """Of each query's k nearest in ``keys`` (s, j), whose ``clusters`` are (s, j, o), the share that it meets."""
    nearest = without_self(keys, sample, k) if exclude_self else np.sort(keys, axis=1)[:, :k]
    true = (keys <= nearest[:, -1:]) & (keys != PAD)
    if exclude_self:
        true &= (keys & ((1 << ID_BITS) - 1)) != sample[:, None]
    met = np.zeros((*keys.shape,), bool)
    shares = np.ones(clusters.shape[2])
    for o in range(clusters.shape[2]):
        met |= (clusters[:, :, o, None] == theirs[:, None, : o + 1]).any(2)
        met |= (clusters[:, :, : o + 1] == theirs[:, None, o, None]).any(2)
        shares[o] = met[true].mean() if true.any() else 1.0
    return shares
