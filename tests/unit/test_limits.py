"""Limits on statistics, learned from trusted samples that were held out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grace_ds.features.limits import Limits, tail_location

RNG = np.random.default_rng(0)
BOTH = ((0, -1), (1, -1), (1, 1))


@pytest.mark.parametrize("side", [-1, 1])
def test_of_a_normal_distribution_the_deviation_is_the_standard_one(side: int) -> None:
    middle, deviation = tail_location(RNG.normal(3.0, 0.7, 40_000), side)
    assert middle == pytest.approx(3.0, abs=0.02)
    assert deviation == pytest.approx(0.7, rel=0.03)


def test_it_looks_at_the_tail_that_is_asked_for() -> None:
    skewed = RNG.exponential(size=40_000)
    assert tail_location(skewed, -1)[1] < 0.5 < 1.2 < tail_location(skewed, 1)[1]


def test_alike_values_get_the_least_deviation() -> None:
    assert tail_location(np.full(9, 2.0), least=0.25) == (2.0, 0.25)


def test_a_trusted_set_of_two_kinds_does_not_widen_the_limit_to_what_lies_beyond_both() -> None:
    """Code and tables of numbers: their median absolute deviation spans the gap, and what is below either would pass by it."""
    trusted = np.concatenate([RNG.normal(-6.0, 0.5, 200), RNG.normal(-2.0, 0.5, 200)])[:, None]
    limits = Limits.fit(trusted, ((0, -1),))
    junk, code = np.full((1, 1), -7.9), RNG.normal(-6.0, 0.5, (400, 1))
    spread = 1.4826 * np.median(np.abs(trusted - np.median(trusted)))
    assert np.median(trusted) - 1.5 * spread < junk[0, 0]  # the measure that would not do
    assert limits.quality(junk)[0] < 0.1
    assert limits.quality(code).mean() > 0.7  # an eighth of all trusted is a quarter of one kind


def test_a_value_is_usual_where_trusted_samples_have_such_values_too() -> None:
    limits = Limits.around(RNG.normal(2.0, 0.5, 200))
    assert limits is not None
    found = limits.quality(np.array([[2.0], [1.6], [2.4], [0.5], [3.5], [-9.0]]))
    assert (found[:3] > 0.9).all() and (found[3:] < 0.05).all()
    assert Limits.around(np.arange(7.0)) is None


@given(st.integers(40, 400), st.integers(0, 2**32 - 1))
def test_an_eighth_of_the_trusted_samples_fails_whatever_their_distribution(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    held_out = rng.standard_t(3, (n, 2)) * rng.uniform(0.1, 10, 2) + rng.normal(size=2) * 5
    failed = (Limits.fit(held_out, BOTH).quality(held_out) < 0.51).mean()
    assert failed == pytest.approx(0.12, abs=0.03)


def test_each_limit_is_enough_to_fail_and_no_other_statistic_matters() -> None:
    limits = Limits.fit(RNG.normal(size=(2000, 3)), BOTH)
    rows = np.zeros((5, 3))
    rows[1, 0], rows[2, 1], rows[3, 1], rows[4, 2] = -9, -9, 9, 9
    kept = limits.quality(rows) > 0.5
    assert kept.tolist() == [True, False, False, False, True]
    rows[:] = 0
    rows[1, 0] = 9  # more than normal of what is only limited below
    assert (limits.quality(rows) > 0.9).all()


def test_samples_without_a_statistic_get_the_floor() -> None:
    limits = Limits.fit(RNG.normal(size=(100, 2)), BOTH)
    assert limits.quality(np.full((1, 2), -np.inf)).tolist() == [0.02]
    assert limits.quality(np.empty((0, 2))).shape == (0,)
