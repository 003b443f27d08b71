"""How far the clusters must overlap: the recall that every overlap would reach, measured before anything is searched.

Two rows are compared where they share a cluster.  So for a sample of queries whose true neighbours are found exactly, the
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

MOST = 8  # clusters that a row may go to
CHECKED_QUERIES = 200  # of a repair, which must cost little; it is held against a floor
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

    @staticmethod
    def of(comm: Comm, queries: Array, index: Array, clusters: int, recall: float = 1.0) -> Placement:
        """Of rows whose clusters are known.  Collective."""
        n_queries, n_index = (
            comm.allreduce(np.bincount(a.reshape(-1), minlength=clusters).astype(np.int64)) for a in (queries, index)
        )
        return Placement(clusters, index.shape[1], recall, queries, index, n_queries, n_index)

    @property
    def pairs(self) -> int:
        """Similarities to be computed over all ranks."""
        return int((self.n_queries * self.n_index).sum())


def place(comm: Comm, asked: Request, centroids: FloatArray, recall: float, overlap: int) -> Placement:
    """Assigns all rows to clusters.  Collective; the same for any number of ranks.

    Args:
        asked: of this rank.
        centroids: of :func:`centroids_of`.
        recall: to be reached by the smallest overlap that does; the largest one where none does.
        overlap: fixes it; 0: by the recall.
    """
    most = min(overlap or MOST, len(centroids))
    index = nearest_centroids(asked.X, centroids, most)
    queries = index if asked.alike else nearest_centroids(asked.Q, centroids, most)
    measured = _measured(comm, asked, queries, index)
    reached = np.flatnonzero(measured >= recall)
    o = overlap or (int(reached[0]) + 1 if len(reached) else most)
    o = min(o, most)
    index, queries = index[:, :o], queries[:, :o]
    return Placement.of(comm, queries, index, len(centroids), float(measured[o - 1]))


def centroids_of(comm: Comm, ids: IntArray, X: FloatArray, clusters: int) -> FloatArray:
    """Centroids of all ranks' prepared rows, (c, d) float32, c <= ``clusters``, on every rank alike.  Collective."""
    sample = draw(comm, ids, SAMPLE_ROWS * clusters, X)[1]
    return np.asarray(comm.broadcast(fit(sample, clusters) if comm.rank == 0 else None), np.float32)


def sampled_recall(comm: Comm, ids: IntArray, X: FloatArray, found: Neighbours, k: int) -> float:
    """Share of the true k nearest that ``found`` holds, over a sample of all ranks' rows.  Collective; equal on all ranks."""
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
    """(s, ranks * wanted) keys of the nearest rows of every rank; on root only.  Collective."""
    parts = comm.gather(_true_here(sample, rows, ids, X, wanted))
    return None if parts is None else np.concatenate(parts, axis=1)


def _true_here(sample: IntArray, rows: FloatArray, ids: IntArray, X: FloatArray, wanted: int) -> IntArray:
    unique, which = distinct(sample, rows)
    return search(unique, collapse(ids, X, wanted), wanted, TorchBackend())[which]


def _measured(comm: Comm, asked: Request, queries: Array, index: Array) -> FloatArray:
    """(overlaps,) float64: recall at overlap 1, 2, ..., over a sample of all ranks' queries.

    Args:
        queries, index: (n, overlaps), (m, overlaps) int32, the clusters of this rank's queries and index rows.
    """
    most, ids = queries.shape[1], asked.ids
    sample, rows, theirs = draw(comm, asked.q_ids, SAMPLE_QUERIES, asked.Q, queries)
    keys = _true_here(sample, rows, ids, asked.X, asked.wanted)
    order = np.argsort(ids, kind="stable")
    named = np.minimum(np.searchsorted(ids, keys & ((1 << ID_BITS) - 1), sorter=order), max(len(ids) - 1, 0))
    found = index[order[named]] if len(ids) else np.zeros((*keys.shape, most), np.int32)
    every, clusters = comm.gather(keys), comm.gather(found)
    shares = np.ones(most)
    if every is not None and clusters is not None and len(sample):
        shares = _shares(np.concatenate(every, 1), np.concatenate(clusters, 1), sample, theirs, asked)
    return np.asarray(comm.broadcast(shares))


def _shares(keys: IntArray, clusters: Array, sample: IntArray, theirs: IntArray, asked: Request) -> Array:
    """Of each query's k nearest in ``keys`` (s, j), whose ``clusters`` are (s, j, o), the share that it meets."""
    nearest = without_self(keys, sample, asked.k) if asked.exclude_self else np.sort(keys, axis=1)[:, : asked.k]
    true = (keys <= nearest[:, -1:]) & (keys != PAD)
    if asked.exclude_self:
        true &= (keys & ((1 << ID_BITS) - 1)) != sample[:, None]
    met = np.zeros((*keys.shape,), bool)
    shares = np.ones(clusters.shape[2])
    for o in range(clusters.shape[2]):
        met |= (clusters[:, :, o, None] == theirs[:, None, : o + 1]).any(2)
        met |= (clusters[:, :, : o + 1] == theirs[:, None, o, None]).any(2)
        shares[o] = met[true].mean() if true.any() else 1.0
    return shares
