"""Rows that have moved, put into the lists of the rows that they have come near to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.graph.merge import PAD, merge, pack, unpack
from grace_ds.graph.search import rounding
from grace_ds.records import Array, FloatArray, IntArray

BLOCK = 1 << 20  # similarities at a time
PAIRS = 1 << 13  # pairs of rows at a time whose similarity is computed exactly: with 128 columns 8 MiB each side
HELD = 1 << 22  # pairs that are held at a time: 32 MiB


@dataclass(frozen=True)
class Moved:
    """The moved rows of all ranks, in rank order.

    Attributes:
        ids: (m,) int64.
        X: (m, d) float32.
        where: (m, o) int32, their clusters; o is 0 in the exact tier.
    """

    ids: IntArray
    X: FloatArray
    where: Array

    @staticmethod
    def gathered(comm: Comm, ids: IntArray, X: FloatArray, where: Array) -> Moved:
        """All ranks' parts.  Collective."""
        return Moved(*(np.concatenate(comm.allgather(np.ascontiguousarray(a))) for a in (ids, X, where)))


def insert(ids: IntArray, X: FloatArray, where: Array, keys: IntArray, depth: IntArray, moved: Moved) -> IntArray:
    """The lists of this rank's rows with those moved rows that belong in.

    Args:
        ids, X, where: (n,), (n, d), (n, o) of this rank; rows are compared where they share a cluster, all where o is 0.
        keys: (n, w) their lists, changed in place; a list takes a moved row in that is no further than ``depth`` (n,).
        moved: of all ranks; those of this rank are among ``ids`` too and are left alone.

    Returns:
        ``keys``.
    """
    if not len(moved.ids) or not len(ids):
        return keys
    bar = unpack(depth[:, None]).similarity[:, 0].astype(np.float32) - np.float32(rounding(X.shape[1]))
    bar[np.isin(ids, moved.ids)] = np.inf  # their own lists are searched for
    near, held = [np.empty(0, np.int64)], 0
    for rows, columns in _shared(where, moved.where):
        there = moved.X[columns].T
        step = max(1, min(PAIRS, BLOCK // len(columns)))  # of a cluster that few have moved into not all rows at once
        for lo in range(0, len(rows), step):
            part = rows[lo : lo + step]
            found = np.flatnonzero(X[part] @ there >= bar[part][:, None])  # several times faster than nonzero in two axes
            row, column = np.divmod(found, len(columns))
            near.append(part[row] * len(moved.ids) + columns[column])
            held += len(found)
            if held > HELD:
                _take_in(keys, depth, near, X, moved)
                near, held = near[:1], 0
    _take_in(keys, depth, near, X, moved)
    return keys


def _shared(here: Array, there: Array) -> list[tuple[IntArray, IntArray]]:
    """(rows, moved rows) of each cluster that has both."""
    if not here.shape[1]:
        return [(np.arange(len(here)), np.arange(len(there)))]
    mine, theirs = _by_cluster(here), _by_cluster(there)
    return [(mine[c], columns) for c, columns in theirs.items() if c in mine]


def _by_cluster(where: Array) -> dict[int, IntArray]:
    flat = where.reshape(-1)
    order = np.argsort(flat, kind="stable")
    names, start = np.unique(flat[order], return_index=True)
    return {int(c): rows // where.shape[1] for c, rows in zip(names, np.split(order, start[1:]), strict=True)}


def _take_in(keys: IntArray, depth: IntArray, parts: list[IntArray], X: FloatArray, moved: Moved) -> None:
    """Puts those moved rows into the lists that are no further than the list is complete; one that is there already stays once.

    Args: ``parts`` of pairs: row times the number of moved rows, plus the moved row.
    """
    pairs, wanted = np.unique(np.concatenate(parts)), keys.shape[1]
    rows, found = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for lo in range(0, len(pairs), PAIRS):  # most of them are not taken
        a, b = np.divmod(pairs[lo : lo + PAIRS], len(moved.ids))
        near = pack(np.einsum("pd,pd->p", X[a].astype(np.float64), moved.X[b].astype(np.float64)), moved.ids[b])
        good = near <= depth[a]
        rows.append(a[good])
        found.append(near[good])
    row, fresh = np.concatenate(rows), np.concatenate(found)
    order = np.lexsort((fresh, row))
    row, fresh = row[order], fresh[order]
    place = np.arange(len(row)) - np.searchsorted(row, row)  # among a row's new ones, nearest first
    keep = place < wanted
    names, at = np.unique(row[keep], return_inverse=True)
    wide = np.full((len(names), int(place[keep].max(initial=-1)) + 1), PAD)
    wide[at, place[keep]] = fresh[keep]
    keys[names] = merge(keys[names], wide, wanted)
