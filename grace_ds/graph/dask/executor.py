"""Run both tiers over Dask: the ring's own steps as tasks, each on the rank that holds its rows, with a tree of merges.

Rows are not sent through the client: a task reads what its own rank has registered here, and shards and packs travel from
worker to worker.  Tasks are functions of this module, so that every rank can import them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.graph.backends import Backend, Opened
from grace_ds.graph.clustered import LocalRows, Packed, work
from grace_ds.graph.dask.cluster import Cluster, cluster
from grace_ds.graph.merge import PAD, merge
from grace_ds.graph.placement import Placement
from grace_ds.graph.rows import Request, Shard
from grace_ds.graph.search import search
from grace_ds.records import FloatArray, IntArray


@dataclass
class _Side:
    """Inputs of the tasks on this rank, and their result.

    Attributes:
        queries, shard: of the exact tier.
        rows: of the clustered tier.
        keys: (n, wanted) int64, the result of the exact tier.
    """

    rank: int
    wanted: int
    backend: Backend
    queries: FloatArray | None = None
    shard: Shard | None = None
    rows: LocalRows | None = None
    keys: IntArray | None = None


_SIDES: dict[str, _Side] = {}


def exact_keys(comm: Comm, queries: FloatArray, shard: Shard, wanted: int, backend: Backend) -> IntArray:
    """Search this rank's distinct queries among the shards of all ranks; return (n, wanted) keys.  Collective.

    Raises:
        ExecutorError: on rank 0, which must call ``comm.abort()`` to stop the others.
    """
    with _registered(comm, _Side(comm.rank, wanted, backend, queries=queries, shard=shard)) as (token, side):
        with cluster(comm) as dask:
            if dask is not None:
                with _joined(dask, token, backend):
                    dask.wait([_exact_of(dask, token, rank) for rank in range(comm.size)])
            comm.agree()  # the results of the other ranks are complete once rank 0 agrees
        assert side.keys is not None
        return side.keys


def clustered_keys(comm: Comm, request: Request, backend: Backend, placement: Placement) -> IntArray:
    """Search as :func:`grace_ds.graph.clustered.nearest_keys` does.  Collective.

    Raises:
        ExecutorError: on rank 0, which must call ``comm.abort()`` to stop the others.
    """
    rows = LocalRows(request, placement, comm.size)
    with _registered(comm, _Side(comm.rank, request.wanted, backend, rows=rows)) as (token, _):
        with cluster(comm) as dask:
            if dask is not None:
                with _joined(dask, token, backend):
                    for wave in range(len(rows.waves)):  # one after another, to bound what a rank holds
                        dask.wait(_wave_of(dask, token, wave))
            comm.agree()
        return rows.keys


@contextmanager
def _registered(comm: Comm, side: _Side) -> Iterator[tuple[str, _Side]]:
    token = comm.broadcast(np.frombuffer(os.urandom(8), np.int64) if comm.rank == 0 else None).tobytes().hex()
    _SIDES[token] = side
    try:
        yield token, side
    finally:
        del _SIDES[token]


@contextmanager
def _joined(dask: Cluster, token: str, backend: Backend) -> Iterator[None]:
    """For a back end that runs on GPUs, set up an NCCL clique of the workers and its RAFT handle in each rank's back end."""
    if not isinstance(backend, Opened):
        yield
        return
    from grace_ds.graph.gpu.raft_comms import dask_clique

    with dask_clique(dask.client, dask.workers) as session:
        dask.wait([_on(dask, rank, _bind, token, session) for rank in range(len(dask.workers))])
        yield


def _exact_of(dask: Cluster, token: str, rank: int) -> Any:
    """Return the future of one rank's result: its queries against every shard, merged in a tree."""
    shards = [_on(dask, source, _shard, token) for source in range(len(dask.workers))]
    order = [(rank + step) % len(shards) for step in range(len(shards))]  # so that not all ranks read from the same one at once
    parts = [_on(dask, rank, _part, token, shards[source], priority=-step) for step, source in enumerate(order)]
    while len(parts) > 1:
        pairs = [_on(dask, rank, _merged, token, *parts[i : i + 2]) for i in range(0, len(parts) - 1, 2)]
        parts = pairs + parts[len(pairs) * 2 :]
    return _on(dask, rank, _deliver, token, parts[0])


def _wave_of(dask: Cluster, token: str, wave: int) -> list[Any]:
    """Return the futures of one wave: rows packed on every rank, searched by the owners, merged on every rank."""
    ranks = range(len(dask.workers))
    packs = [[_on(dask, rank, _pack, token, wave, owner) for rank in ranks] for owner in ranks]
    found = [_on(dask, owner, _work, token, wave, *packs[owner]) for owner in ranks]
    answers = [[_on(dask, owner, _pick, found[owner], rank) for owner in ranks] for rank in ranks]
    return [_on(dask, rank, _take, token, wave, *answers[rank]) for rank in ranks]


def _on(dask: Cluster, rank: int, task: Any, *args: Any, priority: int = 0) -> Any:
    where = [dask.workers[rank]]
    return dask.client.submit(task, *args, workers=where, allow_other_workers=False, pure=False, retries=0, priority=priority)


def _bind(token: str, session: bytes) -> int:
    from grace_ds.graph.gpu.raft_comms import handle_here

    backend = _SIDES[token].backend
    assert isinstance(backend, Opened)
    backend.bind(handle_here(session))
    return 0


def _shard(token: str) -> Shard:
    shard = _SIDES[token].shard
    assert shard is not None
    return shard


def _part(token: str, shard: Shard) -> IntArray:
    side = _SIDES[token]
    assert side.queries is not None
    return search(side.queries, shard, side.wanted, side.backend)


def _merged(token: str, a: IntArray, b: IntArray) -> IntArray:
    return merge(a, b, _SIDES[token].wanted)


def _deliver(token: str, keys: IntArray) -> int:
    side = _SIDES[token]
    side.keys = merge(np.full((len(keys), 0), PAD), keys, side.wanted)
    return len(keys)


def _pack(token: str, wave: int, owner: int) -> Packed:
    rows = _SIDES[token].rows
    assert rows is not None
    return rows.pack(rows.waves[wave], owner)


def _work(token: str, wave: int, *packs: Packed) -> list[IntArray]:
    side = _SIDES[token]
    assert side.rows is not None
    tasks = [task for task in side.rows.waves[wave] if task.owner == side.rank]
    return work(tasks, list(packs), side.wanted, side.backend)


def _pick(found: list[IntArray], rank: int) -> IntArray:
    return found[rank]


def _take(token: str, wave: int, *answers: IntArray) -> int:
    rows = _SIDES[token].rows
    assert rows is not None
    rows.take(rows.waves[wave], list(answers))
    return len(answers)
