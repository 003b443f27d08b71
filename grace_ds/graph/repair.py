"""A kept k-NN graph that follows rows which come, go and move, at the price of those rows alone.

Kept are the k nearest of each row and :data:`SPARE` more.  Whatever is nearer than the last of them is in the list, as far
as the clusters tell; so when a neighbour leaves, the next one is there already, and what has come or moved must only be
compared with the last.  A row whose list has run short of k is searched for anew, and where a sample's recall has fallen
below the floor everything is built anew.

Every rank compares its own rows with what has moved anywhere: only moved rows travel, and the neighbours found for them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.config.schema import GraphConfig
from grace_ds.graph.clustered import nearest_keys
from grace_ds.graph.clusters import nearest_centroids
from grace_ds.graph.leaves import exact
from grace_ds.graph.meet import Moved, meet
from grace_ds.graph.merge import ID_BITS, PAD, ROWS, merge, unpack, without_self
from grace_ds.graph.placement import Placement, centroids_of, place, sampled_recall
from grace_ds.graph.plan import clusters_for
from grace_ds.graph.rows import Request, prepared
from grace_ds.records import Array, FloatArray, IntArray, Neighbours

log = logging.getLogger(__name__)

SPARE = 8  # neighbours kept beyond k: of 23, one in twenty moving, nearly no row loses more
_FILTER = 1 << 20
FLOOR = 0.005  # the sampled recall may fall this far below what was asked for


@dataclass(frozen=True)
class KeptGraph:
    """A graph with what it takes to repair it; of this rank's n rows.

    Attributes:
        k: neighbours of a row.
        ids: (n,) int64, sorted.
        X: (n, d) float32, the rows that the edges were computed from.
        centroids: (c, d) float32, on all ranks alike.
        where: (n, o) int32, clusters of each row.
        keys: (n, k + SPARE) int64, nearest first (:mod:`grace_ds.graph.merge`).
        depth: (n,) int64, the key up to which a list is complete.
        rebuilt: whether the last repair had to build everything anew.
    """

    k: int
    ids: IntArray
    X: FloatArray
    centroids: FloatArray
    where: Array
    keys: IntArray
    depth: IntArray
    rebuilt: bool = True

    def neighbours(self) -> Neighbours:
        """The k nearest of each row, nearest first."""
        return unpack(self.keys[:, : self.k])


def build_kept(comm: Comm, ids: IntArray, X: FloatArray, config: GraphConfig) -> KeptGraph:
    """The graph of all ranks' rows, each row's own id left out.  Collective.

    Args:
        ids: (n,) int64, sorted, each on one rank only.
        X: (n, d) float32, unit norm or zero.
        config: k, recall, clusters, overlap, leaf; the clustered tier is always taken (1 cluster: exact).
    """
    asked = Request.of(ids, X, config.k)
    n = int(comm.allreduce(np.array([len(ids)], np.int64))[0])
    centroids = centroids_of(comm, ids, asked.X, clusters_for(config, n))
    p = place(comm, asked, centroids, config.recall, config.overlap)
    keys = _searched(comm, replace(asked, k=config.k + SPARE), config, p)
    return KeptGraph(config.k, ids, asked.X, centroids, p.index, keys, keys[:, -1].copy())


def _searched(comm: Comm, asked: Request, config: GraphConfig, p: Placement) -> IntArray:
    """(n, k) keys of the queries' nearest rows but themselves.  Collective."""
    return without_self(nearest_keys(comm, asked, exact(config.leaf), p), asked.q_ids, asked.k)


def repair(comm: Comm, kept: KeptGraph, ids: IntArray, X: FloatArray, config: GraphConfig, drift: float = 0.0) -> KeptGraph:
    """``kept`` for the rows as they are now.  Collective.

    Args:
        ids: (n,) int64, sorted, this rank's now; those that were not there are new, those missing are gone.
        X: (n, d) float32, their rows now.
        config: as when it was built.
        drift: 1 - cosine up to which a row counts as unmoved; its old place is kept until it has gone further.
    """
    X = prepared(ids, X)
    known, there = _found_again(kept.ids, ids)
    moved = ~known
    moved[known] = _gone_further(_rows(kept.X, there), _rows(X, np.flatnonzero(known)), drift)
    stays, old = ~moved, there[~moved[known]]
    rows = X
    if drift > 0:  # whoever has not gone far is left where its edges were computed
        rows = X.copy()
        rows[stays] = kept.X[old]
    where = np.empty((len(ids), kept.where.shape[1]), np.int32)
    where[stays], where[moved] = kept.where[old], nearest_centroids(X[moved], kept.centroids, where.shape[1])
    keys, depth = np.full((len(ids), config.k + SPARE), PAD), np.full(len(ids), PAD)
    keys[stays], depth[stays] = kept.keys[old], kept.depth[old]
    gone = np.setdiff1d(kept.ids, ids, assume_unique=True)
    _strike(keys, np.unique(np.concatenate(comm.allgather(np.concatenate([gone, ids[moved & known]])))))
    news = Moved.gathered(comm, ids[moved], rows[moved], where[moved])
    keys, found = meet(ids, rows, where, keys, depth, news)
    keys[moved] = _returned(comm, found, news.counts)
    depth = np.minimum(depth, keys[:, -1])  # a list that is full is complete up to its last
    now = _refilled(comm, replace(kept, ids=ids, X=rows, where=where, keys=keys, depth=depth, rebuilt=False), config)
    recall = sampled_recall(comm, ids, rows, now.neighbours(), config.k)
    if recall >= config.recall - FLOOR:
        return now
    log.info("graph: repaired edges have a recall of %.4f (asked %.4f): building anew", recall, config.recall)
    return build_kept(comm, ids, X, config)


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
    if drift <= 0:
        parts = [(old[lo : lo + ROWS] != new[lo : lo + ROWS]).any(axis=1) for lo in range(0, len(old), ROWS)]
        return np.concatenate([np.zeros(0, bool), *parts])
    return np.asarray(1 - np.einsum("nd,nd->n", old, new) > drift)


def _strike(keys: IntArray, ids: IntArray) -> None:
    """Drops the neighbours ``ids`` (sorted) from the lists, in place, order kept."""
    if not len(ids):
        return
    flat = keys.reshape(-1)
    seen = np.zeros(_FILTER, bool)  # by the ids' last bits: few are looked up that are not meant
    seen[ids & (_FILTER - 1)] = True
    likely = np.flatnonzero(seen[flat & (_FILTER - 1)])
    named = flat[likely] & ((1 << ID_BITS) - 1)
    at = np.minimum(np.searchsorted(ids, named), len(ids) - 1)
    struck = np.zeros(keys.shape, bool)
    struck.reshape(-1)[likely] = (ids[at] == named) & (flat[likely] != PAD)
    rows = np.flatnonzero(struck.any(axis=1))
    keys[rows] = np.sort(np.where(struck[rows], PAD, keys[rows]), axis=1)


def _returned(comm: Comm, found: IntArray, counts: IntArray) -> IntArray:
    """The moved rows' neighbours from all ranks, merged by the rank that owns the row.  Collective."""
    parts = comm.exchange(np.split(found, np.cumsum(counts)[:-1]))
    keys = parts[0]
    for part in parts[1:]:
        keys = merge(keys, part, found.shape[1])
    return keys


def _refilled(comm: Comm, g: KeptGraph, config: GraphConfig) -> KeptGraph:
    """Rows whose list has run short, searched for anew among all rows of their clusters.  Collective."""
    short = (g.keys[:, g.k - 1] == PAD) & (g.depth != PAD)
    todo = int(comm.allreduce(np.array([short.sum()], np.int64))[0])
    if not todo:
        return g
    asked = Request(g.ids[short], np.ascontiguousarray(g.X[short]), g.ids, g.X, g.k + SPARE)
    p = Placement.of(comm, g.where[short], g.where, len(g.centroids))
    keys = _searched(comm, asked, config, p)
    g.keys[short], g.depth[short] = keys, keys[:, -1]
    return g
