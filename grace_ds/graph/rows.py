"""What is asked and what is searched: rows made ready for exact similarities, and the distinct ones among them with their ids."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from grace_ds.errors import DataError
from grace_ds.records import FloatArray, IntArray
from grace_ds.utils.grid import on_grid

_HASH_ROWS = 8192


@dataclass(frozen=True)
class Request:
    """What one rank asks of the k-NN graph and what it brings to it; rows are on the grid already (:meth:`of`).

    Attributes:
        q_ids: (n,) int64, dataset ids of the queries, this rank.
        Q: (n, d) float32, unit norm, or zero where a sample has no features.
        ids: (m,) int64, below 2**40, of the index rows, this rank; each on one rank only; m differs from rank to rank.
        X: (m, d) float32; the very array ``Q`` where the queries are the index rows, which are then held and sent once.
        k: neighbours wanted.
        exclude_self: whether a query's own id is no neighbour of it.
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
        """The queries ``q_ids``, ``Q`` against the ids and rows of ``index``; None: against themselves.

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
        """The same with ``spare`` more neighbours wanted."""
        return replace(self, k=self.k + spare)

    @property
    def alike(self) -> bool:
        """Whether the queries are the index rows."""
        return self.Q is self.X

    @property
    def wanted(self) -> int:
        """Nearest rows to look for, so that k are left without a query's own."""
        return self.k + int(self.exclude_self)


@dataclass(frozen=True)
class Shard:
    """Distinct rows and who they belong to.

    Attributes:
        X: (m, d) float32, distinct, multiples of 2**-25.
        members: (r, 2) int64, (row of X, dataset id), sorted; the lowest ids of a row only, as many as can matter.
    """

    X: FloatArray
    members: IntArray


def prepared(ids: IntArray, X: FloatArray) -> FloatArray:
    """``X`` (n, d) on the grid of :mod:`grace_ds.utils.grid`, checked; itself where it lies there already.

    Raises:
        DataError: a row is not finite or longer than 1, or there is not one row an id.
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
    """(distinct rows (m, d), for each row of ``X`` its distinct row (n,)), of prepared rows."""
    return _rows(X, *_order(ids, X))


def collapse(ids: IntArray, X: FloatArray, keep: int) -> Shard:
    """The shard of prepared rows; of equal ones the ``keep`` lowest ids, as no others can be among the nearest."""
    order, group = _order(ids, X)
    return Shard(_rows(X, order, group)[0], _members(ids, order, group, keep))


def both(ids: IntArray, X: FloatArray, keep: int) -> tuple[Shard, IntArray]:
    """:func:`collapse`, and for each row of ``X`` its row in the shard: where the rows are queries and index alike."""
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
    """Rows in an order that puts equal ones together, by id within, and for each in that order its group's number.

    Groups are numbered by their lowest id, so that without duplicates the caller's order by id is kept.
    """
    odd = np.random.Generator(np.random.PCG64(20)).integers(0, 1 << 63, X.shape[1], dtype=np.uint64) * 2 + 1
    hashed = np.empty(len(X), np.uint64)
    for lo in range(0, len(X), _HASH_ROWS):
        bits = np.ascontiguousarray(X[lo : lo + _HASH_ROWS]).view(np.uint32)
        hashed[lo : lo + _HASH_ROWS] = (bits * odd).sum(axis=1, dtype=np.uint64)
    order = np.lexsort((ids, hashed))
    fresh = np.ones(len(X), bool)
    same = np.flatnonzero(hashed[order[1:]] == hashed[order[:-1]]) + 1
    fresh[same] = (X[order[same]] != X[order[same - 1]]).any(axis=1)  # a collision of hashes only splits a group
    group = np.cumsum(fresh) - 1
    number = np.empty(int(fresh.sum()), np.int64)
    number[np.argsort(ids[order[fresh]], kind="stable")] = np.arange(len(number))
    group = number[group]
    by_group = np.argsort(group, kind="stable")
    return order[by_group], group[by_group]


def _starts(group: IntArray) -> IntArray:
    return np.flatnonzero(np.diff(group, prepend=-1))
