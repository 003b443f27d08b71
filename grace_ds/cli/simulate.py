"""Make refreshes as the ranks of a job do, on samples that are made up: what ``grace-ds plan --simulate`` runs on every rank.

Content is made up and given; vectors, sketches and rows of the graph are as wide as the job's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.comm.traffic import Traffic
from grace_ds.config.schema import GraceConfig
from grace_ds.data.order import SeededOrder
from grace_ds.data.pool import Pool
from grace_ds.data.schedule import ScheduleBook, VisitCounts
from grace_ds.errors import ConfigError
from grace_ds.features.content import ContentFeatures
from grace_ds.features.quality import STATISTICS
from grace_ds.graph.plan import EXPECTED_OVERLAP, plan_graph
from grace_ds.recipes import recipe
from grace_ds.records import HIDDEN, Array, FloatArray, IntArray, Losses, Role, SampleRecords, Schedule
from grace_ds.refresh.line import refresh
from grace_ds.refresh.signals import RefreshContext, RefreshInputs
from grace_ds.refresh.table import Table
from grace_ds.utils.hashing import splitmix64

MOST_RANKS = 1024
TOPICS = 64  # that the synthetic vectors gather around
TRUSTED = 500  # synthetic trusted samples
BLOCK = 1024  # vectors that are made at a time
NARROW_BUDGET = 0.8  # a coreset of more than the 16,384 samples that go to root as a whole, as a job's own has


@dataclass(frozen=True)
class Job:
    """Sizes of one simulated job.

    Attributes:
        ranks: data-parallel.
        samples: of the window, over all ranks.
        batch: samples of an optimizer step, over all ranks.
        interval: optimizer steps between two refreshes.
    """

    ranks: int
    samples: int
    batch: int
    interval: int


@dataclass(frozen=True)
class Counted:
    """What one rank sent in the first refresh and in the next, by stage, and the schedule of the latter."""

    first: dict[str, Traffic]
    later: dict[str, Traffic]
    schedule: Schedule


def two_refreshes(comm: Comm, job: Job, config: GraceConfig, second: bool = True) -> Counted:
    """Make the first refresh of a job and the next one, on this rank.  Collective.

    All that it reads is a function of ids and of the job, so the schedules are the same for any number of ranks.

    Args:
        comm: between the job's ranks, simulated or real.
        job: its sizes; ``ranks`` is the size of ``comm``.
        config: of the job, as :func:`simulated_config` returns it.
        second: False: the first refresh alone.
    """
    import torch

    torch.set_num_threads(1)  # a thread's own setting
    config = copy.deepcopy(config)
    config.refresh.interval_steps = job.interval
    context = _context(comm, job, config)
    first_ids = SeededOrder(job.samples, 1)(np.arange(job.interval * job.batch, dtype=np.int64) % job.samples)
    rows = _rows(_own(comm, job, config, first_ids), 1, config)
    empty = Table(SampleRecords.empty(config.collect.dim)), Table(Losses.empty())
    inputs = RefreshInputs(rows, rows.losses, *empty, VisitCounts(), job.interval, 1, 0, job.interval, {0: 0.4})
    first = refresh(context, inputs)
    schedule = first.schedule
    if not second:
        return Counted(first.traffic, {}, schedule)
    trained, visits = schedule.ids[: job.interval * job.batch], VisitCounts()
    visits.add(trained)
    rows = _rows(_own(comm, job, config, trained), job.interval + 1, config)
    later = replace(
        inputs,
        rows=rows,
        losses=rows.losses,
        table=first.table,
        seen=first.seen,
        visits=visits,
        step=2 * job.interval,
        version=2,
        issued=job.interval * job.batch,
        since=job.interval,
        core=schedule.ids[schedule.roles == Role.CORE],
        audit=schedule.ids[schedule.roles == Role.AUDIT],
        kept=first.kept,
        book=ScheduleBook([schedule]),
    )
    following = refresh(context, later)
    return Counted(first.traffic, following.traffic, following.schedule)


def simulated_config(config: GraceConfig, samples: int, ranks: int) -> GraceConfig:
    """Return the config that a job of ``samples`` on ``ranks`` ranks is simulated under.

    Without what a simulation has no files for; the graph's tier is that of the full size.

    Raises:
        ConfigError: the job cannot be simulated.
    """
    if ranks > MOST_RANKS:
        raise ConfigError(f"--simulate runs at most {MOST_RANKS} ranks, not {ranks}: give fewer by --ranks")
    if config.graph.executor != "ring":
        raise ConfigError(
            f"--simulate counts what the job's ranks send, and graph.executor {config.graph.executor} has workers of its own: "
            "set graph.executor=ring"
        )
    if config.selection.include or config.selection.exclude or config.selection.sources:
        raise ConfigError("--simulate has no samples that selection.include, exclude or sources could name: leave them out")
    made = copy.deepcopy(config)
    made.recipe, made.start_step, made.total_steps, made.stop_step = recipe(config.recipe).name, 0, 0, 0
    made.run_dir, made.trusted, made.replay, made.features.cache_dir = None, None, None, None
    made.guard.clean_share = 1.0  # the samples are as good as each other, and a selection is what is to be counted
    made.budget = NARROW_BUDGET
    made.graph.backend, made.graph.tier = (
        "torch",
        plan_graph(config.graph, samples, samples, config.features.dim, ranks, True).tier,
    )
    made.graph.overlap = config.graph.overlap or EXPECTED_OVERLAP
    return made


def _own(comm: Comm, job: Job, config: GraceConfig, trained: IntArray) -> IntArray:
    """Return which of the samples ``trained`` this rank has collected, step after step."""
    if not config.collects:
        return trained[:0]
    steps = trained[: len(trained) // job.batch * job.batch].reshape(-1, job.batch)[:: config.collect_every]
    return np.ascontiguousarray(np.unique(steps)[comm.rank :: comm.size])


def _context(comm: Comm, job: Job, config: GraceConfig) -> RefreshContext:
    pool = Pool(job.samples, job.samples, config.budget, job.interval, job.batch, config.seed)
    nobody = np.empty(0, np.int64)
    trusted = np.asarray(_uniform(np.arange(TRUSTED), 1, STATISTICS), np.float32) if recipe(config.recipe).trusted else None

    def contents(kept: ContentFeatures | None, ids: IntArray) -> ContentFeatures:
        return kept if kept is not None else _content(ids, config)

    order = SeededOrder(job.samples, config.seed)
    return RefreshContext(comm, config, pool, order, job.batch, contents, nobody, nobody, trusted)


def _content(ids: IntArray, config: GraceConfig) -> ContentFeatures:
    numbers = _uniform(ids, 2, 2)
    return ContentFeatures(
        ids,
        density=np.floor(4 * numbers[:, 0]).astype(np.float32),
        quality=(0.02 + 0.98 * numbers[:, 1]).astype(np.float32) if recipe(config.recipe).trusted else None,
        statistics=_uniform(ids, 3, STATISTICS).astype(np.float32) if config.collects else None,
        vectors=_vectors(ids, config.features.dim) if config.builds_graph else None,
    )


def _vectors(ids: IntArray, dim: int) -> FloatArray:
    """Return unit vectors (n, dim) float32, each about one of :data:`TOPICS` directions."""
    topics = _uniform(np.arange(TOPICS), 4, dim) - 0.5
    out = np.empty((len(ids), dim), np.float32)
    for start in range(0, len(ids), BLOCK):  # so that the simulation's own work does not count in a rank's memory
        block = ids[start : start + BLOCK]
        vectors = topics[splitmix64(block) % np.uint64(TOPICS)] + 0.5 * (_uniform(block, 5, dim) - 0.5)
        out[start : start + BLOCK] = vectors / np.sqrt(np.square(vectors).sum(1, keepdims=True))
    return out


def _rows(ids: IntArray, step: int, config: GraceConfig) -> SampleRecords:
    sketch = _uniform(ids, 6 + step, config.collect.dim) - 0.5
    numbers = _uniform(ids, 7 + step, 3)
    return SampleRecords(
        ids=ids,
        step=np.full(len(ids), step, np.int64),
        sketch=(sketch / np.sqrt(np.square(sketch).sum(1, keepdims=True))).astype(np.float16),
        norm=numbers[:, 0].astype(np.float32),
        loss=(numbers[:, 1] - 0.5).astype(np.float32),
        influence=(0.8 * numbers[:, 2]).astype(np.float32),
        basis=np.zeros(len(ids), np.int32),
        hidden=_uniform(ids, 8 + step, HIDDEN).astype(np.float16),
    )


def _uniform(ids: IntArray, purpose: int, width: int) -> Array:
    """Return numbers in [0, 1) that follow from each id, the purpose and the column alone, (n, width) float64."""
    words = splitmix64(splitmix64(ids)[:, None] + splitmix64(np.arange(width) + (purpose << 20)))
    return np.asarray((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)
