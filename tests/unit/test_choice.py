"""What a schedule is drawn by, from the signals to the coreset, as a run goes on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from grace_ds.choice import choose, judge
from grace_ds.comm.local import LocalComm
from grace_ds.config.schema import GraceConfig, GuardConfig, RefreshConfig, SelectionConfig
from grace_ds.features import ContentFeatures
from grace_ds.order import SamplerOrder
from grace_ds.pool import Pool
from grace_ds.records import IntArray, Role, Rows, Schedule
from grace_ds.schedule import Ledger
from grace_ds.selection.prior import BigramPrior
from grace_ds.signals import Inputs, Pipeline, Signals
from grace_ds.table import Table

N, BATCH, INTERVAL = 400, 4, 20
IDS = np.arange(N)
READS_WELL, HELPS = IDS % 2 == 0, IDS % 4 < 2  # what content and influence say; they agree on one in four


def made(step: int, **config: Any) -> Schedule:
    """The schedule that a run of 100 steps makes after ``step`` of them."""
    c = GraceConfig(
        **{"recipe": "grace", "total_steps": 100, **config},
        guard=GuardConfig(enabled=False),
        refresh=RefreshConfig(interval_steps=INTERVAL, cadence="fixed"),
    )
    nobody = np.empty(0, np.int64)
    empty = ContentFeatures(nobody, np.empty(0, np.float32), None, None, None)
    p = Pipeline(LocalComm(5.0), c, Pool(N, 0, 0.2, INTERVAL, BATCH, 1), SamplerOrder(N), BATCH, lambda _: empty, nobody, nobody)
    x = inputs(step)
    zero = np.zeros(N, np.float32)
    influence = np.where(HELPS, 0.0, -9.0).astype(np.float32)
    s = Signals(IDS, zero, influence, zero, np.where(READS_WELL, 1.0, 0.02).astype(np.float32), zero, zero)
    return choose(p, x, step * BATCH, s, None, None)


def inputs(step: int) -> Inputs:
    return Inputs(Rows.empty(4), Table.empty(4), Ledger(), step, 1, step * BATCH, INTERVAL, {0: 0.3})


def shares(schedule: Schedule) -> tuple[float, float]:
    """Of the core's samples: those that read well, and those that help."""
    core = schedule.ids[schedule.roles == Role.CORE]
    return READS_WELL[core].mean(), HELPS[core].mean()


def test_a_run_opens_in_the_samplers_own_order_then_goes_by_content_and_after_an_interval_by_influence() -> None:
    opening = made(4)
    assert opening.meta["objective"] == "uniform"
    assert opening.ids.tolist() == SamplerOrder(N)(np.arange(16, 16 + len(opening))).tolist()
    learning = made(5)  # a twentieth of the run
    well, helps = shares(learning)
    assert well > 0.9 and helps == pytest.approx(0.5, abs=0.15)
    assert learning.meta["drawn_by"] == "prior"
    assert {Role.EXPLORE, Role.AUDIT} <= set(learning.roles.tolist())  # what it learns from
    chosen = made(20)
    assert min(shares(chosen)) > 0.85
    assert chosen.meta["drawn_by"] == "grace"


def test_a_run_that_is_to_start_at_once_goes_by_what_influences_it_has() -> None:
    assert made(0, start_step=0).meta["drawn_by"] == "grace"


def test_content_alone_has_nothing_to_learn() -> None:
    assert made(5, recipe="prior").meta["drawn_by"] == made(20, recipe="prior").meta["drawn_by"] == "prior"
    assert made(5, recipe="prior").ids.tolist() == made(20, recipe="prior").ids.tolist()


@pytest.mark.parametrize("recipe", ["grace", "prior", "density"])
def test_a_twentieth_of_the_slots_goes_to_what_the_coreset_leaves_out(recipe: str) -> None:
    schedule = made(20, recipe=recipe)
    core, others = (set(schedule.ids[schedule.roles == role].tolist()) for role in (Role.CORE, Role.EXPLORE))
    assert len(others) == pytest.approx(len(schedule) / 20, abs=1) and not core & others
    audits = int((schedule.roles == Role.AUDIT).sum())
    assert (audits > 0) == (recipe == "grace")  # they are there to be measured


@pytest.mark.parametrize("objective", ["rs2", "uniform"])
def test_a_random_objective_stays_random(objective: str) -> None:
    assert not made(20, recipe="prior", selection=SelectionConfig(objective=objective)).roles.any()


@pytest.mark.parametrize(("junk", "level"), [(0.0, "uniform"), (0.25, "prior")])
def test_by_default_the_guard_leaves_alone_what_is_like_the_trusted_set_and_no_quarter_of_junk(junk: float, level: str) -> None:
    rng = np.random.default_rng(1)
    table = rng.dirichlet(np.full(60, 0.1), 60)

    def texts(n: int) -> IntArray:
        """(n, 40): words that follow on one another as they mostly do."""
        rows = rng.integers(60, size=(n, 40))
        for at in range(1, 40):
            rows[:, at] = (table.cumsum(1)[rows[:, at - 1]] > rng.random((n, 1))).argmax(1)
        return rows

    trusted, pool = texts(200), texts(N)
    for row in pool[: round(junk * N)]:
        rng.shuffle(row)
    keep = BigramPrior.fit(*flat(trusted)).keep(*flat(pool)).astype(np.float32)
    nothing, unknown = np.zeros(N, np.float32), np.full(N, np.nan, np.float32)
    found = judge(GraceConfig(), inputs(0), Signals(IDS, unknown, unknown, nothing, keep, nothing, unknown), None)
    assert found.level == level, found.reason


def flat(rows: IntArray) -> tuple[IntArray, IntArray]:
    return rows.reshape(-1), np.arange(len(rows) + 1) * rows.shape[1]
