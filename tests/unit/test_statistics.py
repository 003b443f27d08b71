"""Thresholds, sums and ranks of one rank against sorting and exact fractions; tests/multirank/test_sharded.py has more ranks."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_ds.comm import statistics
from grace_ds.comm.local import LocalComm
from grace_ds.comm.statistics import by_lower_id, exact_sums, float_keys, float_of, int_keys, kth_largest, quantile, rank01, top
from grace_ds.errors import DataError

ALONE = LocalComm(5.0)
NUMBERS = st.floats(allow_nan=False) | st.sampled_from([0.0, -0.0, 5e-324, -5e-324, math.inf, -math.inf])


@settings(deadline=None)
@given(st.lists(NUMBERS, max_size=30), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=30))
def test_keys_are_in_the_order_of_their_values_and_give_them_back(values: list[float], numbers: list[int]) -> None:
    keys = float_keys(np.array(values, np.float64)).tolist()
    for a, x in zip(keys, values, strict=True):
        assert float_of(a) == x
        assert [a < b for b in keys] == [x < y for y in values] and [a == b for b in keys] == [x == y for y in values]
    keys = int_keys(np.array(numbers, np.int64)).tolist()
    assert sorted(numbers) == [number for _, number in sorted(zip(keys, numbers, strict=True))]


@pytest.mark.parametrize("few", [0, 3, 100], ids=["digit by digit", "the last sorted", "sorted"])
@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**16, 2**48, 2**64 - 1]), min_size=1, max_size=20), st.data())
def test_the_kth_largest_is_that_of_a_sort(few: int, keys: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(keys)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "FEW", few)
        patch.setattr(statistics, "CHUNK", 4)
        found = kth_largest(ALONE, np.array(keys, np.uint64), k)
    bar = sorted(keys, reverse=True)[k - 1]
    assert found == (bar, sum(key > bar for key in keys))
    with pytest.raises(DataError, match="-th largest"):
        kth_largest(ALONE, np.array(keys, np.uint64), len(keys) + 1)


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), max_size=20), st.integers(-1, 22))
def test_the_top_of_equals_are_the_lower_ids(values: list[int], k: int) -> None:
    ids = np.random.default_rng(0).permutation(len(values)).astype(np.int64)
    chosen = top(ALONE, k, float_keys(np.array(values, np.float64)), by_lower_id(ids))
    best = sorted(range(len(values)), key=lambda i: (-values[i], ids[i]))
    assert np.flatnonzero(chosen).tolist() == sorted(best[: max(k, 0)])


def test_equals_without_anything_to_tell_them_apart_are_refused() -> None:
    with pytest.raises(DataError, match="id of its own"):
        top(ALONE, 1, np.zeros(3, np.uint64), by_lower_id(np.zeros(3, np.int64)))


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-1e300, 1e300), st.integers(0, 2)), max_size=40))
def test_sums_are_exact_to_a_grid_far_below_the_largest(pairs: list[tuple[float, int]]) -> None:
    values, groups = np.array([v for v, _ in pairs], np.float64), np.array([g for _, g in pairs], np.int64)
    found = exact_sums(ALONE, values, groups, 3)
    largest = max((abs(v) for v, _ in pairs), default=0.0)
    for group in range(3):
        wanted = sum((Fraction(v) for v, g in pairs if g == group), Fraction(0))
        assert abs(Fraction(float(found[group])) - wanted) <= Fraction(largest) * Fraction(len(pairs) + 1, 2**53)


@settings(deadline=None)
@given(st.lists(st.sampled_from([-2.0, 0.0, 1.5, 8.0, math.nan]), max_size=12))
def test_ranks_and_quantiles_are_those_of_a_sort(values: list[float]) -> None:
    known = sorted(v for v in values if v == v)
    found = rank01(ALONE, np.array(values, np.float32))
    for value, rank in zip(values, found.tolist(), strict=True):
        if not known:
            assert math.isnan(rank)
        elif value != value or len(known) == 1:
            assert rank == 0.5
        else:
            places = [i for i, other in enumerate(known) if other == value]
            assert rank == pytest.approx(sum(places) / len(places) / (len(known) - 1), rel=1e-15)
    for share in (0.0, 0.25, 0.9, 1.0):
        wanted = known[int(share * (len(known) - 1))] if known else None
        assert quantile(ALONE, np.array(values, np.float32), share) == wanted
