"""The exact tier of the k-NN graph: queries stay, index shards go round the ring, every rank ends with its own rows.

The result does not depend on how the rows are spread over ranks.  Three things make it so:

* rows are rounded to multiples of 2**-25, so that every product and partial sum of an inner product of (nearly) unit
  vectors is a multiple of 2**-50 below 4 and therefore exact in float64, in whatever order a library adds them up;
* candidates are ordered by that similarity and then by id, never by the order in which a leaf or a rank found them;
* equal rows are searched for once and counted by their ids, and where a leaf's last candidate might tie with the k-th
  neighbour more candidates are asked for: crowds of near-duplicates cannot push each other out at random.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.errors import DataError
from grace_ds.graph.leaves import Leaf
from grace_ds.graph.merge import GRID, PAD, merge, pack, unpack, without_self
from grace_ds.records import Array, FloatArray, IntArray, Neighbours

SLACK = 8  # candidates beyond k, so that float32 rounding in a leaf rarely matters at the boundary
ROW_GRID = float(1 << 25)  # float32 resolves at least this everywhere below 1
BLOCK = 1 << 19  # float64 numbers of one block of exact similarities: 4 MiB, so that it stays in the cache
WIDE = 1 << 24  # candidates held at once while searching more widely


@dataclass(frozen=True)
class Shard:
    """Distinct rows of one rank and who they belong to.

    Attributes:
        X: (m, d) float32, distinct, multiples of 2**-25.
        members: (r, 2) int64, (row of X, dataset id), sorted; the lowest ids of a row only, as many as can matter.
    """

    X: FloatArray
    members: IntArray


def nearest(
    comm: Comm,
    q_ids: IntArray,
    Q: FloatArray,
    ids: IntArray,
    X: FloatArray,
    k: int,
    leaf: Leaf,
    exclude_self: bool = True,
) -> Neighbours:
    """This rank's queries against the index rows of all ranks; all ranks call it together.

    Args:
        comm: transport; ``comm.size - 1`` ring steps, none on a single rank.
        q_ids: (n,) int64, dataset ids of the queries, this rank.
        Q: (n, d) float32, unit norm (or zero where a sample has no features), this rank.
        ids: (m,) int64, below 2**40, dataset ids of the index rows, this rank; m differs from rank to rank.
        X: (m, d) float32, unit norm or zero, this rank.
        k: neighbours wanted.
        leaf: the same on all ranks.  With an exact one the result is the same for any number of ranks.
        exclude_self: whether a query's own id is no neighbour of it.

    Returns:
        (n, k) ids and cosines in multiples of 2**-20, nearest first, ties by the lower id, for this rank's queries.

    Raises:
        DataError: a row is not finite or longer than 1, shapes disagree, or an id is too large.
    """
    wanted = k + int(exclude_self)
    shard = _collapse(ids, X, wanted)
    queries, which = _distinct(q_ids, _rounded(q_ids, Q))
    if queries.shape[1] != shard.X.shape[1]:
        raise DataError(f"queries are {queries.shape[1]} wide, index rows {shard.X.shape[1]}: use one feature space")
    keys = np.full((len(queries), 0), PAD)
    for step in range(comm.size):
        keys = merge(keys, _search(queries, shard, wanted, leaf), wanted)
        if step + 1 < comm.size:
            shard = Shard(comm.shift(shard.X), comm.shift(shard.members))
    keys = keys[which]
    return unpack(without_self(keys, q_ids, k) if exclude_self else keys)


def _rounded(ids: IntArray, X: FloatArray) -> FloatArray:
    """``X`` on the grid of multiples of 2**-25; adding 0 turns -0 into 0, so that equal rows have equal bits."""
    if X.ndim != 2 or len(X) != len(ids):
        raise DataError(f"{len(ids)} ids came with features of shape {X.shape}: give one row per id")
    length = np.einsum("nd,nd->n", X, X)
    bad = ~(length <= 1.001)
    if bad.any():
        at = int(np.argmax(bad))
        raise DataError(
            f"features of sample {int(ids[at])} have squared length {length[at]}: rows must be finite and of unit norm"
        )
    rows = np.multiply(X, np.float32(ROW_GRID), dtype=np.float32)
    np.rint(rows, out=rows)
    rows *= np.float32(1 / ROW_GRID)
    rows += np.float32(0)
    return np.asarray(rows)


def _order(ids: IntArray, X: FloatArray) -> tuple[IntArray, IntArray]:
    """Rows in an order that puts equal ones together, by id within, and for each in that order its group's number.

    Groups are numbered by their lowest id, so that without duplicates the caller's order by id is kept.
    """
    odd = np.random.Generator(np.random.PCG64(20)).integers(0, 1 << 63, X.shape[1], dtype=np.uint64) * 2 + 1
    hashed = np.empty(len(X), np.uint64)
    for lo in range(0, len(X), 8192):
        bits = np.ascontiguousarray(X[lo : lo + 8192]).view(np.uint32)
        hashed[lo : lo + 8192] = (bits * odd).sum(axis=1, dtype=np.uint64)
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


def _distinct(ids: IntArray, X: FloatArray) -> tuple[FloatArray, IntArray]:
    """(distinct rows (m, d), for each row of ``X`` its distinct row (n,))."""
    order, group = _order(ids, X)
    which = np.empty(len(X), np.int64)
    which[order] = group
    return X[order[_starts(group)]], which


def _collapse(ids: IntArray, X: FloatArray, keep: int) -> Shard:
    """The shard of this rank's rows; of equal rows the ``keep`` lowest ids, as no others can be among the nearest."""
    order, group = _order(ids, rows := _rounded(ids, X))
    start = _starts(group)
    place = np.arange(len(group)) - start[group]
    members = np.stack([group, np.asarray(ids, np.int64)[order]], axis=1)[place < keep]
    return Shard(rows[order[start]], np.ascontiguousarray(members))


def _starts(group: IntArray) -> IntArray:
    return np.flatnonzero(np.diff(group, prepend=-1))


def _search(Q: FloatArray, shard: Shard, k: int, leaf: Leaf) -> IntArray:
    """(n, k) keys of the nearest ids in one shard."""
    m, d = shard.X.shape
    if not m or not len(Q):
        return np.full((len(Q), k), PAD)
    index = leaf.build(shard.X, np.arange(m))
    start = np.searchsorted(shard.members[:, 0], np.arange(m + 1))
    # Below this distance from the k-th, a row that the leaf left out may belong in: rounding of both inner products.
    margin = 2 * (d + 2) * 2.0**-24 + 2 / GRID
    if not leaf.is_exact(m):  # it has left out more than rounding could: looking further would not mend that
        position, _ = leaf.search(index, Q, min(k, m))
        return _exact(Q, shard, start, position, k)
    width = min(k + SLACK, m)
    position, approximate = leaf.search(index, Q, width)
    keys = _exact(Q, shard, start, position, k)
    todo = np.flatnonzero(_undecided(keys, approximate[:, -1], margin)) if width < m else np.empty(0, np.int64)
    while len(todo):
        width, again = min(4 * width, m), []
        for part in np.array_split(todo, -(-len(todo) * width // WIDE)):
            position, approximate = leaf.search(index, Q[part], width)
            keys[part] = _exact(Q[part], shard, start, position, k)
            again.append(part[_undecided(keys[part], approximate[:, -1], margin)])
        todo = np.concatenate(again) if width < m else todo[:0]
    return keys


def _undecided(keys: IntArray, last: Array, margin: float) -> Array:
    """(n,) bool: whether a row below the leaf's last candidate could still be among the nearest."""
    kth = unpack(keys[:, -1:]).similarity[:, 0].astype(np.float64)
    return np.isfinite(last) & (last >= kth - margin)


def _exact(Q: FloatArray, shard: Shard, start: IntArray, position: IntArray, k: int) -> IntArray:
    """(n, k) keys of the ids behind the candidate rows, by exact similarity.

    Args:
        Q: (n, d) float32 on the grid.
        shard: the rows that ``position`` counts.
        start: (m + 1,) where each row's members begin.
        position: (n, j) int64, candidate rows; -1 for none.
        k: columns wanted.
    """
    count = np.diff(start)
    keys = np.empty((len(Q), k), np.int64)
    step = max(1, BLOCK // max(1, position.shape[1] * Q.shape[1]))
    for lo in range(0, len(Q), step):
        at = position[lo : lo + step]
        rows = np.take(shard.X, at, axis=0, mode="wrap").astype(np.float64)
        similarity = np.matmul(rows, Q[lo : lo + step, :, None].astype(np.float64))
        similarity[at < 0] = -np.inf
        spread = int(count[at].max(initial=1))
        slot = start[at][:, :, None] + np.arange(spread)
        held = np.arange(spread) < count[at][:, :, None]
        ids = np.where(held, shard.members[np.where(held, slot, 0), 1], -1)
        found = pack(similarity, ids).reshape(len(at), -1)
        keys[lo : lo + step] = merge(found, found[:, :0], k)
    return keys
