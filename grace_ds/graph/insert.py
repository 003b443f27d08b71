"""Insert rows that have moved into the neighbour lists of the rows that they are now near to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.graph.merge import PAD, merge, pack, unpack
from grace_ds.graph.search import rounding
from grace_ds.records import Array, FloatArray, IntArray

BLOCK = 1 << 20  # similarities computed at a time
PAIRS = 1 << 13  # pairs of rows per block of exact similarities: with 128 columns 8 MiB for each side
HELD = 1 << 22  # pairs held at a time: 32 MiB


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
        """Gather all ranks' parts.  Collective."""
        return Moved(*(np.concatenate(comm.allgather(np.ascontiguousarray(a))) for a in (ids, X, where)))


def insert(ids: IntArray, X: FloatArray, where: Array, keys: IntArray, depth: IntArray, moved: Moved) -> IntArray:
    """Insert moved rows into the lists of this rank's rows where they belong.

    Args:
        ids, X, where: (n,), (n, d), (n, o) of this rank; rows are compared if they share a cluster, all of them if o is 0.
        keys: (n, w) their lists, changed in place; a list takes a moved row that is no further than ``depth`` (n,).
        depth: (n,) int64 keys.
        moved: of all ranks; those of this rank are among ``ids`` too and keep their own lists.

    Returns:
        ``keys``.
    """
    if not len(moved.ids) or not len(ids):
        return keys
    threshold = unpack(depth[:, None]).similarity[:, 0].astype(np.float32) - np.float32(rounding(X.shape[1]))
    threshold[np.isin(ids, moved.ids)] = np.inf  # their own lists come from a search
    near, held = [np.empty(0, np.int64)], 0
    for rows, columns in _shared(where, moved.where):
        moved_columns = moved.X[columns].T
        step = max(1, min(PAIRS, BLOCK // len(columns)))  # not all rows of a cluster at once if few rows have moved into it
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            found = np.flatnonzero(
                X[part] @ moved_columns >= threshold[part][:, None]
            )  # several times faster than nonzero in two axes
            row, column = np.divmod(found, len(columns))
            near.append(part[row] * len(moved.ids) + columns[column])
            held += len(found)
            if held > HELD:
                _take_in(keys, depth, near, X, moved)
                near, held = near[:1], 0
    _take_in(keys, depth, near, X, moved)
    return keys


def _shared(where: Array, moved_where: Array) -> list[tuple[IntArray, IntArray]]:
    """Return (rows, moved rows) of each cluster that has both."""
    if not where.shape[1]:
        return [(np.arange(len(where)), np.arange(len(moved_where)))]
    own_rows, moved_rows = _by_cluster(where), _by_cluster(moved_where)
    return [(own_rows[c], columns) for c, columns in moved_rows.items() if c in own_rows]


def _by_cluster(where: Array) -> dict[int, IntArray]:
    flat = where.reshape(-1)
    order = np.argsort(flat, kind="stable")
    names, start = np.unique(flat[order], return_index=True)
    return {int(c): rows // where.shape[1] for c, rows in zip(names, np.split(order, start[1:]), strict=True)}


def _take_in(keys: IntArray, depth: IntArray, parts: list[IntArray], X: FloatArray, moved: Moved) -> None:
    """Put moved rows into the lists that are complete at least to their distance; one that is already listed stays once.

    Args: ``parts`` of pairs: row times the number of moved rows, plus the moved row.

    Args: ``parts`` of pairs: row times the number of moved rows, plus the moved row.
    """
    pairs, wanted = np.unique(np.concatenate(parts)), keys.shape[1]
    rows, found = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for lo in range(0, len(pairs), PAIRS):  # most pairs are not inserted
        a, b = np.divmod(pairs[lo : lo + PAIRS], len(moved.ids))
        near = pack(np.einsum("pd,pd->p", X[a].astype(np.float64), moved.X[b].astype(np.float64)), moved.ids[b])
        close_enough = near <= depth[a]
        rows.append(a[close_enough])
        found.append(near[close_enough])
    row, new_keys = np.concatenate(rows), np.concatenate(found)
    order = np.lexsort((new_keys, row))
    row, new_keys = row[order], new_keys[order]
    position = np.arange(len(row)) - np.searchsorted(row, row)  # rank among the row's new keys, nearest first
    keep = position < wanted
    names, at = np.unique(row[keep], return_inverse=True)
    wide = np.full((len(names), int(position[keep].max(initial=-1)) + 1), PAD)
    wide[at, position[keep]] = new_keys[keep]
    keys[names] = merge(keys[names], wide, wanted)
