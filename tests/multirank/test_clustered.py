"""The clustered tier over real ranks: the same edges however rows are spread, and the recall that was predicted."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from grace_ds.comm.choose import choose
from grace_ds.comm.local import LocalComm
from grace_ds.config.schema import GraphConfig
from grace_ds.graph import clustered, placement
from grace_ds.graph.backends import exact
from grace_ds.graph.build import knn
from grace_ds.graph.clusters import fit, nearest_centroids
from grace_ds.graph.merge import finished
from grace_ds.graph.ring import nearest
from grace_ds.graph.rows import Request, prepared
from grace_ds.records import Neighbours
from grace_ds.utils.grid import ROW_GRID
from tests.multirank.harness import World, run_ranks
from tests.multirank.test_ring import SPLITS, owners

N, D, K = 900, 24, 7
CASES = {"alike": 1, "few anchors": 3}  # every n-th row is in the index
COUNTS = (9, 30)


def corpus(n: int = N) -> tuple[np.ndarray, np.ndarray]:
    """Ids, and rows in clusters of very unequal sizes, with copies, a crowd, and rows of zeros."""
    draw = np.random.default_rng(8)
    share = 1 / np.arange(1, 25) ** 1.3
    x = draw.normal(size=(24, D))[draw.choice(24, n, p=share / share.sum())] + 0.45 * draw.normal(size=(n, D))
    x[::13] = x[1::13][: len(x[::13])]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x[5::17] = x[5]
    x[[11, 300, 301]] = 0
    return np.sort(draw.choice(20_000, n, replace=False)).astype(np.int64), x.astype(np.float32)


def config(clusters: int, overlap: int = 2) -> GraphConfig:
    return GraphConfig(tier="clustered", clusters=clusters, overlap=overlap, k=K)


def search_all(world: World) -> dict[tuple[str, str, int], tuple[np.ndarray, Neighbours]]:
    clustered.LEAST_WAVE = 1 << 13  # several waves
    comm = choose("torch", timeout=20.0)
    ids, x = corpus()
    found = {}
    for case, split, clusters in product(CASES, SPLITS, COUNTS):
        own = owners(split, N, world.size) == world.rank
        index = np.arange(N) % CASES[case] == 0
        index &= (world.rank == 0) if split == "index on one" else own
        q_ids, Q = ids[own], x[own]
        i_ids, X = (q_ids, Q) if case == "alike" and split != "index on one" else (ids[index], x[index])
        graph = knn(comm, q_ids, Q, i_ids, X, config(clusters))
        assert graph is not None
        found[case, split, clusters] = q_ids, graph
    return found


def test_any_number_of_ranks_finds_the_same_edges() -> None:
    one = run_ranks(search_all, 1, timeout=60)[0]
    for size in (2, 3, 4):
        ranks = run_ranks(search_all, size, timeout=90)
        for key in one:
            parts = [found[key] for found in ranks]
            order = np.argsort(np.concatenate([q for q, _ in parts]))
            for column in ("ids", "similarity"):
                got = np.concatenate([getattr(n, column) for _, n in parts])[order]
                assert got.tobytes() == getattr(one[key[0], "even", key[2]][1], column).tobytes(), (column, key, size)


def placed(clusters: int, overlap: int = 0, recall: float = 0.99, n: int = N) -> tuple[Request, placement.Placement]:
    asked, comm = Request.of(*corpus(n), K), LocalComm(5.0)
    centroids = placement.centroids_of(comm, asked.ids, asked.X, clusters)
    return asked, placement.place(comm, asked, centroids, recall, overlap)


def searched(asked: Request, p: placement.Placement) -> Neighbours:
    keys = clustered.nearest_keys(LocalComm(5.0), asked, exact("torch"), p)
    return finished(keys, asked.q_ids, asked.k, asked.exclude_self)


def test_one_cluster_is_the_exact_tier() -> None:
    asked, p = placed(1)
    graph = searched(asked, p)
    wanted = nearest(LocalComm(5.0), asked, exact("torch"))
    assert p.recall == 1
    assert graph.ids.tobytes() == wanted.ids.tobytes() and graph.similarity.tobytes() == wanted.similarity.tobytes()


@pytest.mark.parametrize("overlap", [1, 2, 3])
def test_the_foretold_recall_is_what_the_search_reaches(overlap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "SAMPLE_QUERIES", N)  # all of them: then it is no estimate
    asked, p = placed(40, overlap)
    graph = searched(asked, p)
    true = nearest(LocalComm(5.0), asked, exact("torch"))
    assert p.recall == pytest.approx(np.mean([np.isin(t, g).mean() for t, g in zip(true.ids, graph.ids, strict=True)]), abs=1e-12)
    assert p.recall < 1
    at, x = np.searchsorted(asked.ids, graph.ids), asked.X
    cosine = np.einsum("nkd,nd->nk", x[at].astype(np.float64), x.astype(np.float64))
    there = graph.ids >= 0
    assert np.abs(cosine - graph.similarity)[there].max() < 1e-6


def test_the_smallest_overlap_that_reaches_the_recall_is_taken() -> None:
    recalls = [placed(40, o)[1].recall for o in range(1, 9)]
    assert recalls == sorted(recalls) and recalls[0] < 0.9
    chosen = placed(40, 0, 0.97)[1]
    assert chosen.overlap == next(o for o, r in enumerate(recalls, 1) if r >= 0.97)


def test_rows_that_do_not_cluster_are_searched_exactly(caplog: pytest.LogCaptureFixture) -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(600, 60))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    ids = np.arange(600)
    with pytest.MonkeyPatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr("grace_ds.graph.plan.CLUSTERED_ROWS", 500)
        graph = knn(LocalComm(5.0), ids, x, ids, x, GraphConfig(k=K))
    wanted = nearest(LocalComm(5.0), Request.of(ids, x, K), exact("torch"))
    assert graph is not None and graph.ids.tobytes() == wanted.ids.tobytes()
    assert "hardly cluster" in caplog.text


def test_centroids_are_distinct_unit_and_balanced() -> None:
    ids, x = corpus(3000)
    centroids = fit(prepared(ids, x), 50)
    assert len(np.unique(centroids, axis=0)) == len(centroids) >= 45
    assert np.abs(np.linalg.norm(centroids, axis=1) - 1).max() < 1e-5
    assert np.array_equal(np.rint(centroids * ROW_GRID), centroids * ROW_GRID)
    where = nearest_centroids(x, centroids, 2)
    similar = x.astype(np.float64) @ centroids.astype(np.float64).T
    some = x.any(axis=1)
    assert np.array_equal(similar.argmax(1)[some], where[some, 0])
    assert (where[:, 0] != where[:, 1]).all()
    sizes = np.bincount(where[some, 0], minlength=len(centroids))
    crowd = np.unique(x, axis=0, return_counts=True)[1].max()  # which nothing can divide
    assert sizes.max() <= max(4 * sizes.mean(), 1.5 * crowd)


def test_waves_hold_every_task_once_within_the_limit_and_share_the_work() -> None:
    _, p = placed(40, 2)
    for ranks in (1, 3, 4):
        for alike in (True, False):
            limit = 4 * D * 150
            made = clustered.waves(p, ranks, D, alike, limit)
            tasks = [task for wave in made for task in wave]
            parts: dict[int, set[int]] = {}
            for task in tasks:
                parts.setdefault(task.cluster, set()).add(task.part)
                assert parts[task.cluster] <= set(range(task.parts))
            assert len(tasks) == sum(len(s) for s in parts.values())
            assert sorted(parts) == list(np.flatnonzero(p.n_index * p.n_queries))
            assert all(len(parts[t.cluster]) == t.parts for t in tasks)
            work = [
                sum(p.n_queries[t.cluster] / t.parts * p.n_index[t.cluster] for t in tasks if t.owner == r) for r in range(ranks)
            ]
            assert max(work) <= 4 / 3 * sum(work) / ranks + 1
            for wave in made:
                for r in range(ranks):
                    mine = [t for t in wave if t.owner == r]
                    rows = sum(int(p.n_index[t.cluster]) + (0 if alike else int(p.n_queries[t.cluster]) // t.parts) for t in mine)
                    assert len(mine) <= 1 or rows * 4 * D <= limit
