"""The k-NN graph of a window, kept from refresh to refresh: rows come, go and move, at the price of those rows alone.

Kept are the k nearest of each row and :data:`SPARE` more.  Whatever is nearer than the last of them is in the list; so when a
neighbour leaves, the next one is there already, and a row that has come or moved must only be compared with the last.  Rows
that have come or moved are searched for anew, and so is a row whose list has run short of k.

In the exact tier a repaired graph *is* the rebuilt one, bit for bit.  In the clustered tier, and over an approximate backend,
it keeps to what it can find; where a sample's recall falls below the floor everything is built anew.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.config.schema import GraphConfig
from grace_ds.graph import backends as backends
from grace_ds.graph import clustered, ring
from grace_ds.graph.build import search_all
from grace_ds.graph.clusters import nearest_centroids
from grace_ds.graph.insert import Moved, insert
from grace_ds.graph.merge import ID_BITS, PAD, ROWS, finished, without_self
from grace_ds.graph.placement import Placement, sampled_recall
from grace_ds.graph.rows import Request, prepared
from grace_ds.records import Array, FloatArray, IntArray, Neighbours
from grace_ds.utils.heap import trim_heap

log = logging.getLogger(__name__)

SPARE = 8  # neighbours kept beyond k: of 23, one in twenty moving, nearly no row loses more
FLOOR = 0.005  # the sampled recall may fall this far below what was asked for
REBUILT_SHARE = 0.5  # of all rows: where more have come or moved, building anew is cheaper
_FILTER = 1 << 20


@dataclass(frozen=True)
class KeptGraph:
    """A graph with what it takes to repair it; of this rank's n rows.

    Attributes:
        k: neighbours of a row.
        ids: (n,) int64, sorted.
        X: (n, d) float32, the rows that the edges were computed from.
        centroids: (c, d) float32, on all ranks alike; c is 0 in the exact tier.
        where: (n, o) int32, clusters of each row; o is 0 in the exact tier.
        keys: (n, k + SPARE) int64, nearest first (:mod:`grace_ds.graph.merge`).
        depth: (n,) int64, the key up to which a list is complete.
        exact: whether every list is the true one.
        change: what the last refresh did to it: built | repaired | none.
        searched: rows of all ranks that were searched for by the last refresh.
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
        """The k nearest of each row, nearest first."""
        return finished(self.keys, self.ids, self.k, exclude_self=False)


def build_kept(comm: Comm, ids: IntArray, X: FloatArray, config: GraphConfig, device: str = "cpu") -> KeptGraph | None:
    """The graph of all ranks' rows, each row's own id left out.  Collective.

    Args:
        ids: (n,) int64, sorted, each on one rank only.
        X: (n, d) float32, unit norm or zero.
        config: k, recall, backend, tier, clusters, overlap, executor.
        device: of the job's model.

    Returns:
        None where no rank has a row.

    Raises:
        ConfigError, ExecutorError, DataError: as :func:`grace_ds.graph.build.knn`.
    """
    asked = Request.of(ids, X, config.k)
    found = search_all(comm, asked, config, SPARE, device)
    if found is None:
        return None
    n = int(comm.allreduce(np.array([len(ids)], np.int64))[0])
    keys = without_self(found.keys, ids, config.k + SPARE)
    where = np.empty((len(ids), 0), np.int32) if found.placement is None else found.placement.index
    centroids = np.empty((0, asked.X.shape[1]), np.float32) if found.centroids is None else found.centroids
    trim_heap()  # building takes the most memory of a refresh, in many pieces
    return KeptGraph(config.k, ids, asked.X, centroids, where, keys, keys[:, -1].copy(), found.exact, "built", n)


def follow(
    comm: Comm,
    kept: KeptGraph | None,
    ids: IntArray,
    X: FloatArray,
    config: GraphConfig,
    drift: float = 0.0,
    device: str = "cpu",
) -> KeptGraph | None:
    """The graph of the rows as they are now: ``kept`` repaired, or built where there is none.  Collective.

    Args:
        kept: of the last refresh, on all ranks or on none.
        ids: (n,) int64, sorted, this rank's now; those that were not there are new, those missing are gone.
        X: (n, d) float32, their rows now; taken over: those that have not gone further than ``drift`` become their old ones,
            also where the repaired graph is then found wanting and built anew.
        config: as when it was built.
        drift: 1 - cosine up to which a row counts as unmoved; its old place is kept until it has gone further.
        device: of the job's model.

    Returns:
        None where no rank has a row.

    Raises:
        ConfigError, ExecutorError, DataError: as :func:`grace_ds.graph.build.knn`.
    """
    if kept is None or kept.k != config.k:
        return build_kept(comm, ids, X, config, device)
    X = prepared(ids, X)
    known, there = _found_again(kept.ids, ids)
    moved = ~known
    moved[known] = _gone_further(_rows(kept.X, there), _rows(X, np.flatnonzero(known)), drift)
    gone = np.setdiff1d(kept.ids, ids, assume_unique=True)
    n, came, left = comm.allreduce(np.array([len(ids), moved.sum(), len(gone)], np.int64)).tolist()
    if not came and not left:
        return replace(kept, change="none", searched=0)
    if came > REBUILT_SHARE * n:
        return build_kept(comm, ids, X, config, device)
    struck = np.unique(np.concatenate(comm.allgather(np.concatenate([gone, ids[moved & known]]))))
    now = _repaired(comm, kept, ids, X, moved, there[~moved[known]], struck, config, drift, device)
    if kept.exact:
        return now
    recall = sampled_recall(comm, ids, now.X, now.neighbours(), config.k)
    if recall >= config.recall - FLOOR:
        return now
    log.info("graph: repaired edges have a recall of %.4f (asked %.4f): building anew", recall, config.recall)
    return build_kept(comm, ids, X, config, device)


def _repaired(
    comm: Comm,
    kept: KeptGraph,
    ids: IntArray,
    X: FloatArray,
    moved: Array,
    old: IntArray,
    struck: IntArray,
    config: GraphConfig,
    drift: float,
    device: str,
) -> KeptGraph:
    """Args: ``moved`` (n,) bool, ``old`` places in ``kept`` of the others, ``struck`` ids of all ranks to leave all lists."""
    stays = ~moved
    if drift > 0:  # a row that has not gone far is left where its edges were computed
        _put_back(X, np.flatnonzero(stays), kept.X, old)
    where = np.empty((len(ids), kept.where.shape[1]), np.int32)
    where[stays] = kept.where[old]
    if kept.where.shape[1]:
        where[moved] = nearest_centroids(X[moved], kept.centroids, kept.where.shape[1])
    keys, depth = np.full((len(ids), config.k + SPARE), PAD), np.full(len(ids), PAD)
    keys[stays], depth[stays] = kept.keys[old], kept.depth[old]
    _strike(keys, struck)
    keys = insert(ids, X, where, keys, depth, Moved.gathered(comm, ids[moved], X[moved], where[moved]))
    depth = np.minimum(depth, keys[:, -1])  # a list that is full is complete up to its last
    now = replace(kept, ids=ids, X=X, where=where, keys=keys, depth=depth, change="repaired")
    # Search for the rows that have moved, and for those whose list has run short but was not complete.
    return _searched(comm, now, moved | ((keys[:, kept.k - 1] == PAD) & (depth != PAD)), config, device)


def _searched(comm: Comm, graph: KeptGraph, which: Array, config: GraphConfig, device: str) -> KeptGraph:
    """``graph`` with the lists of the rows ``which`` (n,) bool searched for among all rows.  Collective."""
    total = int(comm.allreduce(np.array([which.sum()], np.int64))[0])
    if not total:
        return replace(graph, searched=0)
    asked = Request(graph.ids[which], np.ascontiguousarray(graph.X[which]), graph.ids, graph.X, graph.k + SPARE)
    # A few queries do not pay for an approximate index, and faiss multiplies a few hundred of them at a quarter of its speed.
    backend = backends.exact(backends.agreed(comm, config.backend, device), device=device)
    with backends.opened(comm, backend):
        if graph.where.shape[1]:
            keys = clustered.nearest_keys(
                comm, asked, backend, Placement.of(comm, graph.where[which], graph.where, len(graph.centroids))
            )
        else:
            keys = ring.nearest_keys(comm, asked, backend)
    keys = without_self(keys, asked.q_ids, asked.k)
    graph.keys[which], graph.depth[which] = keys, keys[:, -1]
    return replace(graph, searched=total)


def _found_again(old: IntArray, new: IntArray) -> tuple[Array, IntArray]:
    """(which of ``new`` are in ``old`` (n,) bool, where those stand there); both sorted."""
    at = np.searchsorted(old, new)
    known = np.zeros(len(new), bool)
    inside = at < len(old)
    known[inside] = old[at[inside]] == new[inside]
    return known, at[known]


def _rows(X: FloatArray, at: IntArray) -> FloatArray:
    """``X[at]``, without a copy where it is all of ``X``."""
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
    """Makes the rows ``at`` of ``X`` the rows ``there`` of ``old``, in place; block by block, and only where they differ."""
    for lo in range(0, len(at), ROWS):
        some, before = at[lo : lo + ROWS], old[there[lo : lo + ROWS]]
        differ = (X[some] != before).any(axis=1)
        if differ.any():
            X[some[differ]] = before[differ]


def _strike(keys: IntArray, ids: IntArray) -> None:
    """Drops the neighbours ``ids`` (sorted) from the lists, in place, order kept."""
    if not len(ids):
        return
    seen = np.zeros(_FILTER, bool)  # by the ids' last bits: few are looked up that are not meant
    seen[ids & (_FILTER - 1)] = True
    for lo in range(0, len(keys), ROWS):
        _strike_block(keys[lo : lo + ROWS], ids, seen)


def _strike_block(keys: IntArray, ids: IntArray, seen: Array) -> None:
    flat = keys.reshape(-1)
    likely = np.flatnonzero(seen[flat & (_FILTER - 1)])
    named = flat[likely] & ((1 << ID_BITS) - 1)
    at = np.minimum(np.searchsorted(ids, named), len(ids) - 1)
    struck = np.zeros(keys.shape, bool)
    struck.reshape(-1)[likely] = (ids[at] == named) & (flat[likely] != PAD)
    rows = np.flatnonzero(struck.any(axis=1))
    keys[rows] = np.sort(np.where(struck[rows], PAD, keys[rows]), axis=1)
