"""What a schedule is drawn by, from the signals to the coreset, as a run goes on."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from grace_ds.comm.local import LocalComm
from grace_ds.config.schema import CollectConfig, GraceConfig, GuardConfig, RefreshConfig, SelectionConfig
from grace_ds.data.order import SamplerOrder
from grace_ds.data.pool import Pool
from grace_ds.data.schedule import VisitCounts
from grace_ds.errors import DataError
from grace_ds.features.content import ContentFeatures
from grace_ds.features.limits import Limits
from grace_ds.features.quality import QualityModel
from grace_ds.recipes import Recipe
from grace_ds.records import IntArray, Losses, Neighbours, Role, SampleRecords, Schedule, Signals
from grace_ds.refresh.choice import choose, importance, judge, source_shares
from grace_ds.refresh.influence import enough_labels
from grace_ds.refresh.signals import Estimate, RefreshContext, RefreshInputs, relative
from grace_ds.refresh.table import Table
from grace_ds.selection.guard import BLIND, DOWN, ENOUGH, Blindness, Decision, Remembered

N, BATCH, INTERVAL = 400, 4, 20
IDS = np.arange(N)
READS_WELL, HELPS = IDS % 2 == 0, IDS % 4 < 2  # what content and influence say; they agree on one in four


def made(
    step: int,
    signals: dict[str, Any] | None = None,
    estimate: tuple[float, float] = (0.0, 0.0),
    collected: int = 1,
    edges: Neighbours | None = None,
    decision: Decision | None = None,
    version: int = 1,
    start: int | None = None,
    visited: IntArray | None = None,
    include: IntArray | None = None,
    exclude: IntArray | None = None,
    **config: Any,
) -> Schedule:
    """The schedule that a run of 100 steps makes after ``step`` of them.

    Args:
        signals: other ones than those of this file, by name.
        estimate: labels, and the share of them that content tells.
        collected: each how many steps one was collected until now.
        start: where it begins, if not with the next sample.
        visited: ids that the run has trained on once.
        include, exclude: ids that must, and must not, be chosen.
    """
    nobody, visits = np.empty(0, np.int64), VisitCounts()
    visits.add(nobody if visited is None else visited)
    p = pipeline(**config)
    p = dataclasses.replace(p, include=nobody if include is None else include, exclude=nobody if exclude is None else exclude)
    x = dataclasses.replace(inputs(step), collect_every=collected, decision=decision, version=version, visits=visits)
    influence = np.where(HELPS, 0.0, -9.0).astype(np.float32)
    zero = np.zeros(N, np.float32)
    known = {"loss": zero, "influence": influence, "density": zero, "quality": np.where(READS_WELL, 1.0, 0.02).astype(np.float32)}
    known["loss_pass"] = np.full(N, np.nan, np.float32)
    known |= {"crowding": zero, "staleness": zero, "disagreement": zero, **(signals or {})}
    columns: dict[str, Any] = {name: np.asarray(column, np.float32) for name, column in known.items()}
    s = signals_of(**columns)
    found = choose(p, x, step * BATCH if start is None else start, Estimate(s, 0, *estimate), s, edges, None)
    assert found is not None
    return found


def signals_of(**columns: Any) -> Signals:
    """Those of the whole window, with what is relative to it."""
    loss_rank, sparseness = relative(LocalComm(5.0), columns["loss"], columns["crowding"])
    return Signals(IDS, **columns, loss_rank=loss_rank, sparseness=sparseness)


def pipeline(**config: Any) -> RefreshContext:
    refresh = RefreshConfig(interval_steps=INTERVAL, cadence="fixed")
    c = GraceConfig(**{"recipe": "grace", "total_steps": 100, "guard": GuardConfig(enabled=False), "refresh": refresh, **config})
    nobody = np.empty(0, np.int64)
    empty = ContentFeatures(nobody, np.empty(0, np.float32), None, None, None)
    pool = Pool(N, 0, 0.2, INTERVAL, BATCH, 1)
    return RefreshContext(LocalComm(5.0), c, pool, SamplerOrder(N), BATCH, lambda *_: empty, nobody, nobody)


def inputs(step: int) -> RefreshInputs:
    rows, losses = SampleRecords.empty(4), Losses.empty()
    return RefreshInputs(rows, losses, Table(rows), Table(losses), VisitCounts(), step, 1, step * BATCH, INTERVAL, {0: 0.3})


def shares(schedule: Schedule) -> tuple[float, float]:
    """Of the core's samples: those that read well, and those that help."""
    core = schedule.ids[schedule.roles == Role.CORE]
    return READS_WELL[core].mean(), HELPS[core].mean()


def test_a_run_opens_in_the_samplers_own_order_then_goes_by_content_and_after_an_interval_by_influence() -> None:
    warmup_steps = made(4)
    assert warmup_steps.meta["objective"] == "uniform"
    assert warmup_steps.ids.tolist() == SamplerOrder(N)(np.arange(16, 16 + len(warmup_steps))).tolist()
    learning = made(5)  # a twentieth of the run
    well, helps = shares(learning)
    assert well > 0.9 and helps == pytest.approx(0.5, abs=0.15)
    assert (learning.meta["drawn_by"], learning.meta["parts"]) == ("grace", ["graph", "sketches"])
    assert {Role.EXPLORE, Role.AUDIT} <= set(learning.roles.tolist())  # what it learns from
    chosen = made(20)
    assert min(shares(chosen)) > 0.85
    assert (chosen.meta["drawn_by"], chosen.meta["parts"]) == ("grace", ["gradients", "graph", "loss", "sketches"])


def test_a_run_that_is_to_start_at_once_goes_by_what_influences_it_has() -> None:
    assert "gradients" in made(0, start_step=0).meta["parts"] and min(shares(made(0, start_step=0))) > 0.85


def test_content_alone_has_nothing_to_learn() -> None:
    assert made(5, recipe="content").meta["drawn_by"] == made(20, recipe="content").meta["drawn_by"] == "content"
    assert made(5, recipe="content").ids.tolist() == made(20, recipe="content").ids.tolist()


@pytest.mark.parametrize("recipe", ["grace", "content", "density"])
def test_a_twentieth_of_the_slots_goes_to_what_the_coreset_leaves_out(recipe: str) -> None:
    schedule = made(20, recipe=recipe)
    core, others = (set(schedule.ids[schedule.roles == role].tolist()) for role in (Role.CORE, Role.EXPLORE))
    assert len(others) == pytest.approx(len(schedule) / 20, abs=1) and not core & others
    audits = int((schedule.roles == Role.AUDIT).sum())
    assert (audits > 0) == (recipe == "grace")  # they are there to be measured


def test_a_schedule_begins_where_it_is_told_and_lasts_beyond_the_next_refresh() -> None:
    for recipe in ("grace", "uniform"):
        found = made(20, start=77 * BATCH, recipe=recipe)
        assert found.start == 77 * BATCH and len(found) == (INTERVAL + INTERVAL // 4) * BATCH
        assert (found.meta["decided_at_step"], found.meta["next_refresh_step"]) == (20, 20 + INTERVAL)


def test_members_that_an_earlier_schedule_did_not_get_to_come_first() -> None:
    first = made(20, budget=0.5)
    core = first.ids[first.roles == Role.CORE]
    visited = np.unique(core)
    again = made(20, budget=0.5, visited=visited)
    found = again.ids[again.roles == Role.CORE]
    assert len(np.unique(found)) == len(found) == len(core) and not np.isin(found, visited).any()


def test_audits_are_drawn_from_the_whole_window_whatever_is_chosen() -> None:
    audits, chosen = [], []
    for version in range(40):
        found = made(20, version=version, selection=SelectionConfig(audit=0.1))
        audits.append(found.ids[found.roles == Role.AUDIT])
        chosen.append(np.isin(audits[-1], found.ids[found.roles == Role.CORE]))
        assert len(np.unique(audits[-1])) == len(audits[-1]) == 10
    every = np.concatenate(audits)
    assert READS_WELL[every].mean() == pytest.approx(0.5, abs=0.1) == HELPS[every].mean()
    assert len(np.unique(every)) > 200  # other ones in each version
    assert np.concatenate(chosen).mean() == pytest.approx(0.2, abs=0.08)  # as many as the coreset holds of the window


def test_audits_have_chances_of_their_own() -> None:
    """Where every sample is as likely to be chosen, the coreset's noise alone decides: it does not decide on audits."""
    alike = {"influence": np.zeros(N), "quality": np.ones(N)}
    both = []
    for version in range(20):
        found = made(20, alike, version=version, budget=0.1, selection=SelectionConfig(audit=0.1))
        core = found.ids[found.roles == Role.CORE]
        both.append(np.isin(found.ids[found.roles == Role.AUDIT], core).mean())
    assert np.mean(both) < 0.25


def test_exploration_goes_to_those_outside_of_the_coreset_that_were_not_looked_at_for_longest() -> None:
    before = made(20)
    stale = np.where(np.isin(IDS, before.ids[before.roles == Role.CORE]), 99.0, np.where(IDS < 40, 50.0, 1.0))
    found = made(20, {"staleness": stale, "disagreement": np.ones(N)})
    core, others = found.ids[found.roles == Role.CORE], found.ids[found.roles == Role.EXPLORE]
    assert not np.isin(others, core).any()
    left = np.setdiff1d(IDS, core)
    assert np.sort(stale[others]).tolist() == np.sort(np.sort(stale[left])[-len(others) :]).tolist()


@pytest.mark.parametrize("objective", ["sample", "topk"])
def test_who_must_be_in_is_in_and_who_must_not_is_nowhere(objective: str) -> None:
    include, exclude = IDS[1:40:4], IDS[100:]  # what neither reads well nor helps, and most of the window
    config: dict[str, Any] = {"selection": SelectionConfig(objective=objective, audit=0.1), "budget": 0.1}
    for version in range(5):
        found = made(20, version=version, include=include, exclude=exclude, **config)
        assert np.isin(include, found.ids[found.roles == Role.CORE]).all()
        assert not np.isin(exclude, found.ids).any()


def test_audits_are_drawn_where_anything_of_them_is_collected() -> None:
    for ablate, some in ((["gradients"], True), (["loss"], True), (["gradients", "loss"], False), (["graph"], True)):
        roles = made(20, ablate=ablate).roles
        assert bool((roles == Role.AUDIT).any()) == some


@pytest.mark.parametrize(("part", "signal"), [("gradients", "influence"), ("loss", "loss"), ("graph", "crowding")])
def test_a_part_that_is_switched_off_is_as_if_nothing_were_known_of_it(part: str, signal: str) -> None:
    rng = np.random.default_rng(0)
    known = {"loss": rng.normal(size=N), "crowding": rng.uniform(0, 3, N)}
    unknown = known | {signal: np.full(N, np.nan)}
    whole, off, absent = made(20, known), made(20, known, ablate=[part]), made(20, unknown)
    assert off.digest() == absent.digest() != whole.digest()
    assert part not in off.meta["parts"]


def test_the_loss_of_a_sample_and_the_crowd_around_it_weigh() -> None:
    """Of samples that are alike in everything else, those of higher loss come more often, those in a crowd less."""
    high, alike = IDS % 8 < 4, {"influence": np.zeros(N), "quality": np.ones(N)}

    def share(**known: Any) -> float:
        drawn = [made(20, {**alike, **known}, seed=seed) for seed in range(10)]
        return float(np.mean([high[s.ids[s.roles == Role.CORE]].mean() for s in drawn]))

    assert share() == pytest.approx(0.5, abs=0.05)
    assert share(loss=np.where(high, 3.0, -3.0)) == pytest.approx(0.64, abs=0.05)
    assert share(crowding=np.where(high, 3.0, 0.3)) < 0.25


def test_facility_location_does_not_divide_by_the_crowd_once_more() -> None:
    """It sees to diversity itself: what the graph tells of crowds changes nothing."""
    near = (IDS[:, None] + np.array([[1, 2, 3]])) % N
    edges = Neighbours(near, np.full(near.shape, 0.5, np.float32))
    crowding = np.random.default_rng(0).uniform(0, 3, N)
    location = SelectionConfig(objective="facility_location")
    told, silent = (made(20, {"crowding": c}, edges=edges, selection=location) for c in (crowding, np.full(N, np.nan)))
    assert told.digest() == silent.digest() and "graph" not in told.meta["parts"]
    assert made(20, {"crowding": crowding}).digest() != made(20, {"crowding": np.full(N, np.nan)}).digest()


def test_what_the_guard_has_stepped_down_to_is_weighed_by_its_own_signals_alone() -> None:
    down = Decision("content", "", misses=1, look=9, off=DOWN)
    guard = GuardConfig(enabled=True, clean_share=1.0)
    rng = np.random.default_rng(0)
    found = made(20, {"loss": rng.normal(size=N), "crowding": rng.uniform(0, 3, N)}, guard=guard, decision=down)
    assert (found.meta["drawn_by"], found.meta["parts"]) == ("content", [])
    assert found.ids.tolist() != made(20, guard=guard).ids.tolist()
    assert (
        found.ids[found.roles == Role.CORE].tolist()
        == made(20, guard=guard, decision=down).ids[found.roles == Role.CORE].tolist()
    )
    assert not (found.roles == Role.AUDIT).any()


def test_a_recipe_that_weighs_a_sample_by_the_others_of_its_rank_is_refused() -> None:
    def ranked(signals: Signals, parts: frozenset[str]) -> dict[str, Any]:
        return {"rank": 0.5 + np.argsort(np.argsort(signals.quality, kind="stable")) / len(signals.ids)}

    own = Recipe("own", frozenset(), content=True, trusted=False, fallback="uniform", factors=lambda s, _: {"q": s.quality})
    quality, nothing = np.random.default_rng(0).random(N).astype(np.float32), np.zeros(N, np.float32)
    signals = Signals(IDS, *[nothing] * 3, quality, *[nothing] * 6)
    assert importance(own, signals, frozenset()) == pytest.approx(np.log(quality))
    with pytest.raises(DataError, match="recipe own: the factors of a sample depend on the other samples"):
        importance(dataclasses.replace(own, factors=ranked), signals, frozenset())


def test_a_source_that_the_coreset_leaves_out_is_told_with_none() -> None:
    told = source_shares(LocalComm(5.0), np.array([4, 4, 7, 9, 4]), np.array([7, 4]))
    assert told == {"names": [4, 7, 9], "window": [3, 1, 1], "coreset": [1, 1, 0]}


def test_a_level_further_down_is_weighed_by_less() -> None:
    """Density does not look at what reads well."""
    down = Decision("density", "", misses=1, look=9, off=DOWN)
    config: dict[str, Any] = {"recipe": "content", "guard": GuardConfig(enabled=True, clean_share=1.0)}
    assert shares(made(20, **config))[0] > 0.9
    found = made(20, decision=down, **config)
    assert found.meta["drawn_by"] == "density" and shares(found)[0] == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("now", [True, False], ids=["found now", "found before"])
def test_influences_that_foretell_nothing_do_not_weigh(now: bool) -> None:
    known = Blindness(prediction_skill=Remembered(0.0, 2 * ENOUGH))
    blind = Decision("grace", "", blind=known) if now else Decision("grace", "", off=BLIND, blind=Blindness(True, 1, 9))
    config: dict[str, Any] = {"guard": GuardConfig(enabled=True, clean_share=1.0)}
    assert "gradients" in made(20, **config).meta["parts"]
    found, without = (
        made(20, {"influence": influence}, decision=blind, **config) for influence in (np.where(HELPS, 0.0, -9.0), np.zeros(N))
    )
    assert found.meta["drawn_by"] == "grace" and not BLIND & set(found.meta["parts"])
    assert found.ids.tolist() == without.ids.tolist()


# -- how much is collected ---------------------------------------------------------------------------------------------

OFTEN = {"refresh": RefreshConfig(interval_steps=800, cadence="fixed"), "total_steps": 0}  # 100 of 800 steps at the least


def every(labels: float, explained: float, collected: int = 4, step: int = 800, **config: Any) -> int:
    """Each how many steps one is collected after a refresh."""
    found: int = made(step, estimate=(labels, explained), collected=collected, **{**OFTEN, **config}).meta["collect_every"]
    return found


def test_only_as_much_is_collected_as_the_estimates_need() -> None:
    enough = enough_labels(0.5)
    assert every(enough, 0.5) == 4  # at the least each fourth step, by collect.share
    assert [every(m * enough, 0.5) for m in (2, 5, 20)] == [8, 20, 80]
    assert every(1000 * enough, 0.5) == 100  # eight steps between two refreshes are always collected
    # Going on at the new pace the labels become fewer: then as many are collected as before.
    assert every(2 * enough, 0.5, collected=8) == 16 and every(enough / 4, 0.5, collected=16) == 4
    assert [every(1e3, share) for share in (0.02, 0.2, 0.8)] == sorted(every(1e3, share) for share in (0.02, 0.2, 0.8))


def test_where_nothing_is_told_yet_as_much_is_collected_as_may_be() -> None:
    for labels, explained in ((0.0, 0.0), (1e6, 0.0)):
        assert every(labels, explained, collected=50) == 4
    assert every(1e6, 0.9, step=400) == 4  # the first interval: the model is learning
    assert every(1e6, 0.9, collected=1, collect=CollectConfig(share=1.0)) == 100
    assert every(0.0, 0.0, collect=CollectConfig(share=0.01)) == 100


def test_a_short_interval_is_not_left_with_a_step_or_two() -> None:
    for interval in (1, 7, 8, 20):
        config = {"refresh": RefreshConfig(interval_steps=interval, cadence="fixed"), "total_steps": 0, "start_step": 0}
        found: int = made(20, estimate=(1e9, 1.0), **config).meta["collect_every"]
        assert interval // found >= min(8, interval)


def test_a_recipe_that_collects_nothing_does_not_say_how_often() -> None:
    for config in ({"recipe": "content"}, {"ablate": ["gradients", "loss"]}):
        assert "collect_every" not in made(20, **config).meta


@pytest.mark.parametrize("objective", ["rs2", "uniform"])
def test_a_random_objective_stays_random(objective: str) -> None:
    assert not made(20, recipe="content", selection=SelectionConfig(objective=objective)).roles.any()


@pytest.mark.parametrize(("recipe", "top"), [("auto", "grace"), ("content", "content")])
@pytest.mark.parametrize("junk", [0.0, 0.25])
def test_by_default_the_guard_leaves_alone_what_is_like_the_trusted_set_and_no_quarter_of_junk(
    junk: float, recipe: str, top: str
) -> None:
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
    quality = QualityModel.fit(*flat(trusted)).quality(*flat(pool)).astype(np.float32)
    nothing, unknown = np.zeros(N, np.float32), np.full(N, np.nan, np.float32)
    p = pipeline(recipe=recipe, guard=GuardConfig())
    s = Signals(IDS, unknown, unknown, nothing, quality, unknown, unknown, nothing, unknown, unknown, unknown)
    found = judge(p, inputs(0), s, None)
    assert found.level == (top if junk else "uniform"), found.reason


@pytest.mark.parametrize(("shadow", "chosen"), [(False, False), (False, True), (True, True)])
def test_the_guard_hears_losses_of_samples_that_were_drawn_whatever_they_are_like(shadow: bool, chosen: bool) -> None:
    """A core that was chosen tells nothing of the window: its audit slots do, in shadow mode the job's own samples."""
    audit, core = IDS[100:200], IDS[:100] if chosen else IDS[:0]
    x = dataclasses.replace(inputs(INTERVAL), core=core, audit=None if shadow else audit if chosen else IDS[:0], since=0)
    x = dataclasses.replace(x, loss_limits=Limits.around(np.zeros(9)))
    one, nothing = np.ones(N, np.float32), np.zeros(N, np.float32)
    stale = np.where(IDS < 300, 5.0, 99.0)  # the last hundred were read long ago
    passed = np.select([IDS < 100, IDS < 200, IDS < 300], [0.02, 1.0, 0.5], 0.02)
    columns = (nothing, nothing, nothing, one, passed.astype(np.float32), nothing, stale.astype(np.float32), nothing)
    s = Signals(IDS, *columns, nothing, one)
    p = dataclasses.replace(pipeline(guard=GuardConfig()), trusted=np.zeros((9, 4), np.float32))
    told = judge(p, x, s, None)
    assert told.losses.value == pytest.approx(1.0 if chosen and not shadow else 0.61, abs=0.01)
    assert told.level == ("uniform" if chosen and not shadow else "grace")
    deaf = dataclasses.replace(p, config=dataclasses.replace(p.config, ablate=["loss"]))
    for without in (pipeline(guard=GuardConfig()), deaf):
        found = judge(without, x, s, None)
        assert found.losses.weight == 0 and found.level == "uniform"


def flat(rows: IntArray) -> tuple[IntArray, IntArray]:
    return rows.reshape(-1), np.arange(len(rows) + 1) * rows.shape[1]
