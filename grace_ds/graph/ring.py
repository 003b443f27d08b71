"""The exact tier of the k-NN graph: queries stay, index shards go round the ring, every rank ends with its own rows.

The result does not depend on how the rows are spread over ranks: similarities are exact numbers, equal ones are ordered
by id, and never by the order in which a leaf or a rank found them (:mod:`grace_ds.graph.search`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.errors import DataError
from grace_ds.graph.leaves import Leaf
from grace_ds.graph.merge import PAD, finished, merge
from grace_ds.graph.rows import Shard, both, collapse, distinct, prepared
from grace_ds.graph.search import search
from grace_ds.records import FloatArray, IntArray, Neighbours


def nearest(
    comm: Comm,
    q_ids: IntArray,
    Q: FloatArray,
    ids: IntArray,
    X: FloatArray,
    k: int,
    leaf: Leaf,
    exclude_self: bool = True,
    over: Callable[[Comm, FloatArray, Shard, int, Leaf], IntArray] | None = None,
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
        over: another executor than the ring: what :func:`rotate` does.

    Returns:
        (n, k) ids and cosines in multiples of 2**-20, nearest first, ties by the lower id, for this rank's queries.

    Raises:
        DataError: a row is not finite or longer than 1, shapes disagree, or an id is too large.
    """
    wanted = k + int(exclude_self)
    rows = prepared(ids, X)
    if Q is X and q_ids is ids:
        shard, which = both(ids, rows, wanted)
        queries = shard.X
    else:
        shard = collapse(ids, rows, wanted)
        queries, which = distinct(q_ids, prepared(q_ids, Q))
    if queries.shape[1] != shard.X.shape[1]:
        raise DataError(f"queries are {queries.shape[1]} wide, index rows {shard.X.shape[1]}: use one feature space")
    keys = (over or rotate)(comm, queries, shard, wanted, leaf)
    if not np.array_equal(which, np.arange(len(queries))):
        keys = keys[which]
    return finished(keys, q_ids, k, exclude_self)


def rotate(comm: Comm, queries: FloatArray, shard: Shard, wanted: int, leaf: Leaf) -> IntArray:
    """(n, wanted) keys of this rank's distinct queries among the shards of all ranks.  Collective."""
    keys = np.full((len(queries), 0), PAD)
    for step in range(comm.size):
        keys = merge(keys, search(queries, shard, wanted, leaf), wanted)
        if step + 1 < comm.size:
            shard = Shard(comm.shift(shard.X), comm.shift(shard.members))
    return keys
