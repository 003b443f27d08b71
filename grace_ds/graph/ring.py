"""Build the exact tier of the k-NN graph: queries stay, index shards go round the ring, each rank gets its own rows' neighbours.

The result does not depend on how the rows are spread over ranks.  Similarities are exact numbers, and equal ones are ordered
by id, never by the order in which a back end or a rank found them (:mod:`grace_ds.graph.search`).
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


def nearest(comm: Comm, request: Request, backend: Backend) -> Neighbours:
    """Search this rank's queries among the index rows of all ranks.  Collective.  Arguments: :func:`nearest_keys`.

    Returns:
        (n, k) ids and cosines in multiples of 2**-20, nearest first, ties by the lower id, for this rank's queries.
    """
    return finished(nearest_keys(comm, request, backend), request.q_ids, request.k, request.exclude_self)


def nearest_keys(comm: Comm, request: Request, backend: Backend, executor: Executor | None = None) -> IntArray:
    """Return the same as (n, wanted) keys of :mod:`grace_ds.graph.merge`; they include a query's own key.  Collective.

    Args:
        comm: transport; ``comm.size - 1`` ring steps, none on a single rank.
        request: of this rank.
        backend: the same on all ranks.  With an exact one the result is the same for any number of ranks.
        executor: replaces :func:`rotate`; None: the ring.
    """
    if request.alike:
        shard, which = both(request.ids, request.X, request.wanted)
        queries = shard.X
    else:
        shard = collapse(request.ids, request.X, request.wanted)
        queries, which = distinct(request.q_ids, request.Q)
    keys = (executor or rotate)(comm, queries, shard, request.wanted, backend)
    return keys if np.array_equal(which, np.arange(len(queries))) else keys[which]


def rotate(comm: Comm, queries: FloatArray, shard: Shard, wanted: int, backend: Backend) -> IntArray:
    """Search this rank's distinct queries among the shards of all ranks; return (n, wanted) keys.  Collective."""
    keys = np.full((len(queries), 0), PAD)
    for step in range(comm.size):
        keys = merge(keys, search(queries, shard, wanted, backend), wanted)
        if step + 1 < comm.size:
            shard = Shard(comm.shift(shard.X), comm.shift(shard.members))
    return keys
