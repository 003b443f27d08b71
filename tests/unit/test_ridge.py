"""The regression on content statistics, against least squares on stacked rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from grace_ds.selection.ridge import Ridge, columns, design, normal_equations

N, S = 300, 5


def samples(seed: int = 0, n: int = N) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Statistics, targets and weights that lie on the grids, so that nothing is rounded but the products."""
    rng = np.random.default_rng(seed)
    statistics = np.rint(np.clip(rng.normal(0, 2, (n, S)), -6, 6) * 16) / 16
    target = np.rint(np.clip(rng.normal(0.5, 2, n), -6, 6) * 1024) / 1024
    return statistics, target, rng.integers(0, 257, n) / 256


def by_hand(statistics: np.ndarray) -> np.ndarray:
    """1, each statistic, a sixth of each product, sample by sample."""
    pairs = list(itertools.combinations_with_replacement(range(statistics.shape[1]), 2))
    return np.array([[1.0, *z, *(z[i] * z[j] / 6 for i, j in pairs)] for z in statistics])


def fit(statistics: np.ndarray, target: np.ndarray, weight: np.ndarray) -> Ridge:
    found = Ridge.solve(normal_equations(design(statistics), target, weight))
    assert found is not None
    return found


def test_the_design_has_all_products_of_two() -> None:
    statistics = samples()[0]
    assert design(statistics).shape == (N, columns(S)) == (N, 21)
    np.testing.assert_allclose(design(statistics), by_hand(statistics), atol=2.0**-9)
    assert design(np.empty((0, S))).shape == (0, 21)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_least_squares_of_stacked_rows(seed: int) -> None:
    """Rows times the root of their weight, and below them one row for each coefficient that is shrunk."""
    statistics, target, weight = samples(seed)
    x = design(statistics)
    root = np.sqrt(weight)[:, None]
    damping = 0.05 * np.square(root * x).sum() / x.shape[1]
    shrunk = np.sqrt(damping) * np.eye(x.shape[1])[1:]
    stacked = np.concatenate([root * x, shrunk])
    wanted = np.linalg.lstsq(stacked, np.concatenate([root[:, 0] * target, np.zeros(len(shrunk))]), rcond=None)[0]
    found = fit(statistics, target, weight)
    np.testing.assert_allclose(found.coefficients, wanted, atol=1e-5)
    np.testing.assert_allclose(found.predict(x), x @ wanted, atol=1e-4)


def test_the_same_bits_however_the_samples_are_spread_over_ranks() -> None:
    statistics, target, weight = samples()
    x = design(statistics + np.random.default_rng(5).normal(size=statistics.shape))
    target = target + np.random.default_rng(6).normal(size=N)
    whole = normal_equations(x, target, weight)
    order = np.random.default_rng(7).permutation(N)
    for cuts in ([], [100], [0, 1, 299], [150, 150, 300]):
        parts = np.split(order, cuts)
        assert np.array_equal(sum(normal_equations(x[p], target[p], weight[p]) for p in parts), whole)
    fitted = Ridge.solve(whole)
    assert fitted is not None
    alone = np.concatenate([fitted.predict(x[i : i + 1]) for i in range(N)])
    assert alone.tobytes() == fitted.predict(x).tobytes()
    assert (alone.astype(np.float64) * 2**16 % 1 == 0).all()  # on a grid: no product's last bits show


def test_a_linear_truth_is_found_through_heavy_noise() -> None:
    rng = np.random.default_rng(3)
    statistics = rng.normal(size=(20_000, S))
    truth = 0.5 + 0.4 * statistics[:, 1] - 0.3 * statistics[:, 4]
    found = fit(statistics, truth + rng.normal(0, 1.5, len(truth)), np.ones(len(truth)))
    assert np.corrcoef(found.predict(design(statistics)), truth)[0, 1] > 0.97
    assert found.predict(design(statistics)).mean() == pytest.approx(0.5, abs=0.05)


def test_the_mean_is_not_shrunk() -> None:
    statistics, target, weight = samples()
    centred, moved = fit(statistics, target * 0.5, weight), fit(statistics, target * 0.5 + 2.5, weight)
    x = design(statistics)
    np.testing.assert_allclose(moved.predict(x) - centred.predict(x), 2.5, atol=1e-4)


def test_nothing_to_learn_from_is_none() -> None:
    nothing = normal_equations(design(np.empty((0, S))), np.empty(0), np.empty(0))
    assert len(nothing) == 21 * 21 + 21
    assert Ridge.solve(nothing) is None
    statistics, target, _ = samples()
    assert Ridge.solve(normal_equations(design(statistics), target, np.zeros(N))) is None
    one = Ridge.solve(nothing + normal_equations(design(statistics[:1]), target[:1], np.ones(1)))
    assert one is not None and one.predict(design(statistics[:1])) == pytest.approx(target[0], abs=1e-3)


def test_weights_count_samples() -> None:
    statistics, target, _ = samples()
    weight = np.where(np.arange(N) < 100, 1.0, 0.0)
    first = fit(statistics[:100], target[:100], np.ones(100))
    assert np.array_equal(fit(statistics, target, weight).coefficients, first.coefficients)


def test_outliers_are_pulled_in() -> None:
    statistics, target, weight = samples()
    wild, tame = target.copy(), target.copy()
    wild[:5], tame[:5] = [1e30, -1e30, 7, -6.5, 6], [6, -6, 6, -6, 6]
    assert np.array_equal(fit(statistics, wild, weight).coefficients, fit(statistics, tame, weight).coefficients)
    far, near = statistics.copy(), statistics.copy()
    far[:3, 0], near[:3, 0] = [100, -1e300, np.inf], [6, -6, 6]
    assert np.array_equal(design(far), design(near))


def test_a_statistic_that_is_not_known_says_nothing() -> None:
    statistics = samples()[0]
    unknown, zero = statistics.copy(), statistics.copy()
    unknown[3], zero[3] = np.nan, 0
    assert np.array_equal(design(unknown), design(zero))
