"""The clustered tier of the k-NN graph: each row goes to its nearest clusters, and rows that meet there are compared.

    place → waves of (send to the owners → search each cluster → send back → merge)

A cluster is searched exactly, whole, by the rank that owns it; of a giant's queries several ranks take a part each, but
every part meets all of its index rows.  So the edges do not depend on the number of ranks, nor on the waves, which only
bound what a rank holds at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from grace_ds.buckets import splitmix64
from grace_ds.comm.base import Comm
from grace_ds.graph.leaves import Leaf
from grace_ds.graph.merge import PAD, finished, merge
from grace_ds.graph.placement import Placement
from grace_ds.graph.rows import both, collapse, distinct
from grace_ds.graph.search import search
from grace_ds.records import Array, FloatArray, IntArray, Neighbours

LEAST_WAVE = 2 << 20  # bytes of the rows that a rank is sent in a wave, at least
WAVE_SHARE = 32  # and a thirty-second of the index rows that it holds
GIANT = 4  # parts of the whole work for each rank: a dearer cluster's queries are divided


@dataclass(frozen=True)
class Task:
    """One part of a cluster's queries against all of its index rows, on the rank ``owner``."""

    cluster: int
    part: int
    parts: int
    owner: int


def waves(p: Placement, ranks: int, width: int, alike: bool, limit: int) -> list[list[Task]]:
    """The work of all ranks, in waves; a pure function, so that every rank makes the same.

    Longest first to the rank with the least to do (Graham 1969).

    Args:
        p: sizes of the clusters over all ranks.
        ranks: how many.
        width: of the rows.
        alike: queries are the index rows, which then travel once.
        limit: bytes of rows that one rank is sent in a wave; a single task may exceed it.
    """
    cost = p.n_queries * p.n_index
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
            queries = 0 if alike else int(p.n_queries[task.cluster]) // task.parts
            size = 4 * width * (int(p.n_index[task.cluster]) + queries)
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
    comm: Comm,
    q_ids: IntArray,
    Q: FloatArray,
    ids: IntArray,
    X: FloatArray,
    k: int,
    leaf: Leaf,
    placement: Placement,
    exclude_self: bool = True,
) -> Neighbours:
    """As :func:`grace_ds.graph.ring.nearest`, among rows that share a cluster only.  Collective.

    Args:
        q_ids, Q, ids, X: as there, with rows prepared.
        leaf: an exact one.
        placement: of these very rows.
    """
    keys = nearest_keys(comm, q_ids, Q, ids, X, k + int(exclude_self), leaf, placement)
    return finished(keys, q_ids, k, exclude_self)


def nearest_keys(
    comm: Comm, q_ids: IntArray, Q: FloatArray, ids: IntArray, X: FloatArray, wanted: int, leaf: Leaf, placement: Placement
) -> IntArray:
    """The same as (n, wanted) keys of :mod:`grace_ds.graph.merge`, a query's own among them.  Collective."""
    alike = Q is X
    index = _Members(ids, X, placement.index, placement.clusters)
    queries = index if alike else _Members(q_ids, Q, placement.queries, placement.clusters)
    keys = np.full((len(q_ids), wanted), PAD)
    limit = wave_bytes(int(placement.n_index.sum()) // placement.overlap, X.shape[1], comm.size)
    for wave in waves(placement, comm.size, X.shape[1], alike, limit):
        asked = [queries.part(task) for task in wave]
        held = index.send(comm, wave, whole=True)
        asking = held if alike else queries.send(comm, wave, whole=False)
        mine = [task for task in wave if task.owner == comm.rank]
        found = [_search(task, h, a, alike, wanted, leaf) for task, h, a in zip(mine, held, asking, strict=True)]
        answers = _send_back(comm, found, wanted)
        for at, answer in _aligned(wave, asked, answers):
            keys[at] = merge(keys[at], answer, wanted)
    return keys


@dataclass(frozen=True)
class _Held:
    """What a rank was sent for one of its tasks: rows of all ranks in rank order, and how many each has sent."""

    ids: IntArray
    X: FloatArray
    counts: IntArray


class _Members:
    """This rank's rows by cluster."""

    def __init__(self, ids: IntArray, X: FloatArray, where: Array, clusters: int) -> None:
        self.ids, self.X = ids, X
        flat = where.reshape(-1)
        self.row: IntArray = np.argsort(flat, kind="stable") // max(where.shape[1], 1)
        self.start = np.concatenate([[0], np.cumsum(np.bincount(flat, minlength=clusters))])

    def part(self, task: Task) -> IntArray:
        """Positions of this rank's rows in a task's part of its cluster."""
        rows: IntArray = self.row[self.start[task.cluster] : self.start[task.cluster + 1]]
        return rows if task.parts == 1 else rows[_in_part(self.ids[rows], task)]

    def send(self, comm: Comm, wave: list[Task], whole: bool) -> list[_Held]:
        """Every rank's rows to the owners of the wave's tasks; returns what this rank was sent, by task.  Collective."""
        asked = [[Task(t.cluster, 0, 1, t.owner) if whole else t for t in wave if t.owner == p] for p in range(comm.size)]
        rows = [[self.part(task) for task in tasks] for tasks in asked]
        counts = comm.exchange([np.array([len(r) for r in mine], np.int64) for mine in rows])
        flat = [np.concatenate(mine) if mine else np.empty(0, np.int64) for mine in rows]
        ids, X = (comm.exchange([column[at] for at in flat]) for column in (self.ids, self.X))
        return list(_by_task(ids, X, counts))


def _in_part(ids: IntArray, task: Task) -> Array:
    return np.asarray(splitmix64(ids) % np.uint64(task.parts) == np.uint64(task.part))


def _by_task(ids: list[Array], X: list[Array], counts: list[Array]) -> Iterator[_Held]:
    table = np.stack(counts)  # ranks, tasks
    ends = np.cumsum(table, axis=1)
    for t in range(table.shape[1]):
        cuts = [slice(ends[p, t] - table[p, t], ends[p, t]) for p in range(len(ids))]
        parts = [[column[p][cut] for p, cut in enumerate(cuts)] for column in (ids, X)]
        yield _Held(np.concatenate(parts[0]), np.concatenate(parts[1]), table[:, t])


def _search(task: Task, held: _Held, asking: _Held, alike: bool, k: int, leaf: Leaf) -> list[IntArray]:
    """Keys of the task's queries, (queries of rank p, k) for every rank."""
    if not alike:
        queries, which = distinct(asking.ids, asking.X)
        keys = search(queries, collapse(held.ids, held.X, k), k, leaf)[which]
        return np.split(keys, np.cumsum(asking.counts)[:-1])
    shard, which = both(held.ids, held.X, k)
    if task.parts == 1:
        return np.split(search(shard.X, shard, k, leaf)[which], np.cumsum(held.counts)[:-1])
    asked = _in_part(held.ids, task)
    unique, place = np.unique(which[asked], return_inverse=True)
    keys = search(shard.X[unique], shard, k, leaf)[place]
    sizes = [int(part.sum()) for part in np.split(asked, np.cumsum(held.counts)[:-1])]
    return np.split(keys, np.cumsum(sizes)[:-1])


def _send_back(comm: Comm, found: list[list[IntArray]], k: int) -> list[IntArray]:
    """The keys of this rank's queries, by the rank that has found them, in the order of its tasks.  Collective."""
    none = np.empty((0, k), np.int64)
    return comm.exchange([np.concatenate([none, *(parts[p] for parts in found)]) for p in range(comm.size)])


def _aligned(wave: list[Task], asked: list[IntArray], answers: list[IntArray]) -> Iterator[tuple[IntArray, IntArray]]:
    """(positions of this rank's queries, their keys), task by task."""
    at = [0] * len(answers)
    for task, rows in zip(wave, asked, strict=True):
        lo = at[task.owner]
        at[task.owner] = lo + len(rows)
        yield rows, answers[task.owner][lo : lo + len(rows)]
