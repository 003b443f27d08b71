"""The exact tier of the k-NN graph: queries stay, index shards go round the ring, every rank ends with its own rows.

The result does not depend on how the rows are spread over ranks: similarities are exact numbers, equal ones are ordered
by id, and never by the order in which a backend or a rank found them (:mod:`grace_ds.graph.search`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.graph.backends import Backend
from grace_ds.graph.merge import PAD, finished, merge
from grace_ds.graph.rows import Request, Shard, both, collapse, distinct
from grace_ds.graph.search import search
from grace_ds.records import FloatArray, IntArray, Neighbours

Executor = Callable[[Comm, FloatArray, Shard, int, Backend], IntArray]


def nearest(comm: Comm, asked: Request, backend: Backend, over: Executor | None = None) -> Neighbours:
    """This rank's queries against the index rows of all ranks; all ranks call it together.  Arguments: :func:`nearest_keys`.

    Returns:
        (n, k) ids and cosines in multiples of 2**-20, nearest first, ties by the lower id, for this rank's queries.
    """
    return finished(nearest_keys(comm, asked, backend, over), asked.q_ids, asked.k, asked.exclude_self)


def nearest_keys(comm: Comm, asked: Request, backend: Backend, over: Executor | None = None) -> IntArray:
    """The same as (n, wanted) keys of :mod:`grace_ds.graph.merge`, a query's own among them.  Collective.

    Args:
        comm: transport; ``comm.size - 1`` ring steps, none on a single rank.
        asked: of this rank.
        backend: the same on all ranks.  With an exact one the result is the same for any number of ranks.
        over: another executor than the ring: what :func:`rotate` does.
    """
    if asked.alike:
        shard, which = both(asked.ids, asked.X, asked.wanted)
        queries = shard.X
    else:
        shard = collapse(asked.ids, asked.X, asked.wanted)
        queries, which = distinct(asked.q_ids, asked.Q)
    keys = (over or rotate)(comm, queries, shard, asked.wanted, backend)
    return keys if np.array_equal(which, np.arange(len(queries))) else keys[which]


def rotate(comm: Comm, queries: FloatArray, shard: Shard, wanted: int, backend: Backend) -> IntArray:
    """(n, wanted) keys of this rank's distinct queries among the shards of all ranks.  Collective."""
    keys = np.full((len(queries), 0), PAD)
    for step in range(comm.size):
        keys = merge(keys, search(queries, shard, wanted, backend), wanted)
        if step + 1 < comm.size:
            shard = Shard(comm.shift(shard.X), comm.shift(shard.members))
    return keys
