"""The clustered tier of the k-NN graph: each row goes to its nearest clusters, and rows that meet there are compared.

    place → waves of (send to the owners → search each cluster → send back → merge)

A cluster is searched exactly, whole, by the rank that owns it; of a giant's queries several ranks take a part each, but
every part meets all of its index rows.  So the edges do not depend on the number of ranks, nor on the waves, which only
bound what a rank holds at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.comm.buckets import splitmix64
from grace_ds.graph.backends import Backend
from grace_ds.graph.merge import PAD, finished, merge
from grace_ds.graph.placement import Placement
from grace_ds.graph.rows import Request, both, collapse, distinct
from grace_ds.graph.search import search
from grace_ds.records import Array, FloatArray, IntArray, Neighbours

LEAST_WAVE = 1 << 20  # bytes of the rows that a rank is sent in a wave, at least
WAVE_SHARE = 32  # and a thirty-second of the index rows that it holds
GIANT = 4  # parts of the whole work for each rank: a dearer cluster's queries are divided


Executor = Callable[[Comm, Request, Backend, Placement], IntArray]


@dataclass(frozen=True)
class Task:
    """One part of a cluster's queries against all of its index rows, on the rank ``owner``."""

    cluster: int
    part: int
    parts: int
    owner: int


def waves(placement: Placement, ranks: int, width: int, alike: bool, limit: int) -> list[list[Task]]:
    """The work of all ranks, in waves; a pure function, so that every rank makes the same.

    Longest first to the rank with the least to do (Graham 1969).

    Args:
        placement: sizes of the clusters over all ranks.
        ranks: how many.
        width: of the rows.
        alike: queries are the index rows, which then travel once.
        limit: bytes of rows that one rank is sent in a wave; a single task may exceed it.
    """
    cost = placement.n_queries * placement.n_index
    share = max(1, int(cost.sum()) // (GIANT * ranks))
    pieces: list[tuple[float, int, int, int]] = []
    for c in map(int, np.flatnonzero(cost)):
        parts = 1 if ranks == 1 else -(-int(cost[c]) // share)
        pieces += [(float(cost[c]) / parts, c, part, parts) for part in range(parts)]
    pieces.sort(key=lambda piece: (-piece[0], piece[1:]))
    load = [(0.0, rank) for rank in range(ranks)]
    mine: list[list[Task]] = [[] for _ in range(ranks)]
    for weight, c, part, parts in pieces:
        so_far, rank = heapq.heappop(load)
        mine[rank].append(Task(c, part, parts, rank))
        heapq.heappush(load, (so_far + weight, rank))
    out: list[list[Task]] = []
    for tasks in mine:
        wave, held = 0, 0
        for task in tasks:
            queries = 0 if alike else int(placement.n_queries[task.cluster]) // task.parts
            size = 4 * width * (int(placement.n_index[task.cluster]) + queries)
            if held and held + size > limit:
                wave, held = wave + 1, 0
            held += size
            while len(out) <= wave:
                out.append([])
            out[wave].append(task)
    return out


def wave_bytes(n_index: int, width: int, ranks: int) -> int:
    """The limit of a wave for ``n_index`` rows over all ranks."""
    return max(LEAST_WAVE, 4 * width * n_index // (ranks * WAVE_SHARE))


def nearest_clustered(
    comm: Comm, asked: Request, backend: Backend, placement: Placement, over: Executor | None = None
) -> Neighbours:
    """As :func:`grace_ds.graph.ring.nearest`, among rows that share a cluster only.  Collective.

    Args:
        asked: of this rank.
        backend: an exact one.
        placement: of these very rows.
        over: another executor than the ring: what :func:`nearest_keys` does.
    """
    keys = (over or nearest_keys)(comm, asked, backend, placement)
    return finished(keys, asked.q_ids, asked.k, asked.exclude_self)


def nearest_keys(comm: Comm, asked: Request, backend: Backend, placement: Placement) -> IntArray:
    """The same as (n, wanted) keys of :mod:`grace_ds.graph.merge`, a query's own among them.  Collective."""
    local = LocalRows(asked, placement, comm.size)
    for wave in local.waves:
        packs = [local.pack(wave, rank) for rank in range(comm.size)]
        columns = [comm.exchange(list(column)) for column in zip(*(p.arrays() for p in packs), strict=True)]
        got = [Packed.of(list(arrays)) for arrays in zip(*columns, strict=True)]
        answers = comm.exchange(work([t for t in wave if t.owner == comm.rank], got, asked.wanted, backend))
        local.take(wave, answers)
    return local.keys


@dataclass(frozen=True)
class Packed:
    """What one rank sends to the owner of some tasks: its rows in them, task after task.

    Attributes:
        ids, X: index rows; the queries too, where nobody else asks.
        counts: (tasks,) int64, index rows of each task.
        queries: the same of the queries, where they are others.
    """

    ids: IntArray
    X: FloatArray
    counts: IntArray
    queries: tuple[IntArray, FloatArray, IntArray] | None = None

    def arrays(self) -> list[Array]:
        """Everything, in an order that :meth:`of` knows."""
        return [self.ids, self.X, self.counts, *(self.queries or ())]

    @staticmethod
    def of(arrays: list[Array]) -> Packed:
        """The inverse of :meth:`arrays`."""
        return Packed(arrays[0], arrays[1], arrays[2], (arrays[3], arrays[4], arrays[5]) if len(arrays) > 3 else None)


class LocalRows:
    """One rank's rows by cluster, and its queries' neighbours as they come in.

    Attributes:
        waves: the work of all ranks.
        keys: (n, wanted) int64, of this rank's queries.
    """

    def __init__(self, asked: Request, placement: Placement, ranks: int) -> None:
        self.alike = asked.alike
        self._index = _Members(asked.ids, asked.X, placement.index, placement.clusters)
        self._queries = self._index if self.alike else _Members(asked.q_ids, asked.Q, placement.queries, placement.clusters)
        width = asked.X.shape[1]
        self.waves = waves(
            placement, ranks, width, self.alike, wave_bytes(int(placement.n_index.sum()) // placement.overlap, width, ranks)
        )
        self.keys = np.full((len(asked.q_ids), asked.wanted), PAD)

    def pack(self, wave: list[Task], owner: int) -> Packed:
        """This rank's rows in the wave's tasks of rank ``owner``."""
        mine = [t for t in wave if t.owner == owner]
        index = self._index.rows([Task(t.cluster, 0, 1, owner) for t in mine])
        return Packed(*index, None if self.alike else self._queries.rows(mine))

    def take(self, wave: list[Task], answers: list[IntArray]) -> None:
        """Merges what the owners found: ``answers[p]`` holds the keys of rank p's tasks, one after another."""
        at = [0] * len(answers)
        for task in wave:
            rows, lo = self._queries.part(task), at[task.owner]
            at[task.owner] = lo + len(rows)
            found = answers[task.owner][lo : lo + len(rows)]
            self.keys[rows] = merge(self.keys[rows], found, self.keys.shape[1])


def work(tasks: list[Task], packs: list[Packed], wanted: int, backend: Backend) -> list[IntArray]:
    """What an owner finds: for every rank the keys of its queries in ``tasks``, one after another.

    Args:
        tasks: of this owner.
        packs: what each rank sent.
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
    """Rows of all ranks in one task, in rank order, and how many each has sent."""

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
        """Positions of this rank's rows in a task's part of its cluster."""
        rows: IntArray = self.row[self.start[task.cluster] : self.start[task.cluster + 1]]
        return rows if task.parts == 1 else rows[_in_part(self.ids[rows], task)]

    def rows(self, tasks: list[Task]) -> tuple[IntArray, FloatArray, IntArray]:
        """Ids, rows and counts of ``tasks``, one after another."""
        parts = [self.part(task) for task in tasks]
        at = np.concatenate(parts) if parts else np.empty(0, np.int64)
        return self.ids[at], self.X[at], np.array([len(p) for p in parts], np.int64)


def _in_part(ids: IntArray, task: Task) -> Array:
    return np.asarray(splitmix64(ids) % np.uint64(task.parts) == np.uint64(task.part))


def _by_task(sent: list[tuple[IntArray, FloatArray, IntArray]]) -> Iterator[_Held]:
    table = np.stack([counts for _, _, counts in sent])  # ranks, tasks
    ends = np.cumsum(table, axis=1)
    for t in range(table.shape[1]):
        cuts = [slice(end - n, end) for end, n in zip(ends[:, t], table[:, t], strict=True)]
        ids = np.concatenate([ids[cut] for (ids, _, _), cut in zip(sent, cuts, strict=True)])
        X = np.concatenate([X[cut] for (_, X, _), cut in zip(sent, cuts, strict=True)])
        yield _Held(ids, X, table[:, t])


def _search(task: Task, held: _Held, asking: _Held | None, k: int, backend: Backend) -> list[IntArray]:
    """Keys of the task's queries, (queries of rank p, k) for every rank; ``asking`` None: the index rows ask."""
    if asking is not None:
        queries, which = distinct(asking.ids, asking.X)
        keys = search(queries, collapse(held.ids, held.X, k), k, backend)[which]
        return np.split(keys, np.cumsum(asking.counts)[:-1])
    shard, which = both(held.ids, held.X, k)
    if task.parts == 1:
        return np.split(search(shard.X, shard, k, backend)[which], np.cumsum(held.counts)[:-1])
    asked = _in_part(held.ids, task)
    unique, place = np.unique(which[asked], return_inverse=True)
    keys = search(shard.X[unique], shard, k, backend)[place]
    sizes = [int(part.sum()) for part in np.split(asked, np.cumsum(held.counts)[:-1])]
    return np.split(keys, np.cumsum(sizes)[:-1])
