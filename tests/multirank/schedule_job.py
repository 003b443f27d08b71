"""What the ranks of the same-schedule test do: one world goes through every case, two refreshes each.

A case is the same whatever the number of ranks: its corpus, its windows and its list of collected rows do not depend on
it.  What does is where a row was collected, for which each world has a rule of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.comm.choose import choose
from grace_ds.config.schema import FeaturesConfig, GraceConfig, GuardConfig, RefreshConfig, SelectionConfig
from grace_ds.data.order import SamplerOrder
from grace_ds.data.pool import Pool
from grace_ds.data.schedule import VisitCounts
from grace_ds.features.content import ContentFeatures, TokenReader
from grace_ds.features.quality import QualityModel
from grace_ds.graph.repair import KeptGraph
from grace_ds.integrations.setup import Components, Contents
from grace_ds.records import HIDDEN, C, IntArray, Losses, Role, SampleRecords, Schedule
from grace_ds.refresh.line import refresh
from grace_ds.refresh.signals import RefreshContext, RefreshInputs
from grace_ds.refresh.state import RefreshState
from grace_ds.refresh.table import Table
from grace_ds.selection.guard import from_meta
from tests.multirank.harness import World

N, WINDOW, TINY = 500, 400, 3
BATCH, INTERVAL, SLACK = 8, 6, 1
DIM, VOCAB, SEED = 12, 60, 11
STEPS = (8, 14)  # optimizer steps done at the two refreshes: the oldest rows are two intervals old at the second
INCLUDE, EXCLUDE = np.arange(3, N, 61), np.arange(1, N, 4)
EXPLORE, AUDIT = 0.15, 0.1
# Median influence (alignment times norm) of trusted samples by basis; those along basis 2 are not to be judged by.
REFERENCE = {0: 0.4, 1: 0.6, 2: 0.0}

Cache = dict[tuple[Any, ...], ContentFeatures]


@dataclass(frozen=True)
class Case:
    """One run of two refreshes.

    Attributes:
        objective: of the selection.
        recipe: of the run.
        window: samples of a window.
        ablate: parts that the recipe does without.
        trusted: whether there is a trusted set, for the filter and for the influences.
        features: whether the token ids are looked at.
        collect: rows from two windows ("all"), none at all, rows whose losses are equal and alignments unknown ("tied"), or
            more rows, all along a basis with a unit ("judged"), which in the second interval turn against what the first
            has chosen ("harmful").
        unmeasured: a column of the collected rows of which nothing is known.
        added_loss: to what was measured, for samples of even ids.
        last_rank_idle: whether the last of several ranks collects nothing.
        forced: whether ids are included and excluded.
        uniform: whether the second refresh is one after ``stop_step``.
        still: the second refresh is of the same window, and nothing was collected before it.
        clean_share: of the guard; None turns it off, where it would find a window without copies, or of three, clean.
        audit: share of the audit slots.
        shadow: whether the job trains on samples of its own, so that all that are not chosen are there to compare with.
        blend: whether the corpus has two sources, :func:`source_of`.
    """

    objective: str = "sample"
    recipe: str = "grace"
    ablate: tuple[str, ...] = ()
    window: int = WINDOW
    trusted: bool = True
    features: bool = True
    collect: str = "all"
    unmeasured: str = ""
    added_loss: float = 0.0
    last_rank_idle: bool = False
    forced: bool = False
    uniform: bool = False
    still: bool = False
    clean_share: float | None = 0.9
    audit: float = AUDIT
    shadow: bool = False
    blend: bool = False


PARTS = ("gradients", "loss", "graph", "sketches")
OBJECTIVES = ("sample", "facility_location", "topk", "rs2", "uniform")
CASES: dict[str, Case] = {
    **{name: Case(name) for name in OBJECTIVES},
    **{f"forced {name}": Case(name, forced=True, last_rank_idle=True) for name in OBJECTIVES},
    **{f"tied {name}": Case(name, ablate=("graph",), trusted=False, collect="tied", clean_share=None) for name in OBJECTIVES[:3]},
    **{f"tiny {name}": Case(name, window=TINY, clean_share=None) for name in OBJECTIVES[:2]},
    "nothing collected": Case(collect="none"),
    "content": Case(recipe="content", collect="none"),
    "density": Case(recipe="density", trusted=False, collect="none"),
    "no features": Case(recipe="uniform", features=False),
    "stopped": Case(uniform=True),
    **{f"without {part}": Case(ablate=(part,)) for part in PARTS},
    "neither graph nor trusted set": Case(ablate=("graph",), trusted=False),
    "losses unknown": Case(unmeasured="loss"),
    "influences unknown": Case(unmeasured="influence"),
    "losses raised": Case(added_loss=4.0),
    "losses lowered": Case(added_loss=-4.0),
    "without any part": Case(ablate=PARTS, collect="none"),
    "still": Case(ablate=("sketches",), window=N, still=True),
    "clean": Case(clean_share=0.05),
    **{f"blend {name}": Case(name, blend=True) for name in OBJECTIVES[:2]},
    "judged": Case(collect="judged", audit=0.4),
    "harmful": Case(collect="harmful", shadow=True),
}


@dataclass(frozen=True)
class Made:
    """What a rank holds after one refresh.

    Attributes:
        graph: what it has of the k-NN graph; None where none was built.
        learned: (ids, values) of the parts of a row that are learned; None without.
    """

    schedule: Schedule
    table: Table[SampleRecords]
    seen: Table[Losses]
    counts: Mapping[str, float]
    graph: KeptGraph | None
    learned: tuple[IntArray, np.ndarray] | None


def walk(draw: np.random.Generator, n: int) -> IntArray:
    """Tokens of a chain in which each has three followers, so that bigrams tell it from junk."""
    tokens = [int(draw.integers(VOCAB))]
    for turn in draw.integers(0, 3, n - 1):
        tokens.append((7 * tokens[-1] + 13 * int(turn) + 5) % VOCAB)
    return np.array(tokens, np.int64)


def is_junk(ids: IntArray) -> np.ndarray:
    """Which samples of the corpus are tokens drawn at random."""
    return np.asarray(ids) % 5 == 4


def source_of(ids: IntArray) -> IntArray:
    """The source of each sample: a small one that is half junk, and a large one."""
    return np.asarray(ids % 10 > 7, np.int64)


@cache
def corpus() -> list[IntArray]:
    """Chains, chains with an edit or two, exact copies, junk, and a sample without a token and one too short for a 6-gram."""
    draw = np.random.default_rng(1)
    rows: list[IntArray] = []
    for i in range(N):
        kind, length = i % 5, int(draw.integers(20, 50))
        if kind == 4:
            rows.append(draw.integers(0, VOCAB, length))
        elif kind == 3 and i > 50:
            rows.append(rows[int(draw.integers(0, 6)) * 5].copy())  # crowds: few sources, many copies
        elif kind == 2 and i > 10:
            near = rows[i - 2].copy()
            near[draw.integers(0, len(near), 2)] = draw.integers(0, VOCAB, 2)
            rows.append(near)
        else:
            rows.append(walk(draw, length))
    rows[100], rows[101] = np.empty(0, np.int64), np.array([4, 9, 1])
    return rows


@cache
def quality_model() -> QualityModel:
    """The model of 80 trusted chains."""
    draw = np.random.default_rng(2)
    rows = [walk(draw, 30) for _ in range(80)]
    return QualityModel.fit(np.concatenate(rows), np.arange(0, 30 * 80 + 1, 30))


def pool_of(case: Case) -> Pool:
    """The windows; the second overlaps the first."""
    return Pool(N, case.window, config_of(case).budget, INTERVAL, BATCH, SEED)


def config_of(case: Case) -> GraceConfig:
    """A coreset of a tenth of the window, all of which finds a slot, or a larger one, of which the least visited do."""
    return GraceConfig(
        recipe=case.recipe,
        ablate=list(case.ablate),
        budget=0.34 if case.window == TINY else 0.1 if case.forced or case.collect == "tied" else 0.15,
        window=case.window,
        seed=SEED,
        refresh=RefreshConfig(interval_steps=INTERVAL, cadence="fixed", slack_steps=SLACK),
        features=FeaturesConfig(enabled=case.features, dim=48),
        selection=SelectionConfig(objective=case.objective, explore=EXPLORE, audit=case.audit),
        guard=GuardConfig(enabled=case.clean_share is not None, clean_share=case.clean_share or 1.0),
    )


def collected(case: Case, version: int) -> SampleRecords:
    """All rows of an interval in the order of their steps, whoever collected them.

    Samples come again in later steps, and within a step: with the same row, or with one that differs, as under dropout.
    There are ids of padding, outside of the dataset and outside of the window; unknown losses and alignments; rows that
    are not finite.
    """
    n = {"none": 0, "judged": 700, "harmful": 700}.get(case.collect, 40 if case.window == TINY else 260)
    if not n or (case.still and version):
        return SampleRecords.empty(DIM)
    draw = np.random.default_rng([3, version])
    kind = np.random.default_rng([5, version])  # of the hidden states alone
    window = pool_of(case).window_at(version)
    ids = np.where(draw.random(n) < 0.8, draw.choice(window, n), draw.integers(-1, N + 2, n))
    ids[::29] = -1
    step = np.sort(draw.integers(STEPS[version - 1] + 1 if version else 1, STEPS[version] + 1, n))
    step[1::4], ids[1::4] = step[::4], ids[::4]  # again in the same step
    rows = SampleRecords(
        ids=ids.astype(np.int64),
        sketch=draw.standard_normal((n, DIM)).astype(np.float16),
        norm=(0.5 + draw.random(n)).astype(np.float32),
        loss=(is_junk(ids) + draw.standard_normal(n)).astype(np.float32),
        influence=(0.5 - 0.6 * is_junk(ids) + 0.2 * draw.standard_normal(n)).astype(np.float32),
        step=step.astype(np.int64),
        basis=draw.integers(-1, 3, n).astype(np.int32),
        hidden=(3 * is_junk(ids)[:, None] + kind.standard_normal((n, HIDDEN))).astype(np.float16),
    )
    for column in (rows.sketch, rows.norm, rows.loss, rows.influence, rows.basis, rows.hidden):
        column[1::8] = column[::8]  # every other repeat is the very same row
    rows.loss[2::7] = np.nan  # some of those repeats included
    rows.influence[rows.basis < 0] = np.nan
    rows.norm[6::31], rows.sketch[11::37, 2] = np.nan, np.inf
    if case.unmeasured:
        getattr(rows, case.unmeasured)[:] = np.nan
    rows.loss[:] += np.float32(case.added_loss) * (ids % 2 == 0)
    if case.collect == "tied":
        rows.loss[:], rows.influence[:] = 0.25, np.nan
    elif case.collect in ("judged", "harmful"):
        rows.basis[:] %= 2
        rows.influence[:] = 0.5 - 0.6 * is_junk(ids)
        if case.collect == "harmful" and version:
            rows.influence[:] *= -1
    return rows


def read(case: Case, version: int) -> Losses:
    """The losses of an interval: those of the collected steps, and of some samples in other steps."""
    rows = collected(case, version)
    draw = np.random.default_rng([6, version])
    extra = rows.losses.take(draw.random(len(rows)) < 0.5)
    later = np.minimum(extra.step + draw.integers(0, 2, len(extra)), STEPS[version])
    loss = extra.loss if case.collect == "tied" else extra.loss * np.float32(0.75)
    return Losses.concat([rows.losses, Losses(extra.ids, later, loss)])


def share_of(rows: C, case: Case, version: int, world: World) -> C:
    """The rows that this rank has measured, by a rule that no two worlds have in common."""
    busy = max(1, world.size - int(case.last_rank_idle))
    where = np.random.default_rng([4, version, world.size]).integers(0, busy, len(rows))
    return rows.take(where == world.rank)


class CachedContents:
    """What a job's own :class:`Contents` makes of one window after the other, kept for the other cases."""

    def __init__(self, comm: Comm, cache: Cache, case: Case) -> None:
        nobody, reader = np.empty(0, np.int64), TokenReader(corpus()) if case.features else None
        model = quality_model() if case.trusted else None
        self.config, self.tied = config_of(case), case.collect == "tied"
        self.job = Contents(comm, self.config, Components(pool_of(case), SamplerOrder(N), reader, None, model, nobody, nobody))
        self.cache, self.case = cache, case
        self.windows: tuple[bytes, ...] = ()

    def __call__(self, kept: ContentFeatures | None, ids: IntArray) -> ContentFeatures:
        if not self.case.features:
            return self.job(kept, ids)
        # Not by this rank's ids, which may be none of two windows: all ranks must compute, or none.
        self.windows += (pool_of(self.case).window_at(len(self.windows)).tobytes(),)
        wanted = (self.config.builds_graph, self.config.collects)
        key = (self.windows, self.case.trusted, self.tied, *wanted)
        if key not in self.cache:
            made = self.job(kept, ids)
            if self.tied:  # copies would tell the tied apart
                made = dataclasses.replace(made, density=np.zeros(len(ids), np.float32))
            self.cache[key] = made
        return self.cache[key]


def two_refreshes(world: World, comm: Comm, case: Case, cache: Cache) -> list[Made]:
    """The second refresh takes up what the first leaves, its schedule as trained on, and a window that has moved on."""
    contents = CachedContents(comm, cache, case)
    nobody = np.empty(0, np.int64)
    include, exclude = (INCLUDE, np.setdiff1d(EXCLUDE, INCLUDE)) if case.forced else (nobody, nobody)
    trusted = quality_model().held_out if case.trusted else None
    p = RefreshContext(comm, config_of(case), pool_of(case), SamplerOrder(N), BATCH, contents, include, exclude, trusted)
    p = dataclasses.replace(p, sources=source_of) if case.blend else p
    made: list[Made] = []
    table, seen, visits, kept = Table(SampleRecords.empty(DIM)), Table(Losses.empty()), VisitCounts(), RefreshState()
    decision, since, core, audit = None, -1, nobody, None if case.shadow else nobody
    for version, step in enumerate(STEPS):
        x = RefreshInputs(
            rows=share_of(collected(case, version), case, version, world),
            losses=share_of(read(case, version), case, version, world),
            table=table,
            seen=seen,
            visits=visits,
            step=step,
            version=version,
            issued=step * BATCH + 3 * (world.rank + 1) // world.size,  # prefetch runs further ahead on some ranks
            interval=INTERVAL,
            reference=REFERENCE if case.trusted else {},
            decision=decision,
            since=since,
            core=core,
            audit=audit,
            uniform=case.uniform and version == 1,
            kept=kept,
        )
        out = refresh(p, x)
        learned = out.kept.learned
        parts = None if learned is None else (learned.ids, learned.values)
        made.append(Made(out.schedule, out.table, out.seen, out.counts, out.kept.graph, parts))
        table, seen, kept, visits = out.table, out.seen, out.kept, VisitCounts(visits.ids, visits.counts)
        visits.add(out.schedule.ids[: INTERVAL * BATCH])
        decision, since = from_meta(out.schedule.meta.get("guard")), step
        core = np.unique(out.schedule.ids[out.schedule.roles == Role.CORE])
        audit = None if case.shadow else np.unique(out.schedule.ids[out.schedule.roles == Role.AUDIT])
    return made


def work(world: World) -> dict[str, list[Made]]:
    """All cases on one world."""
    comm = choose("torch", timeout=20.0)
    cache: Cache = {}
    return {name: two_refreshes(world, comm, case, cache) for name, case in CASES.items()}
