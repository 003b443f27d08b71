"""The graph against a dense search, propagation against a dense computation."""

from __future__ import annotations

import numpy as np
import pytest

from grace_ds.comm.local import LocalComm
from grace_ds.errors import ConfigError, DataError
from grace_ds.graph import backends
from grace_ds.graph.backends import torch_backend
from grace_ds.graph.propagate import priority, propagate
from grace_ds.graph.ring import nearest
from grace_ds.graph.rows import Request


def clustered(n: int, d: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(max(1, n // 30), d))[rng.integers(0, max(1, n // 30), n)] + 0.4 * rng.normal(size=(n, d))
    x[1::10] = x[::10][: len(x[1::10])]  # exact duplicates
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("name", ["torch", "faiss"])
def test_graph_equals_dense_search(name: str) -> None:
    if name == "faiss":
        pytest.importorskip("faiss")
    x, ids = clustered(600, 16), np.sort(np.random.default_rng(1).choice(5000, 600, replace=False)).astype(np.int64)
    got = nearest(LocalComm(5.0), Request.of(ids, x, 7), backends.choose(name, 600))
    exact = x.astype(np.float64) @ x.T.astype(np.float64)
    np.fill_diagonal(exact, -np.inf)
    expected = -np.sort(-exact, axis=1)[:, :7]
    assert np.abs(got.similarity - expected).max() < 1e-5
    assert not (got.ids == ids[:, None]).any()
    at = np.searchsorted(ids, got.ids)
    assert np.abs(np.take_along_axis(exact, at, 1) - got.similarity).max() < 1e-5


@pytest.mark.parametrize("block", [5, 50, 600])
@pytest.mark.parametrize("order", ["as they come", "nearer and nearer"])
def test_an_exact_search_finds_the_nearest_wherever_they_lie(block: int, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "INDEX_BLOCK", block)  # 5: less than is asked for
    x, backend = clustered(600, 16), torch_backend.TorchBackend()
    if order == "nearer and nearer":  # to the first query: every block holds nearer ones than all before it
        x = x[np.argsort(x @ x[0])]
    queries = np.concatenate([x[-1:], x[::7]])
    ids, similarity = backend.search(backend.build(x, np.arange(600) + 3), queries, 7)
    exact = queries @ x.T
    np.testing.assert_allclose(similarity, -np.sort(-exact, axis=1)[:, :7], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(exact, ids - 3, 1), similarity, atol=1e-6)
    assert all(len(set(row)) == 7 for row in ids.tolist())


def rows_of(kind: str, n: int, d: int) -> np.ndarray:
    """Unit rows in tight clusters, or in none at all."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(n, d))
    if kind == "clustered":
        x = rng.normal(size=(200, d))[rng.integers(0, 200, n)] + 0.3 * x
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("kind", "d"), [("clustered", 32), ("spread", 32), ("spread", 63)])
def test_a_large_shard_is_searched_to_the_asked_recall(kind: str, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    from grace_ds.graph.backends import faiss_backend
    from grace_ds.graph.backends.faiss_backend import FaissBackend

    monkeypatch.setattr(faiss_backend, "FLAT_ROWS", 30_000)
    x, k = rows_of(kind, 31_000, d), 10
    queries, backend = x[::37], FaissBackend(0.95)
    index = backend.build(x, np.arange(len(x)) + 7)
    ids, similarity = backend.search(index, queries, k)
    dense = queries @ x.T
    bar = -np.partition(-dense, k - 1, axis=1)[:, k - 1 : k]
    found = np.take_along_axis(dense, ids - 7, 1)
    assert np.mean(found >= bar - 1e-6) > 0.93  # 500 of these queries were tuned on, the others were not seen
    assert np.abs(found - similarity).max() < 1e-5
    assert index.tuned is not None
    assert (index.tuned.nlist > 0) is (kind == "clustered")  # lists where there are clusters, a scan of all codes elsewhere
    exact = FaissBackend(1.0)
    everything = exact.build(x, np.arange(len(x)))
    assert np.abs(np.sort(exact.search(everything, queries[:50], k)[1]) - np.sort(-np.sort(-dense[:50], 1)[:, :k])).max() < 1e-5


def test_fewer_candidates_than_neighbours_are_padded() -> None:
    x, ids = clustered(4, 8), np.arange(4)
    got = nearest(LocalComm(5.0), Request.of(ids, x, 3, (ids[:2], x[:2])), backends.choose("torch", 2))
    assert (got.ids[2:] >= 0).sum(1).tolist() == [2, 2]
    assert (got.ids[:2] >= 0).sum(1).tolist() == [1, 1]
    assert np.isneginf(got.similarity[got.ids < 0]).all()


def test_an_unknown_back_end_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="torch, faiss"):
        backends.choose("annoy", 10)


def alone(facts: np.ndarray) -> np.ndarray:
    """What one rank exchanges with itself: all rows, and one of zeros for padding."""
    return np.concatenate([facts, np.zeros((1, facts.shape[1]))])


def test_propagation_minimises_its_objective() -> None:
    # Oracle: the minimiser of Σ_j w_j (v - v_j)² + c (v - v_own)² + λ v², found on a grid.
    rng = np.random.default_rng(0)
    n, k, anchors = 5, 4, 12
    own = rng.normal(size=(n + anchors, 1)).astype(np.float32)
    age = np.concatenate([[0, 1, 2, np.inf, np.inf], rng.integers(0, 3, anchors)])
    own[3:5] = np.nan
    place, sim = n + rng.integers(0, anchors, (n + anchors, k)), rng.random((n + anchors, k)).astype(np.float32)
    place[4], sim[4] = n + anchors, -np.inf
    got = propagate(own, age[:, None], place, sim, alone, hops=1, shrink=0.5, decay=0.7)
    grid = np.linspace(-4, 4, 80001)
    for i in range(1, 4):
        cost = 0.5 * grid**2
        for j in range(k):
            cost += sim[i, j] ** 4 * 0.7 ** age[place[i, j]] * (grid - own[place[i, j], 0]) ** 2
        if np.isfinite(age[i]):
            cost += 0.7 ** age[i] * (grid - own[i, 0]) ** 2
        assert got.values[i, 0] == pytest.approx(grid[cost.argmin()], abs=2e-4)
    assert got.values[0] == own[0]  # fresh anchors are clamped
    assert got.values[4] == 0  # nothing known: the mean of a centred signal
    assert got.reached[:5].tolist() == [True, True, True, True, False]


def test_each_hop_carries_a_value_one_row_further_and_less_of_it() -> None:
    # A chain of rows that each hear from the one before, all at cosine 1: half of what is heard is believed, with λ = 1.
    n = 6
    own, age = np.full((n, 1), np.nan, np.float32), np.full(n, np.inf)
    own[0], age[0] = 1, 0
    place, sim = np.maximum(np.arange(n) - 1, 0)[:, None], np.ones((n, 1), np.float32)
    place[0], sim[0] = n, -np.inf
    for hops, heard in ((1, [1, 1 / 2]), (2, [1, 1 / 2, 1 / 3]), (5, [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6])):
        got = propagate(own, age[:, None], place, sim, alone, hops=hops, shrink=1.0, decay=0.5)
        np.testing.assert_allclose(got.values[:, 0], heard + [0] * (n - len(heard)), rtol=1e-6)
        assert got.reached.tolist() == [False, *[True] * hops, *[False] * (n - 1 - hops)]


@pytest.mark.parametrize("hops", [1, 3])
def test_propagation_is_linear_and_never_beyond_what_was_measured(hops: int) -> None:
    rng = np.random.default_rng(1)
    n, k = 80, 6
    known = rng.random(n) < 0.3
    age = np.where(known, rng.integers(0, 4, n), np.inf)
    place, sim = rng.integers(0, n, (n, k)), rng.uniform(-0.5, 1, (n, k)).astype(np.float32)

    def values(own: np.ndarray) -> np.ndarray:
        column = np.where(known, own, np.nan).astype(np.float32)[:, None]
        return propagate(column, age[:, None], place, sim, alone, hops=hops, shrink=0.3, decay=0.7).values[:, 0]

    a, b = rng.normal(size=(2, n)).astype(np.float32)
    np.testing.assert_allclose(values(2 * a - b), 2 * values(a) - values(b), atol=1e-5)
    ones = values(np.ones(n, np.float32))
    assert (ones >= 0).all() and (ones <= 1).all() and (ones[known & (age == 0)] == 1).all()
    assert (np.abs(values(a)) <= np.abs(a[known]).max()).all()


def test_rows_in_other_places_keep_their_values_bit_for_bit() -> None:
    rng = np.random.default_rng(2)
    n, k = 60, 5
    own = rng.normal(size=(n, 2)).astype(np.float32)
    own[rng.random((n, 2)) < 0.6] = np.nan
    age = np.where(np.isnan(own), np.inf, rng.integers(0, 3, own.shape))
    place, sim = rng.integers(0, n, (n, k)), rng.random((n, k)).astype(np.float32)
    options = {"hops": 4, "shrink": 0.5, "decay": 0.7}
    whole = propagate(own, age, place, sim, alone, **options)  # type: ignore[arg-type]
    order = rng.permutation(n)
    at = np.argsort(order)
    mixed = propagate(own[order], age[order], at[place[order]], sim[order], alone, **options)  # type: ignore[arg-type]
    for name in ("values", "reached", "disagreement"):
        assert getattr(whole, name)[order].tobytes() == getattr(mixed, name).tobytes(), name


def test_arrays_that_do_not_fit_are_refused() -> None:
    x, place, sim = np.zeros((3, 1), np.float32), np.zeros((3, 2), np.int64), np.zeros((3, 2), np.float32)
    nothing = x[:, :0]
    for own, age, at in ((x, x[:2], place), (x, x[:, 0], place), (x, x, place[:2]), (nothing, nothing, place)):
        with pytest.raises(DataError, match="shapes"):
            propagate(own, age, at, sim, alone, hops=1, shrink=1.0, decay=0.5)


def test_priority_puts_stale_and_disputed_samples_first() -> None:
    stale, doubt = np.array([0.0, 5.0, 5.0, np.inf]), np.array([1.0, 0.1, 1.0, 1.0], np.float32)
    assert list(np.argsort(-priority(stale, doubt))) == [3, 2, 1, 0]
