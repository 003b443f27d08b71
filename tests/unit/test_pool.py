"""The random order, the rolling window, repeats, and files of ids."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_ds.data.order import Permutation
from grace_ds.data.pool import Pool, check_repeats, implied_repeats, read_ids
from grace_ds.errors import CheckpointError, ConfigError, DataError
from grace_ds.records import Schedule


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63))
def test_permutation_is_a_bijection(n, seed):
    assert np.array_equal(np.sort(Permutation(n, seed)(np.arange(n))), np.arange(n))


def test_permutation_depends_on_position_and_seed_only():
    order = Permutation(1000, 7)
    whole = order(np.arange(1000))
    assert np.array_equal(order(np.array([5, 999, 5])), whole[[5, 999, 5]])
    assert np.array_equal(Permutation(1000, 7)(np.arange(1000)), whole)
    assert (Permutation(1000, 8)(np.arange(1000)) != whole).mean() > 0.9


def test_permutation_is_well_mixed():
    n = 20_000
    out = Permutation(n, 1)(np.arange(n))
    assert abs(np.corrcoef(np.arange(n), out)[0, 1]) < 0.03
    assert abs(np.corrcoef(out[:-1], out[1:])[0, 1]) < 0.03
    tenths = np.bincount(out[: n // 10] * 10 // n, minlength=10)  # where the first tenth of the order lies
    assert tenths.min() > 130 and tenths.max() < 270


def test_permutation_of_a_huge_corpus_takes_no_memory():
    n = 10**13 + 7
    out = Permutation(n, 3)(np.arange(n - 1000, n))
    assert len(np.unique(out)) == 1000
    assert out.min() >= 0 and out.max() < n


def test_small_corpus_is_one_window():
    pool = Pool(500, 0, 0.2, 10, 8, seed=1)
    assert pool.size == 500
    for version in (0, 3):
        assert np.array_equal(pool.window_at(version), np.arange(500))


def test_automatic_window_is_harvested_by_a_twentieth():
    pool = Pool(10**6, 0, 0.2, 10, 8, seed=1)
    assert 10 * 8 / pool.size == pytest.approx(0.05)
    assert pool.advance == 400  # what 80 samples a refresh use up at a budget of a fifth


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 400), st.integers(1, 300), st.floats(0.05, 1), st.integers(1, 9), st.integers(1, 9))
def test_window_rolls_over_the_whole_corpus(n, window, budget, steps, batch):
    pool = Pool(n, window, budget, steps, batch, seed=4)
    seen = set()
    before = None
    for version in range(-(-n // max(1, pool.advance)) + 1 if pool.advance else 1):
        ids = pool.window_at(version)
        assert ids.dtype == np.int64
        assert len(ids) == min(n, window)
        assert (np.diff(ids) > 0).all()
        if before is not None:
            assert len(np.intersect1d(before, ids)) >= pool.size - pool.advance
        seen |= set(ids.tolist())
        before = ids
    assert seen == set(range(n))


def test_windows_follow_one_another_along_the_order_from_its_beginning():
    pool, order = Pool(1000, 300, 0.5, 10, 8, seed=2), Permutation(1000, 2)
    assert pool.advance == 160
    for version in (0, 1, 5, 6, 25):  # the sixth goes round the end, the last begins where the first did
        at = np.arange(version * 160, version * 160 + 300) % 1000
        assert np.array_equal(pool.window_at(version), np.sort(order(at)))


def test_window_is_the_same_on_every_rank():
    one, other = Pool(5000, 600, 0.3, 5, 8, seed=2), Pool(5000, 600, 0.3, 5, 8, seed=2)
    assert np.array_equal(other.window_at(17), one.window_at(17))
    assert not np.array_equal(Pool(5000, 600, 0.3, 5, 8, seed=3).window_at(17), one.window_at(17))


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"n": 0}, DataError, "empty"),
        ({"window": -1}, ConfigError, "window is -1"),
        ({"budget": 0.0}, ConfigError, "budget is 0.0"),
        ({"budget": 1.5}, ConfigError, "budget is 1.5"),
        ({"interval_steps": 0}, ConfigError, "interval_steps is 0"),
        ({"batch": 0}, ConfigError, "batch 0"),
    ],
)
def test_impossible_pools_are_refused(changed, error, says):
    with pytest.raises(error, match=says):
        Pool(**({"n": 9, "window": 0, "budget": 0.5, "interval_steps": 1, "batch": 1, "seed": 0} | changed))


def test_repeats():
    assert implied_repeats(total_steps=1000, batch=32, budget=0.2, n=40_000) == pytest.approx(4.0)
    assert check_repeats(1000, 32, 0.2, 40_000, 4.0) == pytest.approx(4.0)
    with pytest.raises(ConfigError, match=r"4\.44 times, above max_repeats 4\.0: raise budget to at least 0\.2,"):
        check_repeats(1000, 32, 0.18, 40_000, 4.0)
    with pytest.raises(ConfigError) as caught:
        check_repeats(10_000, 32, 0.2, 40_000, 4.0)
    assert "raise budget" not in str(caught.value)  # no budget would do
    check_repeats(100_000, 32, 0.2, 40_000, 400.0)


def test_read_ids(tmp_path):
    text, array = tmp_path / "ids.txt", tmp_path / "ids.npy"
    text.write_text("7\n\n# a comment\n 3 # good one\n7\n0\n")
    np.save(array, np.array([7, 3, 7, 0], np.uint16))
    for path in (text, array, str(text)):
        ids = read_ids(path, 8)
        assert ids.dtype == np.int64
        assert ids.tolist() == [0, 3, 7]
    text.write_text("")
    assert read_ids(text, 8).tolist() == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("1\n8\n9\n", r"id 8 is outside of the dataset's \[0, 8\) \(2 such\)"),
        ("1\n-3\n", "id -3"),
        ("1\n2\nx4\n", r":3: 'x4' is not an integer"),
        ("1.5\n", r":1: '1.5'"),
        (f"{2**70}\n", "64 bits"),
        (b"\xff\xfe\x00", "cannot be read as text"),
    ],
)
def test_bad_id_files(tmp_path, content, says):
    file = tmp_path / "ids.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=says):
        read_ids(file, 8)


def test_bad_id_arrays(tmp_path):
    file = tmp_path / "ids.npy"
    with pytest.raises(DataError, match="does not exist"):
        read_ids(file, 8)
    for bad in (np.array([1.0]), np.array([[1]])):
        np.save(file, bad)
        with pytest.raises(DataError, match="1-D array of integer"):
            read_ids(file, 8)
    file.write_bytes(b"torn")
    with pytest.raises(DataError, match="cannot be read as"):
        read_ids(file, 8)
    np.save(file, np.array([8]))
    with pytest.raises(DataError, match="id 8"):
        read_ids(file, 8)


def test_schedules_of_another_dataset_are_refused():
    def schedule(*ids):
        return Schedule(2, 0, np.array(ids), np.zeros(len(ids), np.uint8), np.ones(len(ids), np.float32), 1)

    pool = Pool(50, 0, 0.2, 10, 8, seed=1)
    pool.check([schedule(0, 49), schedule(3)])
    with pytest.raises(CheckpointError, match="schedule 2 names sample 50, and the dataset has 50"):
        pool.check([schedule(0, 49), schedule(50, 3)])
