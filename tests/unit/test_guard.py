"""When selection is stepped down, when it is looked at again, and how sure the comparison behind it is."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grace_ds.selection.guard import (
    Contrast,
    Decision,
    Remembered,
    Window,
    contrast,
    decide,
    effective_share,
    from_meta,
    loss_share,
    prediction_skill,
)

HELP, HARM, OPEN = (Contrast(d, d - 0.1, d + 0.1, 50, 20) for d in (0.5, -0.5, 0.02))
UNKNOWN = Contrast(math.nan, math.nan, math.nan, 3, 2)
LIMIT = 0.62
DIRTY, CLEAN = Window(0.4, LIMIT), Window(0.8, LIMIT)


def draw(rng: np.random.Generator, mean: float, n: int) -> np.ndarray:
    """Influences with a long tail on one side."""
    return mean + rng.exponential(1.0, n) - 1.0 + rng.normal(0, 0.5, n)


@pytest.mark.parametrize(("core", "audit", "confidence"), [(200, 40, 0.95), (60, 60, 0.8)])
def test_the_interval_covers_the_truth_as_often_as_it_says(core: int, audit: int, confidence: float) -> None:
    rng, rounds, hits = np.random.default_rng(0), 400, 0
    for seed in range(rounds):
        found = contrast(draw(rng, 0.9, core), draw(rng, 0.6, audit), confidence, seed)
        hits += found.low <= 0.3 <= found.high
    error = math.sqrt(confidence * (1 - confidence) / rounds)
    assert confidence - 0.02 - 3 * error < hits / rounds < confidence + 3 * error  # the bootstrap is a little narrow


@pytest.mark.parametrize(("core", "audit"), [(900, 700), (9000, 400), (5000, 20_000)])
def test_its_width_is_that_of_a_difference_of_means(core: int, audit: int) -> None:
    rng = np.random.default_rng(1)
    a, b = draw(rng, 1, core), draw(rng, 0, audit)
    found = contrast(a, b, 0.95, 3)
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(a.var() / core + b.var() / audit), rel=0.12)
    assert found.difference == pytest.approx(a.mean() - b.mean())
    assert (found.low + found.high) / 2 == pytest.approx(found.difference, abs=0.2 * (found.high - found.low))
    assert (found.core, found.audit) == (core, audit)


def test_unknown_influences_do_not_count_and_too_few_say_nothing() -> None:
    rng = np.random.default_rng(2)
    a, b = draw(rng, 1, 30), draw(rng, 0, 8)
    found = contrast(np.append(a, [np.nan, np.inf]), np.append(np.nan, b), 0.9, 5)
    assert found == contrast(a, b, 0.9, 5) and (found.core, found.audit) == (30, 8)
    assert found != contrast(a, b, 0.9, 6)
    for few in (contrast(a, b[:7], 0.9, 5), contrast(a[:7], b, 0.9, 5), contrast(a[:0], b[:0], 0.9, 5)):
        assert math.isnan(few.difference) and math.isnan(few.low) and math.isnan(few.high)


def test_the_comparison_is_of_core_against_audit() -> None:
    rng = np.random.default_rng(3)
    good, bad = draw(rng, 2, 100).astype(np.float32), draw(rng, 0, 50).astype(np.float32)
    assert contrast(good, bad, 0.95, 0).low > 0
    assert contrast(bad, good, 0.95, 0).high < 0
    wide, narrow = contrast(good, bad, 0.99, 0), contrast(good, bad, 0.5, 0)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_the_effective_share_counts_samples() -> None:
    assert effective_share(np.full(50, -3.0)) == pytest.approx(1)
    point = np.full(50, -np.inf)
    point[7] = 2
    assert effective_share(point) == pytest.approx(1 / 50)
    half = np.where(np.arange(50) < 25, 900.0, -900.0)
    assert effective_share(half) == pytest.approx(0.5)


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=20), st.floats(-1e3, 1e3))
def test_the_effective_share_is_of_probabilities_up_to_a_factor(values: list[float], shift: float) -> None:
    share = effective_share(np.array(values))
    assert 1 / len(values) - 1e-9 <= share <= 1 + 1e-9
    assert effective_share(np.array(values) + shift) == pytest.approx(share, rel=1e-6)
    assert effective_share(np.array(values * 2)) == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize("recipe", ["grace", "content", "density", "uniform"])
def test_a_clean_window_is_left_alone_whatever_was_before(recipe: str) -> None:
    for found in (None, HELP, HARM):
        for previous in (None, Decision("content", "", 2, 99)):
            decision = decide(recipe, 7, CLEAN, found, previous)
            assert decision.level == "uniform" and "0.80" in decision.reason and "0.62" in decision.reason
    assert decide(recipe, 0, Window(LIMIT, LIMIT), None, None).level == "uniform"
    assert decide(recipe, 0, Window(LIMIT - 1e-6, LIMIT), None, None).level == recipe


@pytest.mark.parametrize(
    ("recipe", "lower"), [("grace", "content"), ("content", "density"), ("density", "uniform"), ("uniform", "uniform")]
)
def test_harm_steps_one_level_down_and_nothing_else_does(recipe: str, lower: str) -> None:
    for quiet in (None, UNKNOWN, OPEN, Contrast(-0.02, -0.12, 0.08, 50, 20), HELP):
        assert decide(recipe, 3, DIRTY, quiet, None).level == recipe
    found = decide(recipe, 3, DIRTY, HARM, None)
    assert found.level == lower
    assert found.misses == (recipe != "uniform")
    assert "-0.500 [-0.600, -0.400]" in found.reason
    assert found.numbers == {"effective_share": DIRTY.share, "core_minus_audit": -0.5, "low": -0.6, "high": -0.4}


def levels(versions: int, verdict: dict[int, Contrast]) -> tuple[list[str], list[Decision]]:
    """Schedules of recipe grace; a schedule that chose by influences is judged, by ``verdict`` at its version, else as harm."""
    made: list[Decision] = []
    for version in range(versions):
        previous = made[-1] if made else None
        found = verdict.get(version - 1, HARM) if previous is not None and previous.level == "grace" else None
        made.append(decide("grace", version, DIRTY, found, previous))
    return [d.level for d in made], made


def test_what_does_harm_is_tried_again_ever_more_rarely() -> None:
    found, made = levels(40, {})
    assert [v for v, level in enumerate(found) if level == "grace"] == [0, 3, 8, 17, 34]
    assert set(found) == {"grace", "content"}
    assert "schedule 8" in made[6].reason and made[6].misses == 2


def test_it_recovers_at_once_and_forgets() -> None:
    found, made = levels(12, dict.fromkeys((3, 4, 5, 6, 7), HELP))
    assert [v for v, level in enumerate(found) if level == "grace"] == [0, 3, 4, 5, 6, 7, 8, 11]
    assert [d.misses for d in made] == [0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1]


def test_a_look_that_could_not_be_judged_keeps_what_was_missed() -> None:
    looked = decide("grace", 8, DIRTY, None, Decision("content", "", 2, 8))
    unjudged = decide("grace", 9, DIRTY, UNKNOWN, looked)
    again = decide("grace", 10, DIRTY, HARM, unjudged)
    assert [d.level for d in (looked, unjudged, again)] == ["grace", "grace", "content"]
    assert (again.misses, again.look) == (3, 18)


def test_a_decision_outlives_a_checkpoint() -> None:
    for previous in levels(9, {})[1]:
        for meta in (previous.meta(), json.loads(json.dumps(previous.meta()))):
            back = from_meta(meta)
            assert back is not None
            assert (back.level, back.reason, back.misses, back.look) == (
                previous.level,
                previous.reason,
                previous.misses,
                previous.look,
            )
            assert decide("grace", 9, DIRTY, None, back) == decide("grace", 9, DIRTY, None, previous)
    assert previous.meta()["effective_share"] == DIRTY.share
    assert from_meta(None) is None and from_meta({}) is None and from_meta({"objective": "sample"}) is None


def passing(share: float, n: int = 400) -> np.ndarray:
    """Passes of which a share is whole and the others nearly nothing."""
    return np.where(np.arange(n) < share * n, 1.0, 0.02)


def test_what_losses_pass_is_heard_as_an_effective_share() -> None:
    assert [loss_share(passing(share)).value for share in (0.25, 0.5, 1)] == pytest.approx([0.26, 0.52, 1], abs=0.03)
    assert loss_share(np.append(passing(0.5), np.full(99, np.nan))) == loss_share(passing(0.5))
    assert loss_share(passing(0.5, 7)) == loss_share(np.full(99, np.nan)) == Remembered()
    few, many = loss_share(passing(0.5, 20)), loss_share(passing(0.5, 4000))
    assert few.value == pytest.approx(many.value, abs=0.01) and 0 < few.weight < 0.5 < 0.9 < many.weight < 1


def looks(shares: list[float], awaited: int = 0) -> list[Decision]:
    """Schedules of recipe grace of a window that reads like the trusted samples, by what its losses pass at each look."""
    made: list[Decision] = []
    for version, share in enumerate(shares):
        window = Window(0.9, 0.8, loss_share(passing(share)) if version >= awaited else Remembered(), version < awaited)
        made.append(decide("grace", version, window, None, made[-1] if made else None))
    return made


def test_text_that_reads_well_but_is_known_by_heart_is_worth_leaving_out() -> None:
    assert {d.level for d in looks([0.9] * 6)} == {"uniform"}
    found = looks([0.4] * 6)
    assert {d.level for d in found} == {"grace"} and {d.off for d in found} == {frozenset()}
    assert "effective share 0.90, but 0.42 under what losses pass is below 0.8" in found[0].reason
    assert found[0].numbers == {"effective_share": 0.9, "loss_share": pytest.approx(0.42, abs=0.02)}


def test_one_look_among_many_decides_nothing_but_what_stays_is_believed() -> None:
    assert [d.level for d in looks([0.9, 0.95, 0.65, 0.9, 0.85])] == ["uniform"] * 5
    found = [d.level for d in looks([0.9] * 3 + [0.4] * 5 + [0.95] * 9)]
    assert found[:3] == ["uniform"] * 3 and found[5:8] == ["grace"] * 3 and found[-4:] == ["uniform"] * 4


def test_until_losses_are_heard_a_window_is_not_called_clean() -> None:
    for share, level in ((0.4, "grace"), (0.9, "uniform")):
        found = looks([share] * 5, awaited=3)
        assert [d.level for d in found] == ["grace"] * 3 + [level] * 2
        assert all("yet to be compared" in d.reason and not d.off for d in found[:3])
    never = decide("grace", 9, Window(0.9, 0.8), None, found[2])  # no trusted loss could be read
    assert never.level == "uniform" and "window is clean" in never.reason


def test_under_a_clean_window_losses_alone_go_on_being_read() -> None:
    clean = looks([0.9] * 3)[-1]
    assert clean.off == clean.unpaid(9) == {"gradients", "graph", "sketches"}
    down = decide("grace", 3, DIRTY, HARM, clean)
    assert down.off == down.unpaid(4) == {"gradients", "graph", "sketches", "loss"}
    assert down.unpaid(down.look) == frozenset()


def test_what_was_heard_outlives_a_checkpoint() -> None:
    for previous in looks([0.9, 0.7, 0.4, 0.95], awaited=1):
        back = from_meta(json.loads(json.dumps(previous.meta())))
        assert back is not None and (back.losses, back.off) == (previous.losses, previous.off)
    assert "losses" not in decide("content", 3, DIRTY, None, None).meta()


def rows_of(correlation: float, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed).normal(size=(2, n))
    return draw[0], correlation * draw[0] + np.sqrt(1 - correlation**2) * draw[1]


def test_what_was_foretold_is_compared_by_rank() -> None:
    predicted, measured = rows_of(0.5, 4000, 0)
    found = prediction_skill(predicted, measured)
    assert found.weight == 4000 and found.value == pytest.approx(0.48, abs=0.03)  # 6/pi arcsin(r/2) of a normal pair
    assert prediction_skill(np.exp(predicted), measured**3) == found  # whatever keeps the order
    assert prediction_skill(predicted, -measured).value == pytest.approx(-found.value)
    holes = np.where(np.arange(4000) % 2, np.nan, predicted)
    assert prediction_skill(holes, measured) == prediction_skill(predicted[::2], measured[::2])
    assert prediction_skill(np.full(99, np.nan), measured[:99]) == prediction_skill(predicted[:7], measured[:7]) == Remembered()
    assert prediction_skill(np.ones(50), measured[:50]) == Remembered(0.0, 50)


def blind_at(correlations: dict[int, float], versions: int, n: int = 640) -> list[Decision]:
    """Schedules of recipe grace; influences are measured under every schedule that is not blind."""
    made: list[Decision] = []
    for version in range(versions):
        previous = made[-1] if made else None
        measured = previous is not None and not previous.blind.on
        seen = prediction_skill(*rows_of(correlations.get(version, 0.0), n, version)) if measured else None
        made.append(decide("grace", version, DIRTY, None, previous, seen))
    return made


def test_without_foresight_gradients_are_paid_for_ever_more_rarely() -> None:
    made = blind_at({}, 40)
    assert {d.level for d in made} == {"grace"}  # losses and the graph go on
    off = [v for v, d in enumerate(made) if d.off]
    assert 0 not in off and 1 not in off and len(off) > 20
    assert all(d.off == {"gradients", "sketches"} and "no gradients until schedule" in d.reason for d in made if d.off)
    runs = [len(run) for run in "".join("x" if d.off else " " for d in made).split()]
    assert runs == sorted(runs) and runs[0] < runs[-1]


def test_with_foresight_they_are_paid_for_and_what_was_missed_is_forgotten() -> None:
    assert not any(d.off for d in blind_at(dict.fromkeys(range(40), 0.2), 40))
    made = blind_at(dict.fromkeys(range(4, 40), 0.4), 40)
    assert made[2].off or made[3].off
    assert not any(d.off for d in made[12:]) and made[-1].blind.misses == 0
    assert made[-1].numbers["prediction_skill"] > 0.3


def test_chance_seldom_passes_for_foresight_and_foresight_seldom_for_chance() -> None:
    chance = [blind_at({}, 3, 1500 + seed)[2].blind.on for seed in range(100)]
    foresight = [blind_at(dict.fromkeys(range(3), 0.2), 3, 1500 + seed)[2].blind.on for seed in range(100)]
    assert np.mean(chance) > 0.85 and np.mean(foresight) < 0.05


def test_how_it_stands_with_the_gradients_outlives_a_checkpoint() -> None:
    for previous in blind_at({2: 0.1}, 12):
        back = from_meta(json.loads(json.dumps(previous.meta())))
        assert back is not None and back.blind == previous.blind and back.off == previous.off
    assert "blind" not in decide("content", 3, DIRTY, None, None).meta()
