"""When refreshes are due and what they are asked for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grace_ds.config.schema import GraceConfig, RefreshConfig, SelectionConfig
from grace_ds.refresh import trigger


def config(
    cadence_name: str = "adaptive",
    interval: int = 10,
    overhead: float = 0.05,
    start: int = 0,
    stop: int = 0,
    recipe: str = "content",
    objective: str = "sample",
    ablate: tuple[str, ...] = (),
) -> GraceConfig:
    refresh = RefreshConfig(interval_steps=interval, cadence=cadence_name, max_overhead=overhead)
    selection = SelectionConfig(objective=objective)
    return GraceConfig(recipe=recipe, ablate=list(ablate), start_step=start, stop_step=stop, refresh=refresh, selection=selection)


def refreshes(c: GraceConfig, steps: int) -> list[int]:
    """The steps at which refreshes are made, from the first on."""
    made = [0]
    while made[-1] + trigger.configured_interval(c, made[-1]) < steps:
        made.append(made[-1] + trigger.configured_interval(c, made[-1]))
    return made


@given(
    interval=st.integers(1, 1000),
    overhead=st.floats(0.01, 0.5),
    refresh_seconds=st.floats(0.001, 1e4),
    step_seconds=st.floats(0.001, 100),
)
def test_the_stretched_interval_is_the_shortest_below_the_overhead(
    interval: int, overhead: float, refresh_seconds: float, step_seconds: float
) -> None:
    steps = trigger.stretched_interval(config(interval=interval, overhead=overhead), 0, refresh_seconds, step_seconds)
    assert steps >= interval
    assert refresh_seconds <= overhead * steps * step_seconds * (1 + 1e-9)
    if steps > interval:
        assert refresh_seconds > overhead * (steps - 1) * step_seconds * (1 - 1e-9)


@pytest.mark.parametrize(("name", "step_seconds"), [("fixed", 0.001), ("adaptive", None), ("adaptive", 0.0)])
def test_it_stays_as_configured_when_fixed_or_while_no_step_was_timed(name: str, step_seconds: float | None) -> None:
    assert trigger.stretched_interval(config(name), 0, 1e6, step_seconds) == 10


def test_the_first_coreset_is_due_at_the_start_step_however_dear_a_refresh_is() -> None:
    c = config(start=25)
    assert trigger.stretched_interval(c, 7, 1e6, 0.001) == 18
    assert trigger.configured_interval(c, 25) == 10


@pytest.mark.parametrize(
    ("interval", "start", "made"),
    [
        (10, 0, [0, 5, 10, 20, 30]),
        (7, 0, [0, 3, 7, 14, 21, 28, 35]),
        (2, 0, [0, 1, 2, 4, 6]),
        (10, 25, [0, 25, 35]),
    ],
)
def test_recipe_grace_opens_with_an_interval_in_two_halves(interval: int, start: int, made: list[int]) -> None:
    for recipe, ablate in (("grace", ()), ("auto", ()), ("grace", ("gradients",)), ("grace", ("loss", "graph", "sketches"))):
        grace = config(interval=interval, start=start, recipe=recipe, ablate=ablate)
        assert refreshes(grace, made[-1] + 1) == made
    plain_ones = [
        {"recipe": "content"},
        {"recipe": "density"},
        {"recipe": "uniform"},
        {"recipe": "grace", "objective": "rs2"},
        {"recipe": "grace", "objective": "uniform"},
        {"recipe": "grace", "ablate": ("gradients", "loss")},  # nothing of the backward is looked at
    ]
    for options in plain_ones:
        plain = refreshes(config(interval=interval, start=start, **options), made[-1] + 1)  # type: ignore[arg-type]
        assert plain == [0, *range(start or interval, made[-1] + 1, interval)]


@pytest.mark.parametrize(
    ("interval", "total", "recipe", "made"),
    [
        (80, 400, "content", [0, 20, 100, 180, 260, 340]),
        (80, 400, "grace", [0, 10, 20, 100, 180, 260, 340]),
        (80, 1600, "content", [0, 80, 160]),  # a twentieth is an interval
        (80, 10_000, "grace", [0, 40, 80, 160]),
        (80, 0, "content", [0, 80, 160]),  # nobody has said how long the run is
        (80, 7, "grace", [0, 1, 81]),
    ],
)
def test_a_run_of_known_length_opens_for_a_twentieth_of_it_at_most(
    interval: int, total: int, recipe: str, made: list[int]
) -> None:
    c = config(interval=interval, start=-1, recipe=recipe)
    c.total_steps = total
    assert refreshes(c, made[-1] + 1) == made
    assert all(
        trigger.stretched_interval(c, step, 1e6, 1.0) == trigger.configured_interval(c, step) for step in range(c.warmup_steps)
    )
    assert (
        trigger.stretched_interval(c, c.warmup_steps, 1e6, 1.0) > interval
    )  # the first coreset does not wait, the later ones do


def test_an_interval_of_one_step_has_no_halves() -> None:
    assert refreshes(config(interval=1, recipe="grace"), 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("step", [2, 5, 7])
def test_a_run_taken_up_within_the_opening_keeps_its_refreshes(step: int) -> None:
    c = config(recipe="grace")
    assert step + trigger.configured_interval(c, step) == (5 if step < 5 else 10)


def test_a_run_is_uniform_before_its_start_and_from_its_stop() -> None:
    c = config(start=20, stop=60)
    assert [s for s in range(80) if not trigger.is_uniform(c, s)] == list(range(20, 60))
    assert not any(trigger.is_uniform(config(), s) for s in range(80))


def test_only_steps_that_a_coreset_can_use_are_harvested() -> None:
    c = config(start=20, stop=60)
    assert [s for s in range(80) if trigger.collected(c, s, next_refresh=s + 1)] == list(range(10, 60))


def test_what_nothing_would_be_trained_on_is_neither_harvested_nor_made() -> None:
    c = config()
    c.total_steps = 35
    refreshes = [s for s in range(1, 40) if trigger.is_due(c, s, next_refresh=(s // 10) * 10 or 10)]
    assert 30 in refreshes
    assert 35 not in refreshes
    collected = [s for s in range(35) if trigger.collected(c, s, next_refresh=(s // 10 + 1) * 10)]
    assert collected == list(range(30))  # the rows of steps 30 to 34 no refresh would read


@pytest.mark.parametrize(("start", "stop", "total"), [(0, 0, 0), (40, 60, 0), (40, 0, 65), (7, 0, 40)])
def test_a_basis_is_fitted_where_rows_will_be_measured_with_it_and_nowhere_else(start: int, stop: int, total: int) -> None:
    c = config(start=start, stop=stop)
    c.total_steps = total
    for step in range(0, total or 80, 10):
        used = any(trigger.collected(c, s, next_refresh=step + 10) for s in range(step, min(step + 10, total or 80)))
        assert trigger.wants_basis(c, step, 10) == used


def test_a_job_that_goes_on_beyond_its_stated_end_is_served_again() -> None:
    c = config()
    c.total_steps = 20
    assert not trigger.is_due(c, 20, next_refresh=20)
    assert trigger.is_due(c, 21, next_refresh=20)
    assert trigger.collected(c, 20, next_refresh=20)


def fits(useful: bool, versions: int) -> list[int]:
    """Versions that come with a basis, when each can (or cannot) be judged by at the version after it."""
    units: dict[int, float] = {}
    fitted: list[int] = []
    for version in range(1, versions + 1):
        if fitted and fitted[-1] == version - 1:
            units[fitted[-1]] = 0.4 if useful else 0.0
        if trigger.basis_due(units, version):
            fitted.append(version)
    return fitted


def test_a_useless_basis_is_looked_at_again_ever_more_rarely() -> None:
    assert fits(True, 20) == list(range(1, 21))
    assert fits(False, 40) == [1, 3, 7, 15, 31]
    assert trigger.basis_due({1: 0.0, 3: 0.0, 7: 0.3}, 8)  # useful again: at once
