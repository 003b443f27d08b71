"""Build the clustered tier of the k-NN graph: each row goes to its nearest clusters, and rows in a common cluster are compared.

    place → waves of (send to the owners → search each cluster → send back → merge)

A cluster is searched exactly and whole by the rank that owns it.  The queries of a giant cluster are divided among several
ranks, but every part meets all of its index rows.  So the edges do not depend on the number of ranks, nor on the waves,
which only bound what a rank holds at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.graph.backends import Backend
from grace_ds.graph.merge import PAD, merge
from grace_ds.graph.placement import Placement
from grace_ds.graph.rows import Request, both, collapse, distinct
from grace_ds.graph.search import search
from grace_ds.records import Array, FloatArray, IntArray
from grace_ds.utils.hashing import splitmix64

LEAST_WAVE = 1 << 20  # minimum bytes of rows sent to a rank in a wave
WAVE_SHARE = 32  # else the limit of a wave is a thirty-second of the index rows that the rank holds
GIANT = 4  # parts of the whole work per rank: a cluster that costs more has its queries divided


@dataclass(frozen=True)
class Task:
    """One part of a cluster's queries against all of its index rows, on the rank ``owner``."""

    cluster: int
    part: int
    parts: int
    owner: int


def waves(placement: Placement, ranks: int, width: int, alike: bool, limit: int) -> list[list[Task]]:
    """Plan the work of all ranks, in waves.

    A pure function, so that every rank makes the same plan.  Tasks go longest first to the rank with the least work so far
    (Graham 1969).

    Args:
        placement: sizes of the clusters over all ranks.
        ranks: number of ranks.
        width: of the rows.
        alike: the queries are the index rows, which then travel once.
        limit: bytes of rows sent to one rank in a wave; a single task may exceed it.

    Returns:
        The tasks of each wave.
    """
    cost = placement.n_queries * placement.n_index
    share = max(1, int(cost.sum()) // (GIANT * ranks))
    pieces: list[tuple[float, int, int, int]] = []
    for cluster in map(int, np.flatnonzero(cost)):
        parts = 1 if ranks == 1 else -(-int(cost[cluster]) // share)
        pieces += [(float(cost[cluster]) / parts, cluster, part, parts) for part in range(parts)]
    pieces.sort(key=lambda piece: (-piece[0], piece[1:]))
    load = [(0.0, rank) for rank in range(ranks)]
    by_rank: list[list[Task]] = [[] for _ in range(ranks)]
    for weight, cluster, part, parts in pieces:
        assigned, rank = heapq.heappop(load)
        by_rank[rank].append(Task(cluster, part, parts, rank))
        heapq.heappush(load, (assigned + weight, rank))
    planned: list[list[Task]] = []
    for tasks in by_rank:
        wave, held = 0, 0
        for task in tasks:
            queries = 0 if alike else int(placement.n_queries[task.cluster]) // task.parts
            size = 4 * width * (int(placement.n_index[task.cluster]) + queries)
            if held and held + size > limit:
                wave, held = wave + 1, 0
            held += size
            while len(planned) <= wave:
                planned.append([])
            planned[wave].append(task)
    return planned


def wave_bytes(n_index: int, width: int, ranks: int) -> int:
    """Return the byte limit of a wave for ``n_index`` rows over all ranks."""
    return max(LEAST_WAVE, 4 * width * n_index // (ranks * WAVE_SHARE))


def nearest_keys(comm: Comm, request: Request, backend: Backend, placement: Placement) -> IntArray:
    """Search as :func:`grace_ds.graph.ring.nearest_keys` does, but only among rows that share a cluster.  Collective.

    Args:
        comm: of all ranks.
        request: of this rank.
        backend: an exact one.
        placement: of the rows of ``request``.
    """
    local = LocalRows(request, placement, comm.size)
    for wave in local.waves:
        packs = [local.pack(wave, rank) for rank in range(comm.size)]
        columns = [comm.exchange(list(column)) for column in zip(*(packed.arrays() for packed in packs), strict=True)]
        received = [Packed.of(list(arrays)) for arrays in zip(*columns, strict=True)]
        answers = comm.exchange(work([task for task in wave if task.owner == comm.rank], received, request.wanted, backend))
        local.take(wave, answers)
    return local.keys


@dataclass(frozen=True)
class Packed:
    """One rank's rows for the tasks of one owner, task after task.

    Attributes:
        ids, X: index rows; they are the queries too if ``queries`` is None.
        counts: (tasks,) int64, index rows of each task.
        queries: ids, rows and counts of the queries, if they are not the index rows.
    """

    ids: IntArray
    X: FloatArray
    counts: IntArray
    queries: tuple[IntArray, FloatArray, IntArray] | None = None

    def arrays(self) -> list[Array]:
        """Return all arrays, in the order that :meth:`of` expects."""
        return [self.ids, self.X, self.counts, *(self.queries or ())]

    @staticmethod
    def of(arrays: list[Array]) -> Packed:
        """Build the object from the result of :meth:`arrays`."""
        return Packed(arrays[0], arrays[1], arrays[2], (arrays[3], arrays[4], arrays[5]) if len(arrays) > 3 else None)


class LocalRows:
    """One rank's rows by cluster, and its queries' neighbours as they arrive.

    Attributes:
        waves: the tasks of all ranks, wave by wave.
        keys: (n, wanted) int64, of this rank's queries.
    """

    def __init__(self, request: Request, placement: Placement, ranks: int) -> None:
        self.alike = request.alike
        self._index = _Members(request.ids, request.X, placement.index, placement.clusters)
        self._queries = self._index if self.alike else _Members(request.q_ids, request.Q, placement.queries, placement.clusters)
        width = request.X.shape[1]
        self.waves = waves(
            placement, ranks, width, self.alike, wave_bytes(int(placement.n_index.sum()) // placement.overlap, width, ranks)
        )
        self.keys = np.full((len(request.q_ids), request.wanted), PAD)

    def pack(self, wave: list[Task], owner: int) -> Packed:
        """Return this rank's rows for the wave's tasks of rank ``owner``."""
        tasks = [task for task in wave if task.owner == owner]
        index = self._index.rows([Task(task.cluster, 0, 1, owner) for task in tasks])
        return Packed(*index, None if self.alike else self._queries.rows(tasks))

    def take(self, wave: list[Task], answers: list[IntArray]) -> None:
        """Merge the owners' results: ``answers[p]`` holds the keys of rank p's tasks, one after another."""
        position = [0] * len(answers)
        for task in wave:
            rows, start = self._queries.part(task), position[task.owner]
            position[task.owner] = start + len(rows)
            found = answers[task.owner][start : start + len(rows)]
            self.keys[rows] = merge(self.keys[rows], found, self.keys.shape[1])


def work(tasks: list[Task], packs: list[Packed], wanted: int, backend: Backend) -> list[IntArray]:
    """Search an owner's tasks; return, for every rank, the keys of its queries in ``tasks``, one after another.

    Args:
        tasks: of this owner.
        packs: received from each rank.
    """
    none = np.empty((0, wanted), np.int64)
    found = [[none] for _ in packs]
    index = _by_task([(p.ids, p.X, p.counts) for p in packs])
    others = [p.queries for p in packs if p.queries is not None]
    queries: Iterator[_Held | None] = _by_task(others) if others else iter([None] * len(tasks))
    for task, held, asking in zip(tasks, index, queries, strict=True):
        for parts, keys in zip(found, _search(task, held, asking, wanted, backend), strict=True):
            parts.append(keys)
    return [np.concatenate(parts) for parts in found]


@dataclass(frozen=True)
class _Held:
    """Rows of all ranks in one task, in rank order, and how many each rank has sent."""

    ids: IntArray
    X: FloatArray
    counts: IntArray


class _Members:
    """One rank's rows by cluster."""

    def __init__(self, ids: IntArray, X: FloatArray, where: Array, clusters: int) -> None:
        self.ids, self.X = ids, X
        flat = where.reshape(-1)
        self.row: IntArray = np.argsort(flat, kind="stable") // max(where.shape[1], 1)
        self.start = np.concatenate([[0], np.cumsum(np.bincount(flat, minlength=clusters))])

    def part(self, task: Task) -> IntArray:
        """Return the positions of this rank's rows in a task's part of its cluster."""
        rows: IntArray = self.row[self.start[task.cluster] : self.start[task.cluster + 1]]
        return rows if task.parts == 1 else rows[_in_part(self.ids[rows], task)]

    def rows(self, tasks: list[Task]) -> tuple[IntArray, FloatArray, IntArray]:
        """Return ids, rows and counts of ``tasks``, one after another."""
        parts = [self.part(task) for task in tasks]
        position = np.concatenate(parts) if parts else np.empty(0, np.int64)
        return self.ids[position], self.X[position], np.array([len(rows) for rows in parts], np.int64)


def _in_part(ids: IntArray, task: Task) -> Array:
    return np.asarray(splitmix64(ids) % np.uint64(task.parts) == np.uint64(task.part))


def _by_task(sent: list[tuple[IntArray, FloatArray, IntArray]]) -> Iterator[_Held]:
    table = np.stack([counts for _, _, counts in sent])  # ranks, tasks
    ends = np.cumsum(table, axis=1)
    for task in range(table.shape[1]):
        cuts = [slice(end - n, end) for end, n in zip(ends[:, task], table[:, task], strict=True)]
        ids = np.concatenate([ids[cut] for (ids, _, _), cut in zip(sent, cuts, strict=True)])
        X = np.concatenate([X[cut] for (_, X, _), cut in zip(sent, cuts, strict=True)])
        yield _Held(ids, X, table[:, task])


def _search(task: Task, held: _Held, asking: _Held | None, k: int, backend: Backend) -> list[IntArray]:
    """Return the keys of the task's queries, (queries of rank p, k) for every rank.

    Args:
        task: to search.
        held: index rows.
        asking: queries; None: the index rows are the queries.
        k: keys per query.
        backend: an exact one.
    """
    if asking is not None:
        queries, which = distinct(asking.ids, asking.X)
        keys = search(queries, collapse(held.ids, held.X, k), k, backend)[which]
        return np.split(keys, np.cumsum(asking.counts)[:-1])
    shard, which = both(held.ids, held.X, k)
    if task.parts == 1:
        return np.split(search(shard.X, shard, k, backend)[which], np.cumsum(held.counts)[:-1])
    in_part = _in_part(held.ids, task)
    unique, position = np.unique(which[in_part], return_inverse=True)
    keys = search(shard.X[unique], shard, k, backend)[position]
    sizes = [int(part.sum()) for part in np.split(in_part, np.cumsum(held.counts)[:-1])]
    return np.split(keys, np.cumsum(sizes)[:-1])
