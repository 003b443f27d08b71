"""What the ranks of the sharded-selection test do: every case of every seed on one world, each rank with what it owns."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from grace_ds.comm import statistics
from grace_ds.comm.base import Comm
from grace_ds.comm.buckets import owner_of
from grace_ds.comm.choose import choose
from grace_ds.comm.statistics import by_lower_id, exact_sum, exact_sums, float_keys, quantile, rank01, top
from grace_ds.errors import GraceError
from grace_ds.recipes import recipe
from grace_ds.records import Coreset, IntArray, Neighbours, Schedule, Signals
from grace_ds.refresh import choice
from grace_ds.refresh.explanation import explanation
from grace_ds.refresh.projection import ProjectedSamples
from grace_ds.selection import sharded_greedy
from grace_ds.selection.guard import effective_share
from grace_ds.selection.objectives import select
from grace_ds.selection.sources import by_source
from tests.multirank.harness import World

SEEDS, SLOTS = range(20), 30
OBJECTIVES = ("sample", "facility_location", "topk", "rs2", "uniform")
POLICIES = ("keep", "floor", "adapt")


@dataclass(frozen=True)
class Pool:
    """A window.

    Attributes:
        ids: (n,) sorted.
        log_p: (n,) some of them equal, some -inf.
        include, exclude: sorted ids, some outside of the window.
        labels: (n,) source of each.
        edges: k-NN graph, some of whose neighbours lie outside of the window.
    """

    ids: IntArray
    log_p: np.ndarray
    include: IntArray
    exclude: IntArray
    labels: IntArray
    edges: Neighbours


def pool_of(seed: int) -> Pool:
    """Of 0 to 300 samples: seed 0 has none, 1 and 2 fewer than ranks; of seed 3 rank 0 owns none on any number of ranks."""
    draw = np.random.default_rng(seed)
    n = (0, 1, 3)[seed] if seed < 3 else int(draw.integers(20, 300))
    span = np.arange(2**40, 2**40 + 5000) if seed % 5 == 4 else np.arange(5000)
    if seed == 3:
        span = span[owner_of(span, 4) == 3]  # of the last quarter of the buckets
    ids = np.sort(draw.choice(span, n, replace=False)).astype(np.int64)
    log_p = draw.integers(-3, 4, n) * 0.5 if seed % 2 else draw.normal(size=n)
    log_p *= seed % 4 != 1  # all alike: with similarities in quarters many gains are equal
    log_p = np.where(draw.random(n) < (1.0 if seed == 7 else 0.15), -np.inf, log_p)
    order = draw.permutation(n)
    include, exclude = (np.sort(np.append(ids[order[at]], [7, 2**41])) for at in (slice(0, n // 15), slice(n // 15, n // 6)))
    near = ids[draw.integers(0, n, (n, 5))] if n else np.empty((0, 5), np.int64)
    near[draw.random(near.shape) < 0.1] = -1
    near[draw.random(near.shape) < 0.1] = 2**39  # no sample of the window
    similarity = np.sort(np.ceil(draw.random(near.shape) * 4) / 4, 1)[:, ::-1] - 0.25
    similarity = np.where(near < 0, -np.inf, similarity).astype(np.float32)
    return Pool(ids, log_p, include, exclude, draw.integers(0, 3, n) * 4, Neighbours(near, similarity))


def sizes_of(pool: Pool) -> tuple[int, ...]:
    """A fifth of the pool; and of one pool none, of others one, all, or more than there are."""
    n = len(pool.ids)
    return (n // 5, (0, 1, n, n + 7)[n % 4])


def draws_of(pool: Pool) -> list[tuple[str, int, bool]]:
    """(objective or policy, size, whether some must and must not be in)."""
    return [(name, k, (len(pool.ids) + i) % 2 == 0) for i, k in enumerate(sizes_of(pool)) for name in OBJECTIVES + POLICIES]


def outcome(
    comm: Comm,
    name: str,
    ids: IntArray,
    log_p: np.ndarray,
    labels: IntArray,
    k: int,
    include: IntArray,
    exclude: IntArray,
    edges: Neighbours,
    seed: int,
) -> Any:
    """Ids and weights of this rank's part of a coreset, or the error that the draw ends with."""

    def draw(ids: IntArray, log_p: np.ndarray, k: int, include: IntArray, exclude: IntArray) -> Coreset:
        objective = name if name in OBJECTIVES else "sample"
        given: dict[str, Any] = {"seed": seed, "version": seed % 3, "neighbours": edges, "comm": comm}
        return select(objective, ids, log_p, k, include=include, exclude=exclude, **given)

    try:
        if name in OBJECTIVES:
            coreset = draw(ids, log_p, k, include, exclude)
        else:
            coreset = by_source(draw, name, labels, ids, log_p, k, include, exclude, comm=comm)
    except GraceError as error:
        return f"{type(error).__name__}: {error}"
    return coreset.ids.tolist(), coreset.weights.tolist()


def everything(comm: Comm, pool: Pool, seed: int) -> dict[str, Any]:
    """All draws and statistics of one pool, of what this rank owns."""
    mine = owner_of(pool.ids, comm.size) == comm.rank
    ids, log_p, labels = pool.ids[mine], pool.log_p[mine], pool.labels[mine]
    edges = Neighbours(pool.edges.ids[mine], pool.edges.similarity[mine])
    found: dict[str, Any] = {"ids": ids.tolist()}
    for k in sizes_of(pool):
        found[f"top {k}"] = ids[top(comm, k, float_keys(log_p), by_lower_id(ids))].tolist()
    for name, k, forced in draws_of(pool):
        include, exclude = (pool.include, pool.exclude) if forced else (pool.include[:0], pool.exclude[:0])
        found[f"{name} {k} {forced}"] = outcome(comm, name, ids, log_p, labels, k, include, exclude, edges, seed)
    found["slots"], found["account"] = slots_of(comm, ids, seed), account_of(comm, pool, mine, seed)
    values = np.where(np.isfinite(log_p), log_p, np.nan)
    known = np.nan_to_num(values)
    found["ranks"] = rank01(comm, values).tolist()
    found["shared"] = [quantile(comm, values, share) for share in (0.0, 0.25, 1.0)]
    found["shared"] += [exact_sum(comm, known), *exact_sums(comm, np.exp(known), labels, 9).tolist()]
    if len(pool.ids):
        found["shared"].append(effective_share(known, comm))
    return found


def visits_of(ids: IntArray) -> IntArray:
    """How often each of ``ids`` was trained on."""
    return np.asarray(ids % 7 % 4, np.int64)


def slots_of(comm: Comm, ids: IntArray, seed: int) -> list[list[int]] | None:
    """Members and visits of those of a coreset of all ``ids`` that find one of 30 slots; on root."""
    context: Any = SimpleNamespace(comm=comm, config=SimpleNamespace(seed=seed))
    inputs: Any = SimpleNamespace(version=seed, visits=SimpleNamespace(of=visits_of))
    found = choice.scheduled(context, inputs, Coreset(ids, np.ones(len(ids), np.float32)), SLOTS)
    return None if found is None else [found[0].ids.tolist(), found[1].tolist()]


def account_of(comm: Comm, pool: Pool, mine: np.ndarray, seed: int) -> Any:
    """The account of a schedule of every third sample, by the recipe ``content``; on root."""
    if not len(pool.ids):
        return None
    columns = [np.random.default_rng([seed, i]).random(len(pool.ids)).astype(np.float32)[mine] for i in range(10)]
    columns[0] = np.where(pool.ids[mine] % 2 == 0, columns[0], np.nan).astype(np.float32)  # losses of the even
    core = pool.ids[::3]
    guard = {"guard": {"level": "content"}, "objective": "sample", "decided_at_step": 3}
    schedule = Schedule(seed, 0, core, np.zeros(len(core), np.uint8), np.ones(len(core), np.float32), seed, guard)
    config = SimpleNamespace(seed=seed)
    context: Any = SimpleNamespace(comm=comm, config=config, chart=chart if comm.rank == 0 else None, recipe=recipe("content"))
    return explanation(context, Signals(pool.ids[mine], *columns), schedule)


def chart(ids: IntArray) -> ProjectedSamples:
    """Every sample at its id."""
    return ProjectedSamples(ids, np.stack([ids, ids], 1).astype(np.float32), (0.5, 0.25))


def work(world: World, one_by_one: bool) -> list[dict[str, Any]]:
    """Make all draws of all seeds.

    Args:
        one_by_one: whether the greedy hands what depends on one another in chains to one rank at once, or never.
    """
    comm = choose("torch", timeout=120.0)
    sharded_greedy.CHAIN, sharded_greedy.TAIL_EDGES = (0, 10**9) if one_by_one else (10**9, 0)
    sharded_greedy.BLOCK, choice.WHOLE = 64, 0
    statistics.FEW = 5 if one_by_one else 0  # most of the pools are smaller than what is sorted as a whole
    return [everything(comm, pool_of(seed), seed) for seed in SEEDS]
