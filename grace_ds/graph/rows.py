"""Prepare queries and index rows for exact similarities, and find the distinct rows among them with their ids."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from grace_ds.errors import DataError
from grace_ds.records import FloatArray, IntArray
from grace_ds.utils.grid import on_grid

_HASH_ROWS = 8192


@dataclass(frozen=True)
class Request:
    """One rank's queries and index rows for the k-NN graph; the rows are on the grid already (:meth:`of`).

    Attributes:
        q_ids: (n,) int64, dataset ids of the queries, this rank.
        Q: (n, d) float32, unit norm, or zero if a sample has no features.
        ids: (m,) int64, below 2**40, of the index rows, this rank; each on one rank only; m may differ between ranks.
        X: (m, d) float32; the same object as ``Q`` if the queries are the index rows, which are then held and sent once.
        k: neighbours wanted.
        exclude_self: whether to leave a query's own id out of its neighbours.
    """

    q_ids: IntArray
    Q: FloatArray
    ids: IntArray
    X: FloatArray
    k: int
    exclude_self: bool = True

    @staticmethod
    def of(
        q_ids: IntArray, Q: FloatArray, k: int, index: tuple[IntArray, FloatArray] | None = None, exclude_self: bool = True
    ) -> Request:
        """Build the request of the queries ``q_ids``, ``Q`` against the ids and rows of ``index``; None: against themselves.

        Raises:
            DataError: a row is not finite or longer than 1, or shapes disagree.
        """
        if index is None:
            ids, X = q_ids, prepared(q_ids, Q)
            return Request(ids, X, ids, X, k, exclude_self)
        ids, X = index
        if Q.ndim == 2 and X.ndim == 2 and Q.shape[1] != X.shape[1]:
            raise DataError(f"queries are {Q.shape[1]} wide, index rows {X.shape[1]}: use one feature space")
        return Request(q_ids, prepared(q_ids, Q), ids, prepared(ids, X), k, exclude_self)

    def with_spare(self, spare: int) -> Request:
        """Return the same request with ``spare`` more neighbours."""
        return replace(self, k=self.k + spare)

    @property
    def alike(self) -> bool:
        """Whether the queries are the index rows."""
        return self.Q is self.X

    @property
    def wanted(self) -> int:
        """Number of nearest rows to search for, so that k are left without a query's own id."""
        return self.k + int(self.exclude_self)


@dataclass(frozen=True)
class Shard:
    """Distinct rows, and the dataset ids that have them.

    Attributes:
        X: (m, d) float32, distinct, multiples of 2**-25.
        members: (r, 2) int64, (row of X, dataset id), sorted; of each row only as many of the lowest ids as can matter.
    """

    X: FloatArray
    members: IntArray


def prepared(ids: IntArray, X: FloatArray) -> FloatArray:
    """Check ``X`` (n, d) and return it on the grid of :mod:`grace_ds.utils.grid`; the same array if it is there already.

    Raises:
        DataError: a row is not finite or longer than 1, or the number of rows is not that of the ids.
    """
    if X.ndim != 2 or len(X) != len(ids):
        raise DataError(f"{len(ids)} ids came with features of shape {X.shape}: give one row per id")
    length = np.einsum("nd,nd->n", X, X)
    bad = ~(length <= 1.001)
    if bad.any():
        at = int(np.argmax(bad))
        raise DataError(
            f"features of sample {int(ids[at])} have squared length {length[at]}: rows must be finite and of unit norm"
        )
    return on_grid(X)


def distinct(ids: IntArray, X: FloatArray) -> tuple[FloatArray, IntArray]:
    """Return (distinct rows (m, d), the distinct row of each row of ``X`` (n,)) of prepared rows."""
    return _rows(X, *_order(ids, X))


def collapse(ids: IntArray, X: FloatArray, keep: int) -> Shard:
    """Return the shard of prepared rows, with the ``keep`` lowest ids of equal rows; no others can be among the nearest."""
    order, group = _order(ids, X)
    return Shard(_rows(X, order, group)[0], _members(ids, order, group, keep))


def both(ids: IntArray, X: FloatArray, keep: int) -> tuple[Shard, IntArray]:
    """Return :func:`collapse`, and the shard row of each row of ``X``, for rows that are both queries and index."""
    order, group = _order(ids, X)
    rows, which = _rows(X, order, group)
    return Shard(rows, _members(ids, order, group, keep)), which


def _rows(X: FloatArray, order: IntArray, group: IntArray) -> tuple[FloatArray, IntArray]:
    which = np.empty(len(X), np.int64)
    which[order] = group
    start = _starts(group)
    untouched = len(start) == len(X) and bool((order == np.arange(len(X))).all())
    return (X if untouched else X[order[start]]), which


def _members(ids: IntArray, order: IntArray, group: IntArray, keep: int) -> IntArray:
    place = np.arange(len(group)) - _starts(group)[group]
    return np.ascontiguousarray(np.stack([group, np.asarray(ids, np.int64)[order]], axis=1)[place < keep])


def _order(ids: IntArray, X: FloatArray) -> tuple[IntArray, IntArray]:
    """Order the rows so that equal ones are adjacent, by id among them; return the order and each row's group number.

    Groups are numbered by their lowest id, so that without duplicates the caller's order by id is kept.
    """
    multipliers = np.random.Generator(np.random.PCG64(20)).integers(0, 1 << 63, X.shape[1], dtype=np.uint64) * 2 + 1
    hashed = np.empty(len(X), np.uint64)
    for start in range(0, len(X), _HASH_ROWS):
        bits = np.ascontiguousarray(X[start : start + _HASH_ROWS]).view(np.uint32)
        hashed[start : start + _HASH_ROWS] = (bits * multipliers).sum(axis=1, dtype=np.uint64)
    order = np.lexsort((ids, hashed))
    new_group = np.ones(len(X), bool)
    same = np.flatnonzero(hashed[order[1:]] == hashed[order[:-1]]) + 1
    new_group[same] = (X[order[same]] != X[order[same - 1]]).any(axis=1)  # a collision of hashes only splits a group
    group = np.cumsum(new_group) - 1
    number = np.empty(int(new_group.sum()), np.int64)
    number[np.argsort(ids[order[new_group]], kind="stable")] = np.arange(len(number))
    group = number[group]
    by_group = np.argsort(group, kind="stable")
    return order[by_group], group[by_group]


def _starts(group: IntArray) -> IntArray:
    return np.flatnonzero(np.diff(group, prepend=-1))
