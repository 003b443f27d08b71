"""Choose how far the clusters must overlap: measure the recall of every overlap before anything is searched.

Two rows are compared if they share a cluster.  So for a sample of queries whose true neighbours are found exactly, the
share of neighbours that share one of the first ``o`` clusters *is* the recall of the clustered tier at overlap ``o``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.graph.backends.torch_backend import TorchBackend
from grace_ds.graph.clusters import SAMPLE_ROWS, draw, fit, nearest_centroids
from grace_ds.graph.merge import ID_BITS, PAD, unpack, without_self
from grace_ds.graph.rows import Request, collapse, distinct
from grace_ds.graph.search import search
from grace_ds.records import Array, FloatArray, IntArray, Neighbours

MOST = 8  # maximum clusters per row
CHECKED_QUERIES = 200  # queries that check a repair: the check must cost little
SAMPLE_QUERIES = 500  # standard error of a recall of .99 on 500 x k neighbours: about .002, as neighbours are correlated


@dataclass(frozen=True)
class Placement:
    """Clusters, and which ones this rank's rows go to.

    Attributes:
        clusters: number of clusters.
        overlap: number of clusters that each row goes to.
        recall: measured on the sample at that overlap; 1 if it could not be measured (no neighbours at all).
        queries: (n, overlap) int32, of this rank's queries.
        index: (m, overlap) int32, of this rank's index rows; the same array if they are the queries.
        n_queries, n_index: (clusters,) int64, rows of each cluster over all ranks.
    """

    clusters: int
    overlap: int
    recall: float
    queries: Array
    index: Array
    n_queries: IntArray
    n_index: IntArray

    @staticmethod
    def of(comm: Comm, queries: Array, index: Array, clusters: int, recall: float = 1.0) -> Placement:
        """Build the placement of rows whose clusters are known.  Collective."""
        n_queries, n_index = (
            comm.allreduce(np.bincount(a.reshape(-1), minlength=clusters).astype(np.int64)) for a in (queries, index)
        )
        return Placement(clusters, index.shape[1], recall, queries, index, n_queries, n_index)

    @property
    def pairs(self) -> int:
        """Number of similarities to compute over all ranks."""
        return int((self.n_queries * self.n_index).sum())


def place(comm: Comm, request: Request, centroids: FloatArray, recall: float, overlap: int) -> Placement:
    """Assign all rows to clusters.  Collective; the same for any number of ranks.

    Args:
        comm: of all ranks.
        request: of this rank.
        centroids: of :func:`centroids_of`.
        recall: to reach; the smallest overlap that reaches it is taken, or the largest if none does.
        overlap: fixes the overlap; 0: choose it by the recall.
    """
    largest = min(overlap or MOST, len(centroids))
    index = nearest_centroids(request.X, centroids, largest)
    queries = index if request.alike else nearest_centroids(request.Q, centroids, largest)
    measured = _measured(comm, request, queries, index)
    reached = np.flatnonzero(measured >= recall)
    chosen = overlap or (int(reached[0]) + 1 if len(reached) else largest)
    chosen = min(chosen, largest)
    index, queries = index[:, :chosen], queries[:, :chosen]
    return Placement.of(comm, queries, index, len(centroids), float(measured[chosen - 1]))


def centroids_of(comm: Comm, ids: IntArray, X: FloatArray, clusters: int) -> FloatArray:
    """Return the centroids of all ranks' prepared rows, (c, d) float32, c <= ``clusters``.

    Collective; equal on every rank.
    """
    sample = draw(comm, ids, SAMPLE_ROWS * clusters, X)[1]
    return np.asarray(comm.broadcast(fit(sample, clusters) if comm.rank == 0 else None), np.float32)


def sampled_recall(comm: Comm, ids: IntArray, X: FloatArray, found: Neighbours, k: int) -> float:
    """Return the share of the true k nearest that ``found`` holds, over a sample of all ranks' rows.

    Collective; equal on all ranks.
    """
    sample, rows, kept = draw(comm, ids, CHECKED_QUERIES, X, found.ids)
    keys = _true(comm, sample, rows, ids, X, k + 1)
    share = np.ones(1)
    if keys is not None and len(sample):
        true = unpack(without_self(keys, sample, k)).ids
        share = np.array(
            [np.mean([np.isin(t[t >= 0], f).mean() if (t >= 0).any() else 1.0 for t, f in zip(true, kept, strict=True)])]
        )
    return float(comm.broadcast(share)[0])


def _true(comm: Comm, sample: IntArray, rows: FloatArray, ids: IntArray, X: FloatArray, wanted: int) -> IntArray | None:
    """Return the keys of the nearest rows of every rank, (s, ranks * wanted), on the root only.  Collective."""
    parts = comm.gather(_true_here(sample, rows, ids, X, wanted))
    return None if parts is None else np.concatenate(parts, axis=1)


def _true_here(sample: IntArray, rows: FloatArray, ids: IntArray, X: FloatArray, wanted: int) -> IntArray:
    unique, which = distinct(sample, rows)
    return search(unique, collapse(ids, X, wanted), wanted, TorchBackend())[which]


def _measured(comm: Comm, request: Request, queries: Array, index: Array) -> FloatArray:
    """Measure the recall at overlap 1, 2, ..., over a sample of all ranks' queries; return (overlaps,) float64.

    Args:
        comm: of all ranks.
        request: of this rank.
        queries, index: (n, overlaps), (m, overlaps) int32, the clusters of this rank's queries and index rows.
    """
    overlaps, ids = queries.shape[1], request.ids
    sample, rows, query_clusters = draw(comm, request.q_ids, SAMPLE_QUERIES, request.Q, queries)
    keys = _true_here(sample, rows, ids, request.X, request.wanted)
    order = np.argsort(ids, kind="stable")
    positions = np.minimum(np.searchsorted(ids, keys & ((1 << ID_BITS) - 1), sorter=order), max(len(ids) - 1, 0))
    found = index[order[positions]] if len(ids) else np.zeros((*keys.shape, overlaps), np.int32)
    all_keys, clusters = comm.gather(keys), comm.gather(found)
    shares = np.ones(overlaps)
    if all_keys is not None and clusters is not None and len(sample):
        shares = _shares(np.concatenate(all_keys, 1), np.concatenate(clusters, 1), sample, query_clusters, request)
    return np.asarray(comm.broadcast(shares))


def _shares(keys: IntArray, clusters: Array, sample: IntArray, query_clusters: IntArray, request: Request) -> Array:
    """Return, for each overlap, the share of the queries' k nearest that share a cluster with their query.

    Args:
        keys: (s, j) keys of candidates for each sampled query.
        clusters: (s, j, overlap) their clusters.
        sample: (s,) ids of the queries.
        query_clusters: (s, overlap) clusters of the queries.
        request: of this rank.
    """
    nearest = without_self(keys, sample, request.k) if request.exclude_self else np.sort(keys, axis=1)[:, : request.k]
    true = (keys <= nearest[:, -1:]) & (keys != PAD)
    if request.exclude_self:
        true &= (keys & ((1 << ID_BITS) - 1)) != sample[:, None]
    met = np.zeros((*keys.shape,), bool)
    shares = np.ones(clusters.shape[2])
    for overlap in range(clusters.shape[2]):
        met |= (clusters[:, :, overlap, None] == query_clusters[:, None, : overlap + 1]).any(2)
        met |= (clusters[:, :, : overlap + 1] == query_clusters[:, None, overlap, None]).any(2)
        shares[overlap] = met[true].mean() if true.any() else 1.0
    return shares
