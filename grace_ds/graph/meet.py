"""Rows of this rank and rows that have moved anywhere, compared where they share a cluster: one product serves both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.graph.merge import PAD, merge, pack, unpack
from grace_ds.graph.search import SLACK, rounding
from grace_ds.records import Array, FloatArray, IntArray

BLOCK = 1 << 20  # similarities at a time
PAIRS = 1 << 13  # pairs of rows at a time whose similarity is computed exactly: with 128 columns 8 MiB each side


@dataclass(frozen=True)
class Moved:
    """The moved rows of all ranks, in rank order.

    Attributes:
        ids: (m,) int64.
        X: (m, d) float32.
        where: (m, o) int32, their clusters.
        counts: (ranks,) int64, how many are whose.
    """

    ids: IntArray
    X: FloatArray
    where: Array
    counts: IntArray

    @staticmethod
    def gathered(comm: Comm, ids: IntArray, X: FloatArray, where: Array) -> Moved:
        """All ranks' parts.  Collective."""
        parts = [comm.allgather(np.ascontiguousarray(a)) for a in (ids, X, where)]
        counts = np.array([len(a) for a in parts[0]], np.int64)
        return Moved(np.concatenate(parts[0]), np.concatenate(parts[1]), np.concatenate(parts[2]), counts)


def meet(ids: IntArray, X: FloatArray, where: Array, keys: IntArray, depth: IntArray, news: Moved) -> tuple[IntArray, IntArray]:
    """What moved rows find among this rank's rows, and these rows' lists with the moved ones that belong in.

    Args:
        ids, X, where: (n,), (n, d), (n, o) of this rank.
        keys: (n, w) their lists; a list takes a moved row in that is no further than ``depth`` (n,).
        news: the moved rows; those of this rank are among ``ids`` too.

    Returns:
        keys (n, w), and for each moved row the keys of its nearest rows here, (m, w).
    """
    wanted = keys.shape[1]
    found = np.full((len(news.ids), wanted), PAD)
    if not len(news.ids) or not len(ids):
        return keys, found
    bar = unpack(depth[:, None]).similarity[:, 0].astype(np.float32) - np.float32(rounding(X.shape[1]))
    bar[np.isin(ids, news.ids)] = np.inf  # they are looked after from the other side
    here, there = _by_cluster(where), _by_cluster(news.where)
    taken: list[IntArray] = []
    for cluster, columns in there.items():
        for lo in range(0, len(rows := here.get(cluster, columns[:0])), step := max(1, BLOCK // len(columns))):
            part = rows[lo : lo + step]
            similarity = X[part] @ news.X[columns].T
            _nearest_here(found, similarity, part, columns, ids, X, news, wanted)
            row, column = np.nonzero(similarity >= bar[part][:, None])
            taken.append(np.stack([part[row], columns[column]]))
    pairs = np.concatenate(taken, axis=1) if taken else np.empty((2, 0), np.int64)
    return _taken_in(keys, depth, pairs, ids, X, news), found


def _by_cluster(where: Array) -> dict[int, IntArray]:
    flat = where.reshape(-1)
    order = np.argsort(flat, kind="stable")
    names, start = np.unique(flat[order], return_index=True)
    return {int(c): rows // where.shape[1] for c, rows in zip(names, np.split(order, start[1:]), strict=True)}


def _nearest_here(
    found: IntArray, similarity: Array, rows: IntArray, columns: IntArray, ids: IntArray, X: FloatArray, news: Moved, wanted: int
) -> None:
    """Merges into ``found`` the nearest of ``rows`` for each of the moved ``columns``."""
    turned = np.ascontiguousarray(similarity.T)
    width = min(len(rows), wanted + 1 + SLACK)
    best = np.argpartition(turned, len(rows) - width, axis=1)[:, len(rows) - width :]
    candidates = rows[best]
    step = max(1, PAIRS // width)
    for lo in range(0, len(columns), step):
        at, names = columns[lo : lo + step], candidates[lo : lo + step]
        exact = np.matmul(X[names].astype(np.float64), news.X[at].astype(np.float64)[:, :, None])[:, :, 0]
        own = ids[names] == news.ids[at][:, None]
        found[at] = merge(found[at], pack(exact, np.where(own, -1, ids[names])), wanted)


def _taken_in(keys: IntArray, depth: IntArray, pairs: IntArray, ids: IntArray, X: FloatArray, news: Moved) -> IntArray:
    """The lists with those moved rows of ``pairs`` (2, p) that are no further than the list is complete."""
    wanted = keys.shape[1]
    pairs = np.stack(np.divmod(np.unique(pairs[0] * len(news.ids) + pairs[1]), len(news.ids)))
    exact = np.concatenate(
        [
            np.empty(0),
            *(
                np.einsum("pd,pd->p", X[a].astype(np.float64), news.X[b].astype(np.float64))
                for a, b in (pairs[:, lo : lo + PAIRS] for lo in range(0, pairs.shape[1], PAIRS))
            ),
        ]
    )
    fresh = pack(exact, news.ids[pairs[1]])
    good = fresh <= depth[pairs[0]]
    row, fresh = pairs[0][good], fresh[good]
    order = np.lexsort((fresh, row))
    row, fresh = row[order], fresh[order]
    place = np.arange(len(row)) - np.searchsorted(row, row)  # among a row's new ones, nearest first
    keep = place < wanted
    names, at = np.unique(row[keep], return_inverse=True)
    wide = np.full((len(names), int(place[keep].max(initial=-1)) + 1), PAD)
    wide[at, place[keep]] = fresh[keep]
    out: IntArray = keys.copy()
    out[names] = merge(keys[names], wide, wanted)
    return out
