"""The exact graph over real ranks: the same bits however the rows are spread, and the neighbours of a dense search."""

from __future__ import annotations

import importlib.util
from itertools import product

import numpy as np

from grace_ds.comm.choose import choose
from grace_ds.graph import backends
from grace_ds.graph.ring import nearest
from grace_ds.graph.rows import Request
from grace_ds.records import Neighbours
from tests.multirank.harness import World, run_ranks

D = 24
BACKENDS = ("torch", *(["faiss"] if importlib.util.find_spec("faiss") else []))
SPLITS = ("even", "uneven", "one empty", "index on one")
CLOSE = 1e-6  # cosines are given in steps of 2**-20
CASES = {"all": (1, 7), "few anchors": (3, 7), "fewer than k": (60, 12)}  # every n-th row is in the index; k


def corpus() -> tuple[np.ndarray, np.ndarray]:
    """Ids, and rows in clusters: a crowd of copies, one of rows that float32 products do not order, pairs, rows of zeros."""
    draw = np.random.default_rng(5)
    x = draw.normal(size=(12, D))[draw.integers(0, 12, 480)] + 0.5 * draw.normal(size=(480, D))
    x[::11] = x[1::11]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x[5::7] = x[5]
    x[3::9] = x[3] + 3e-7 * draw.normal(size=x[3::9].shape)
    x[[17, 200, 201]] = 0
    return np.sort(draw.choice(10_000, 480, replace=False)).astype(np.int64), x.astype(np.float32)


def owners(split: str, n: int, size: int) -> np.ndarray:
    """(n,) the rank that holds each row."""
    draw = np.random.default_rng([6, size, SPLITS.index(split)])
    if split == "even":
        return draw.permutation(n) % size
    if split == "uneven":
        share = np.arange(1, size + 1) ** 3
        return draw.choice(size, n, p=share / share.sum())
    return draw.integers(0, max(1, size - 1), n)  # nothing for the last rank


def search_all(world: World) -> dict[tuple[str, str, str], tuple[np.ndarray, Neighbours]]:
    """(case, split, backend) → this rank's query ids and what it found."""
    comm = choose("torch", timeout=20.0)
    ids, x = corpus()
    found = {}
    for case, split, name in product(CASES, SPLITS, BACKENDS):
        every, k = CASES[case]
        queries = owners(split, len(ids), world.size) == world.rank
        index = np.arange(len(ids)) % every == 0
        index &= (world.rank == 0) if split == "index on one" else queries
        backend = backends.choose(name, len(ids))
        asked = Request.of(ids[queries], x[queries], k, (ids[index], x[index]))
        found[case, split, name] = asked.q_ids, nearest(comm, asked, backend)
    return found


def test_any_number_of_ranks_finds_the_neighbours_of_a_dense_search() -> None:
    ids, x = corpus()
    one = run_ranks(search_all, 1, timeout=60)[0]
    for case, (every, k) in CASES.items():
        check_against_dense(ids, x, np.arange(len(ids)) % every == 0, k, one[case, "even", "torch"][1])
    for size in (1, 2, 3, 4):
        ranks = [one] if size == 1 else run_ranks(search_all, size, timeout=60)
        for case, split, name in one:
            parts = [found[case, split, name] for found in ranks]
            assert "empty" not in split or size == 1 or len(parts[-1][0]) == 0
            order = np.argsort(np.concatenate([q for q, _ in parts]))
            for column in ("ids", "similarity"):
                got = np.concatenate([getattr(n, column) for _, n in parts])[order]
                wanted = getattr(one[case, "even", "torch"][1], column)
                assert got.dtype == wanted.dtype
                assert got.tobytes() == wanted.tobytes(), f"{column} of {case}, {split}, {name} on {size} ranks"


def check_against_dense(ids: np.ndarray, x: np.ndarray, index: np.ndarray, k: int, got: Neighbours) -> None:
    """As near as the dense search's, each where it belongs, of copies the lowest ids, and nothing twice."""
    exact = x.astype(np.float64) @ x.T.astype(np.float64)
    exact[:, ~index] = -np.inf
    np.fill_diagonal(exact, -np.inf)
    nearest_first = -np.sort(-exact, axis=1)[:, :k]
    assert got.ids.shape == got.similarity.shape == nearest_first.shape
    there = np.isfinite(nearest_first)
    assert np.array_equal(got.ids >= 0, there)
    assert np.array_equal(np.isfinite(got.similarity), there)
    assert there.all() == (index.sum() > k)
    assert np.abs(got.similarity[there] - nearest_first[there]).max() < CLOSE
    _, copy = np.unique(x, axis=0, return_inverse=True)
    for i, (found, similarity) in enumerate(zip(got.ids, got.similarity, strict=True)):
        found = found[found >= 0]
        at = np.searchsorted(ids, found)
        assert np.array_equal(ids[at], found) and len(set(found)) == len(found)
        assert np.abs(exact[i, at] - similarity[: len(found)]).max() < CLOSE  # -inf for itself and what is not indexed
        tied = similarity[1 : len(found)] == similarity[: len(found) - 1]
        assert (np.diff(found)[tied] > 0).all()
        for group in np.unique(copy[at]):
            members = ids[(copy == group) & index & (np.arange(len(ids)) != i)]
            mine = found[copy[at] == group]
            assert set(mine) == set(members[: len(mine)])
