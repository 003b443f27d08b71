"""The graph against a dense search, propagation against a dense computation."""

from __future__ import annotations

import numpy as np
import pytest

from grace_ds.comm.local import LocalComm
from grace_ds.errors import ConfigError
from grace_ds.graph import leaves
from grace_ds.graph.ring import nearest
from grace_ds.graph.rows import Request
from grace_ds.propagate import priority, propagate


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
    got = nearest(LocalComm(5.0), Request.of(ids, x, 7), leaves.choose(name, 600))
    exact = x.astype(np.float64) @ x.T.astype(np.float64)
    np.fill_diagonal(exact, -np.inf)
    expected = -np.sort(-exact, axis=1)[:, :7]
    assert np.abs(got.similarity - expected).max() < 1e-5
    assert not (got.ids == ids[:, None]).any()
    at = np.searchsorted(ids, got.ids)
    assert np.abs(np.take_along_axis(exact, at, 1) - got.similarity).max() < 1e-5


def rows_of(kind: str, n: int, d: int) -> np.ndarray:
    """Unit rows in tight clusters, or in none at all."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(n, d))
    if kind == "clustered":
        x = rng.normal(size=(200, d))[rng.integers(0, 200, n)] + 0.3 * x
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("kind", "d"), [("clustered", 32), ("spread", 32), ("spread", 63)])
def test_a_large_shard_is_searched_to_the_asked_recall(kind: str, d: int) -> None:
    pytest.importorskip("faiss")
    from grace_ds.graph.leaves.faiss_leaf import FaissLeaf

    x, k = rows_of(kind, leaves.FLAT_ROWS + 1000, d), 10
    queries, leaf = x[::37], FaissLeaf(0.95)
    index = leaf.build(x, np.arange(len(x)) + 7)
    ids, similarity = leaf.search(index, queries, k)
    dense = queries @ x.T
    bar = -np.partition(-dense, k - 1, axis=1)[:, k - 1 : k]
    found = np.take_along_axis(dense, ids - 7, 1)
    assert np.mean(found >= bar - 1e-6) > 0.93  # 500 of these queries were tuned on, the others were not seen
    assert np.abs(found - similarity).max() < 1e-5
    assert index.tuned is not None
    assert (index.tuned.nlist > 0) is (kind == "clustered")  # lists where there are clusters, a scan of all codes elsewhere
    exact = FaissLeaf(1.0)
    everything = exact.build(x, np.arange(len(x)))
    assert np.abs(np.sort(exact.search(everything, queries[:50], k)[1]) - np.sort(-np.sort(-dense[:50], 1)[:, :k])).max() < 1e-5


def test_fewer_candidates_than_neighbours_are_padded() -> None:
    x, ids = clustered(4, 8), np.arange(4)
    got = nearest(LocalComm(5.0), Request.of(ids, x, 3, (ids[:2], x[:2])), leaves.choose("torch", 2))
    assert (got.ids[2:] >= 0).sum(1).tolist() == [2, 2]
    assert (got.ids[:2] >= 0).sum(1).tolist() == [1, 1]
    assert np.isneginf(got.similarity[got.ids < 0]).all()


def test_an_unknown_leaf_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="faiss, torch"):
        leaves.choose("annoy", 10)


def test_propagation_minimises_its_objective() -> None:
    # Oracle: the minimiser of Σ_j w_j (v - v_j)² + c (v - v_own)² + λ v², found on a grid.
    rng = np.random.default_rng(0)
    n, k = 5, 4
    own = rng.normal(size=(n, 1)).astype(np.float32)
    age = np.array([0, 1, 2, np.inf, np.inf])
    own[3:] = np.nan
    nbr, nbr_age = rng.normal(size=(n, k, 1)).astype(np.float32), rng.integers(0, 3, (n, k)).astype(float)
    sim = rng.random((n, k)).astype(np.float32)
    nbr[4], sim[4] = np.nan, -np.inf
    got = propagate(own, age, nbr, nbr_age, sim, shrink=0.5, decay=0.7).values[:, 0]
    grid = np.linspace(-4, 4, 80001)
    for i in range(1, 4):
        cost = 0.5 * grid**2
        for j in range(k):
            cost += sim[i, j] ** 4 * 0.7 ** nbr_age[i, j] * (grid - nbr[i, j, 0]) ** 2
        if np.isfinite(age[i]):
            cost += 0.7 ** age[i] * (grid - own[i, 0]) ** 2
        assert got[i] == pytest.approx(grid[cost.argmin()], abs=2e-4)
    assert got[0] == own[0, 0]  # fresh anchors are clamped
    assert got[4] == 0  # nothing known: the mean of a centred signal


def test_priority_puts_stale_and_disputed_samples_first() -> None:
    stale, doubt = np.array([0.0, 5.0, 5.0, np.inf]), np.array([1.0, 0.1, 1.0, 1.0], np.float32)
    assert list(np.argsort(-priority(stale, doubt))) == [3, 2, 1, 0]
