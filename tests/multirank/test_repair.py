"""A repaired graph against one that is built anew, over real ranks; rows move, come and go."""

from __future__ import annotations

import numpy as np
import pytest

from grace_ds.buckets import owner_of
from grace_ds.comm.choose import choose
from grace_ds.comm.local import LocalComm
from grace_ds.config.schema import GraphConfig
from grace_ds.graph import repair as module
from grace_ds.graph.merge import PAD
from grace_ds.graph.repair import KeptGraph, build_kept, repair
from grace_ds.grid import on_grid
from tests.multirank.harness import World, run_ranks
from tests.multirank.test_clustered import corpus

K = 7


def unit(x: np.ndarray) -> np.ndarray:
    return on_grid((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32))


def states() -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and rows at first, after some have moved, and after others have come, gone and moved."""
    draw = np.random.default_rng(2)
    ids, x = corpus()
    x = unit(x + 1e-3 * draw.normal(size=x.shape).astype(np.float32))  # no copies: ties would be a matter of taste
    out = [(ids, x)]
    for share, come in ((0.06, 0), (0.03, 40)):
        ids, x = out[-1]
        x = x.copy()
        moved = draw.random(len(ids)) < share
        x[moved] = unit(x[draw.integers(0, len(ids), moved.sum())] + 0.2 * draw.normal(size=(moved.sum(), x.shape[1])))
        keep = draw.random(len(ids)) >= (0.04 if come else 0)
        new = np.setdiff1d(draw.choice(20_000, come, replace=False), ids)
        rows = unit(x[draw.integers(0, len(ids), len(new))] + 0.1 * draw.normal(size=(len(new), x.shape[1])))
        ids, x = np.concatenate([ids[keep], new]), np.concatenate([x[keep], rows])
        order = np.argsort(ids)
        out.append((ids[order].astype(np.int64), x[order]))
    return out


def config(clusters: int, overlap: int = 2) -> GraphConfig:
    return GraphConfig(clusters=clusters, overlap=overlap, k=K, recall=0.5)


def walk(world: World, clusters: int) -> list[tuple[np.ndarray, np.ndarray, bool]]:
    """(ids, keys of the k nearest, rebuilt) of this rank after each state."""
    comm = choose("torch", timeout=20.0)
    graph: KeptGraph | None = None
    out = []
    for ids, x in states():
        own = owner_of(ids, world.size) == world.rank
        c = config(clusters)
        graph = build_kept(comm, ids[own], x[own], c) if graph is None else repair(comm, graph, ids[own], x[own], c)
        out.append((graph.ids, graph.keys[:, :K].copy(), graph.rebuilt))
    return out


@pytest.mark.parametrize("clusters", [1, 12])
def test_a_repair_equals_a_rebuild_with_the_same_clusters(clusters: int) -> None:
    first, *later = states()
    kept = build_kept(LocalComm(5.0), *first, config(clusters))
    for ids, x in later:
        kept = repair(LocalComm(5.0), kept, ids, x, config(clusters))
        assert not kept.rebuilt
        similarity = x.astype(np.float64) @ x.T.astype(np.float64)
        np.fill_diagonal(similarity, -np.inf)
        meets = (kept.where[:, None, :, None] == kept.where[None, :, None, :]).any((2, 3))
        similarity[~meets] = -np.inf
        nearest = -np.sort(-similarity, axis=1)[:, :K]
        got = kept.neighbours()
        there = got.ids >= 0
        assert np.array_equal(there, nearest > -np.inf)
        assert np.abs(got.similarity - nearest)[there].max() < 2e-6  # cosines are given in steps of 2**-20
        at = np.searchsorted(ids, np.where(there, got.ids, ids[0]))
        assert np.array_equal(ids[at][there], got.ids[there])
        assert np.abs(np.take_along_axis(similarity, at, 1) - got.similarity)[there].max() < 2e-6
        assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in got.ids)


@pytest.mark.parametrize("clusters", [1, 12])
def test_any_number_of_ranks_repairs_alike(clusters: int) -> None:
    one = run_ranks(walk, 1, clusters, timeout=60)[0]
    for size in (2, 3):
        ranks = run_ranks(walk, size, clusters, timeout=60)
        for at, (ids, keys, _) in enumerate(one):
            got = np.concatenate([r[at][0] for r in ranks])
            order = np.argsort(got)
            assert np.array_equal(got[order], ids)
            assert np.array_equal(np.concatenate([r[at][1] for r in ranks])[order], keys), (at, size)


def test_rows_that_lost_too_many_neighbours_are_searched_anew() -> None:
    ids, x = states()[0]
    kept = build_kept(LocalComm(5.0), ids, x, config(1))
    lost = np.unique(kept.neighbours().ids[0])  # with them goes more than the spare
    near = np.argsort(-(x @ x[0]))[1 : K + module.SPARE + 1]
    stays = np.setdiff1d(np.arange(len(ids)), near)
    assert set(lost) <= set(ids[near])
    after = repair(LocalComm(5.0), kept, ids[stays], x[stays], config(1))
    similarity = x[stays] @ x[0]
    similarity[stays == 0] = -np.inf
    assert set(after.neighbours().ids[0]) == set(ids[stays][np.argsort(-similarity)[:K]])
    assert (after.keys[:, K - 1] != PAD).all()


def test_small_drift_is_left_alone_and_large_drift_is_not() -> None:
    ids, x = states()[0]
    kept = build_kept(LocalComm(5.0), ids, x, config(12))
    little = unit(x + 1e-4)
    assert repair(LocalComm(5.0), kept, ids, little, config(12), drift=1e-3).X.tobytes() == kept.X.tobytes()
    far = little.copy()
    far[10] = -far[10]
    after = repair(LocalComm(5.0), kept, ids, far, config(12), drift=1e-3)
    assert np.flatnonzero((after.X != kept.X).any(1)).tolist() == [10]


def test_a_graph_that_has_lost_its_recall_is_built_anew(caplog: pytest.LogCaptureFixture) -> None:
    (ids, x), _, _ = states()
    c = GraphConfig(clusters=12, overlap=2, k=K, recall=0.9)
    kept = build_kept(LocalComm(5.0), ids, x, c)
    spun = unit(np.random.default_rng(9).normal(size=x.shape))  # nothing lies where the clusters are
    with caplog.at_level("INFO"):
        after = repair(LocalComm(5.0), kept, ids, spun, c)
    assert after.rebuilt and "building anew" in caplog.text
    assert not np.array_equal(after.centroids, kept.centroids)
