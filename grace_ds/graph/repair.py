"""Keep the k-NN graph of a window from refresh to refresh: the cost is that of the rows that come, go and move.

Kept are the k nearest of each row and :data:`SPARE` more.  Every row nearer than the last of them is in the list.  So when a
neighbour leaves, the next one is there already, and a row that is new or has moved must only be compared with the last.  Rows
that are new or have moved are searched for again, and so is a row whose list has fewer than k left.

In the exact tier a repaired graph *is* the rebuilt one, bit for bit.  In the clustered tier, and over an approximate back
end, it is limited to what these can find; if a sample's recall falls below the floor, everything is built again.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.config.schema import GraphConfig
from grace_ds.graph import backends, clustered, ring
from grace_ds.graph.build import search_all
from grace_ds.graph.clusters import nearest_centroids
from grace_ds.graph.insert import Moved, insert
from grace_ds.graph.merge import ID_BITS, PAD, ROWS, finished, without_self
from grace_ds.graph.placement import Placement, sampled_recall
from grace_ds.graph.rows import Request, prepared
from grace_ds.records import Array, FloatArray, IntArray, Neighbours
from grace_ds.utils.heap import trim_heap

log = logging.getLogger(__name__)

SPARE = 8  # neighbours kept beyond k: with 23 kept and one in twenty moving, nearly no row loses more
FLOOR = 0.005  # the sampled recall may fall this far below the configured one
REBUILT_SHARE = 0.5  # of all rows: if more are new or have moved, building again is cheaper
_FILTER = 1 << 20


@dataclass(frozen=True)
class KeptGraph:
    """A graph of this rank's n rows, with what is needed to repair it.

    Attributes:
        k: neighbours of a row.
        ids: (n,) int64, sorted.
        X: (n, d) float32, the rows that the edges were computed from.
        centroids: (c, d) float32, equal on all ranks; c is 0 in the exact tier.
        where: (n, o) int32, clusters of each row; o is 0 in the exact tier.
        keys: (n, k + SPARE) int64, nearest first (:mod:`grace_ds.graph.merge`).
        depth: (n,) int64, the key up to which a list is complete.
        exact: whether every list holds the true neighbours.
        change: what the last refresh did: built | repaired | none.
        searched: number of rows, over all ranks, that the last refresh searched for.
    """

    k: int
    ids: IntArray
    X: FloatArray
    centroids: FloatArray
    where: Array
    keys: IntArray
    depth: IntArray
    exact: bool
    change: str = "built"
    searched: int = 0

    def neighbours(self) -> Neighbours:
        """Return the k nearest of each row, nearest first."""
        return finished(self.keys, self.ids, self.k, exclude_self=False)


def build_kept(comm: Comm, ids: IntArray, X: FloatArray, config: GraphConfig, device: str = "cpu") -> KeptGraph | None:
    """Build the graph of all ranks' rows, each row's own id left out.  Collective.

    Args:
        comm: of all ranks.
        ids: (n,) int64, sorted, each on one rank only.
        X: (n, d) float32, unit norm or zero.
        config: k, recall, backend, tier, clusters, overlap, executor.
        device: of the job's model.

    Returns:
        None if no rank has a row.

    Raises:
        ConfigError, ExecutorError, DataError: as :func:`grace_ds.graph.build.knn`.
    """
    request = Request.of(ids, X, config.k)
    found = search_all(comm, request, config, SPARE, device)
    if found is None:
        return None
    n = int(comm.allreduce(np.array([len(ids)], np.int64))[0])
    keys = without_self(found.keys, ids, config.k + SPARE)
    where = np.empty((len(ids), 0), np.int32) if found.placement is None else found.placement.index
    centroids = np.empty((0, request.X.shape[1]), np.float32) if found.centroids is None else found.centroids
    trim_heap()  # building takes the most memory of a refresh, in many pieces
    return KeptGraph(config.k, ids, request.X, centroids, where, keys, keys[:, -1].copy(), found.exact, "built", n)


def follow(
    comm: Comm,
    kept: KeptGraph | None,
    ids: IntArray,
    X: FloatArray,
    config: GraphConfig,
    drift: float = 0.0,
    device: str = "cpu",
) -> KeptGraph | None:
    """Return the graph of the current rows: ``kept`` repaired, or a new one if there is none.  Collective.

    Args:
        comm: of all ranks.
        kept: of the last refresh, on all ranks or on none.
        ids: (n,) int64, sorted, this rank's now; ids not in ``kept`` are new, missing ones are gone.
        X: (n, d) float32, their rows now.  The array is taken over: rows that have not moved further than ``drift`` are set
            to their old values, even if the repaired graph then fails the check and is built again.
        config: the same as at the build.
        drift: 1 - cosine up to which a row counts as unmoved; it keeps its old values until it has moved further.
        device: of the job's model.

    Returns:
        None if no rank has a row.

    Raises:
        ConfigError, ExecutorError, DataError: as :func:`grace_ds.graph.build.knn`.
    """
    if kept is None or kept.k != config.k:
        return build_kept(comm, ids, X, config, device)
    X = prepared(ids, X)
    known, old_rows = _found_again(kept.ids, ids)
    moved = ~known
    moved[known] = _gone_further(_rows(kept.X, old_rows), _rows(X, np.flatnonzero(known)), drift)
    gone = np.setdiff1d(kept.ids, ids, assume_unique=True)
    n, n_changed, n_gone = comm.allreduce(np.array([len(ids), moved.sum(), len(gone)], np.int64)).tolist()
    if not n_changed and not n_gone:
        return replace(kept, change="none", searched=0)
    if n_changed > REBUILT_SHARE * n:
        return build_kept(comm, ids, X, config, device)
    removed = np.unique(np.concatenate(comm.allgather(np.concatenate([gone, ids[moved & known]]))))
    repaired = _repaired(comm, kept, ids, X, moved, old_rows[~moved[known]], removed, config, drift, device)
    if kept.exact:
        return repaired
    recall = sampled_recall(comm, ids, repaired.X, repaired.neighbours(), config.k)
    if recall >= config.recall - FLOOR:
        return repaired
    log.info("graph: repaired edges have a recall of %.4f (asked %.4f): building anew", recall, config.recall)
    return build_kept(comm, ids, X, config, device)


def _repaired(
    comm: Comm,
    kept: KeptGraph,
    ids: IntArray,
    X: FloatArray,
    moved: Array,
    old: IntArray,
    removed: IntArray,
    config: GraphConfig,
    drift: float,
    device: str,
) -> KeptGraph:
    """Return the repaired graph.

    Args:
        comm: of all ranks.
        kept: of the last refresh.
        ids, X: this rank's rows now.
        moved: (n,) bool, rows that are new or have moved.
        old: positions in ``kept`` of the other rows.
        removed: ids of all ranks to remove from all lists.
        config: of the graph.
        drift: as in :func:`follow`.
        device: of the job's model.
    """
    stays = ~moved
    if drift > 0:  # a row that has not moved far keeps the values that its edges were computed from
        _put_back(X, np.flatnonzero(stays), kept.X, old)
    where = np.empty((len(ids), kept.where.shape[1]), np.int32)
    where[stays] = kept.where[old]
    if kept.where.shape[1]:
        where[moved] = nearest_centroids(X[moved], kept.centroids, kept.where.shape[1])
    keys, depth = np.full((len(ids), config.k + SPARE), PAD), np.full(len(ids), PAD)
    keys[stays], depth[stays] = kept.keys[old], kept.depth[old]
    _strike(keys, removed)
    keys = insert(ids, X, where, keys, depth, Moved.gathered(comm, ids[moved], X[moved], where[moved]))
    depth = np.minimum(depth, keys[:, -1])  # a list that is full is complete up to its last
    repaired = replace(kept, ids=ids, X=X, where=where, keys=keys, depth=depth, change="repaired")
    # Search for the rows that have moved, and for those whose list has fewer than k left and was not complete.
    return _searched(comm, repaired, moved | ((keys[:, kept.k - 1] == PAD) & (depth != PAD)), config, device)


def _searched(comm: Comm, graph: KeptGraph, which: Array, config: GraphConfig, device: str) -> KeptGraph:
    """Search for the rows ``which`` (n,) bool among all rows; return ``graph`` with their new lists.  Collective."""
    total = int(comm.allreduce(np.array([which.sum()], np.int64))[0])
    if not total:
        return replace(graph, searched=0)
    request = Request(graph.ids[which], np.ascontiguousarray(graph.X[which]), graph.ids, graph.X, graph.k + SPARE)
    # A few queries do not pay for an approximate index, and faiss multiplies a few hundred of them at a quarter of its speed.
    backend = backends.exact(backends.agreed(comm, config.backend, device), device=device)
    with backends.opened(comm, backend):
        if graph.where.shape[1]:
            keys = clustered.nearest_keys(
                comm, request, backend, Placement.of(comm, graph.where[which], graph.where, len(graph.centroids))
            )
        else:
            keys = ring.nearest_keys(comm, request, backend)
    keys = without_self(keys, request.q_ids, request.k)
    graph.keys[which], graph.depth[which] = keys, keys[:, -1]
    return replace(graph, searched=total)


def _found_again(old: IntArray, new: IntArray) -> tuple[Array, IntArray]:
    """Find the ids of ``new`` in ``old``; both sorted.

    Returns:
        Which of ``new`` are in ``old`` (n,) bool, and the positions of those in ``old``.
    """
    positions = np.searchsorted(old, new)
    known = np.zeros(len(new), bool)
    inside = positions < len(old)
    known[inside] = old[positions[inside]] == new[inside]
    return known, positions[known]


def _rows(X: FloatArray, at: IntArray) -> FloatArray:
    """Return ``X[at]``, without a copy if that is all of ``X``."""
    return X if np.array_equal(at, np.arange(len(X))) else X[at]


def _gone_further(old: FloatArray, new: FloatArray, drift: float) -> Array:
    if old is new:
        return np.zeros(len(old), bool)
    if drift <= 0:
        parts = [(old[lo : lo + ROWS] != new[lo : lo + ROWS]).any(axis=1) for lo in range(0, len(old), ROWS)]
        return np.concatenate([np.zeros(0, bool), *parts])
    far = np.flatnonzero(1 - np.einsum("nd,nd->n", old, new) > drift)
    moved = np.zeros(len(old), bool)
    moved[far] = (old[far] != new[far]).any(axis=1)  # a row of zeros is far even from itself
    return moved


def _put_back(X: FloatArray, at: IntArray, old: FloatArray, there: IntArray) -> None:
    """Set the rows ``at`` of ``X`` to the rows ``there`` of ``old``, in place; block by block, and only if they differ."""
    for start in range(0, len(at), ROWS):
        block, before = at[start : start + ROWS], old[there[start : start + ROWS]]
        differ = (X[block] != before).any(axis=1)
        if differ.any():
            X[block[differ]] = before[differ]


def _strike(keys: IntArray, ids: IntArray) -> None:
    """Remove the neighbours ``ids`` (sorted) from the lists, in place, keeping the order."""
    if not len(ids):
        return
    seen = np.zeros(_FILTER, bool)  # indexed by the ids' last bits, so that few other ids need an exact look-up
    seen[ids & (_FILTER - 1)] = True
    for start in range(0, len(keys), ROWS):
        _strike_block(keys[start : start + ROWS], ids, seen)


def _strike_block(keys: IntArray, ids: IntArray, seen: Array) -> None:
    flat = keys.reshape(-1)
    likely = np.flatnonzero(seen[flat & (_FILTER - 1)])
    named = flat[likely] & ((1 << ID_BITS) - 1)
    at = np.minimum(np.searchsorted(ids, named), len(ids) - 1)
    struck = np.zeros(keys.shape, bool)
    struck.reshape(-1)[likely] = (ids[at] == named) & (flat[likely] != PAD)
    rows = np.flatnonzero(struck.any(axis=1))
    keys[rows] = np.sort(np.where(struck[rows], PAD, keys[rows]), axis=1)
