"""A graph that is followed from refresh to refresh against one that is built anew, over real ranks."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from grace_ds.comm.buckets import owner_of
from grace_ds.comm.choose import choose
from grace_ds.comm.local import LocalComm
from grace_ds.config.schema import GraphConfig
from grace_ds.graph import insert as insertion
from grace_ds.graph import repair as module
from grace_ds.graph.build import knn
from grace_ds.graph.merge import PAD
from grace_ds.graph.repair import KeptGraph, build_kept, follow
from grace_ds.utils.grid import on_grid
from tests.multirank.harness import World, run_ranks
from tests.multirank.test_clustered import corpus

K = 7
State = tuple[np.ndarray, np.ndarray]  # sorted ids, and a row of each


def unit(x: np.ndarray) -> np.ndarray:
    return on_grid((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32))


def states() -> list[State]:
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


def wanderings(seed: int) -> list[State]:
    """A window of copies, a crowd and rows of zeros, of which some move, leave and enter; in the end few are left."""
    draw = np.random.default_rng([7, seed])
    d, out = 12, []
    centres = draw.normal(size=(6, d))

    def fresh(n: int) -> np.ndarray:
        x = unit(centres[draw.integers(0, 6, n)] + 0.3 * draw.normal(size=(n, d)))
        x[draw.random(n) < 0.05] = 0
        return x

    ids, x = np.sort(draw.choice(5000, 160, replace=False)), fresh(160)
    x[::9] = x[1]
    out.append((ids, x))
    for come, go, move in ((20, 20, 0.1), (0, 0, 0.3), (0, 60, 0.0), (70, 0, 0.0), (10, 10, 0.02), (0, 140, 0.05), (3, 4, 0.1)):
        ids, x = out[-1]
        x = x.copy()
        moved = draw.random(len(ids)) < move
        x[moved] = np.where(draw.random((moved.sum(), 1)) < 0.3, x[draw.integers(0, len(ids), moved.sum())], fresh(moved.sum()))
        keep = np.sort(draw.permutation(len(ids))[: max(2, len(ids) - go)])
        new = np.setdiff1d(draw.choice(5000, come, replace=False), ids)
        ids, x = np.concatenate([ids[keep], new]), np.concatenate([x[keep], fresh(len(new))])
        order = np.argsort(ids)
        out.append((ids[order], x[order]))
    return out


def config(clusters: int, overlap: int = 2, k: int = K) -> GraphConfig:
    """Of the exact tier, or of the clustered one with so many clusters."""
    if not clusters:
        return GraphConfig(tier="exact", k=k)
    return GraphConfig(tier="clustered", clusters=clusters, overlap=overlap, k=k, recall=0.5)


def followed(sequence: list[State], c: GraphConfig, drift: float = 0.0) -> list[KeptGraph]:
    """The graph after each state, on one rank."""
    out: list[KeptGraph] = []
    for ids, x in sequence:
        graph = follow(LocalComm(5.0), out[-1] if out else None, ids, x, c, drift)
        assert graph is not None
        out.append(graph)
    return out


# -- the exact tier: what is repaired is what would be built -------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 9])
@pytest.mark.parametrize("seed", range(6))
def test_a_repaired_graph_is_the_rebuilt_one_bit_for_bit(seed: int, k: int) -> None:
    sequence = wanderings(seed)
    changes = []
    for (ids, x), graph in zip(sequence, followed(sequence, config(0, k=k)), strict=True):
        got, anew = graph.neighbours(), build_kept(LocalComm(5.0), ids, x, config(0, k=k))
        assert anew is not None and graph.exact
        assert got.ids.tobytes() == anew.neighbours().ids.tobytes()
        assert got.similarity.tobytes() == anew.neighbours().similarity.tobytes()
        # Beyond the k nearest are spare ones: what is there is true as far as the list says that it is complete.
        for mine, true, depth in zip(graph.keys, anew.keys, graph.depth, strict=True):
            within = mine[(mine <= depth) & (mine != PAD)]
            assert np.array_equal(within, true[: len(within)])
        changes.append(graph.change)
    assert changes[0] == "built" and changes.count("repaired") >= 5


@pytest.mark.parametrize("clusters", [0, 6])
@pytest.mark.parametrize("seed", range(3))
def test_how_many_pairs_are_held_at_a_time_changes_no_graph(seed: int, clusters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters that overlap find a pair twice; it may then come in two parts."""
    at_once = followed(wanderings(seed), config(clusters, overlap=3))
    monkeypatch.setattr(insertion, "HELD", 5)
    monkeypatch.setattr(insertion, "BLOCK", 100)
    for one, other in zip(at_once, followed(wanderings(seed), config(clusters, overlap=3)), strict=True):
        assert np.array_equal(one.keys, other.keys) and np.array_equal(one.depth, other.depth)


def test_a_built_graph_is_that_of_a_search_and_has_some_to_spare() -> None:
    ids, x = wanderings(0)[0]
    graph, found = build_kept(LocalComm(5.0), ids, x, config(0)), knn(LocalComm(5.0), ids, x, ids, x, config(0))
    assert graph is not None and found is not None
    assert np.array_equal(graph.neighbours().ids, found.ids) and np.array_equal(graph.neighbours().similarity, found.similarity)
    assert graph.keys.shape == (160, K + module.SPARE) and (graph.change, graph.searched) == ("built", 160)


def test_a_refresh_in_which_nothing_has_changed_searches_for_no_row() -> None:
    ids, x = wanderings(1)[0]
    assert not x.any(axis=1).all()  # rows of zeros are no reason either
    for drift, clusters in product((0.0, 0.02), (0, 12)):
        first, again, once_more = followed([(ids, x), (ids, x.copy()), (ids, x)], config(clusters), drift)
        assert first.change == "built"
        for graph in (again, once_more):
            assert (graph.change, graph.searched) == ("none", 0)
            assert graph.keys is first.keys and graph.X is first.X


def test_only_rows_that_come_or_move_or_run_short_are_searched_for() -> None:
    ids, x = states()[0]
    first = followed([(ids, x)], config(0))[0]
    moved = x.copy()
    moved[[3, 50]] = unit(-x[[3, 50]])
    gone = np.setdiff1d(np.arange(len(ids)), [7, 9])
    one_more = np.append(ids, 20_001), np.concatenate([x, x[:1]])
    for state, searched in (((ids, moved), 2), ((ids[gone], x[gone]), 0), (one_more, 1)):
        after = follow(LocalComm(5.0), first, *state, config(0))
        assert after is not None and (after.change, after.searched) == ("repaired", searched)


def test_rows_that_lost_too_many_neighbours_are_searched_anew() -> None:
    ids, x = states()[0]
    kept = followed([(ids, x)], config(0))[0]
    lost = np.unique(kept.neighbours().ids[0])  # with them goes more than the spare
    near = np.argsort(-(x @ x[0]))[1 : K + module.SPARE + 1]
    stays = np.setdiff1d(np.arange(len(ids)), near)
    assert set(lost) <= set(ids[near])
    after = follow(LocalComm(5.0), kept, ids[stays], x[stays], config(0))
    assert after is not None and after.change == "repaired" and 0 < after.searched < len(ids) / 2
    similarity = x[stays] @ x[0]
    similarity[stays == 0] = -np.inf
    assert set(after.neighbours().ids[0]) == set(ids[stays][np.argsort(-similarity)[:K]])
    assert (after.keys[:, K - 1] != PAD).all()


def test_where_most_rows_have_moved_or_other_neighbours_are_asked_for_it_is_built_anew() -> None:
    ids, x = states()[0]
    kept = followed([(ids, x)], config(0))[0]
    spun = unit(np.random.default_rng(9).normal(size=x.shape))
    for share, change in ((0.3, "repaired"), (0.7, "built")):
        rows = np.where((np.arange(len(ids)) < share * len(ids))[:, None], spun, x)
        after = follow(LocalComm(5.0), kept, ids, rows, config(0))
        assert after is not None and after.change == change
    more = follow(LocalComm(5.0), kept, ids, x, config(0, k=K + 2))
    assert more is not None and more.change == "built" and more.neighbours().ids.shape[1] == K + 2


def test_of_no_rows_there_is_no_graph() -> None:
    ids, x = states()[0]
    nobody = ids[:0], x[:0]
    assert follow(LocalComm(5.0), None, *nobody, config(0)) is None
    left, back = followed([(ids[:40], x[:40])], config(0)) * 2
    gone = follow(LocalComm(5.0), left, *nobody, config(0))
    assert gone is None or len(gone.neighbours().ids) == 0
    again = follow(LocalComm(5.0), gone, ids[:40], x[:40], config(0))
    assert again is not None and np.array_equal(again.neighbours().ids, back.neighbours().ids)


# -- the clustered tier --------------------------------------------------------------------------------------------------


def test_a_repair_equals_a_rebuild_with_the_same_clusters() -> None:
    sequence = states()
    for (ids, x), kept in list(zip(sequence, followed(sequence, config(12)), strict=True))[1:]:
        assert kept.change == "repaired" and not kept.exact
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


def test_a_graph_that_has_lost_its_recall_is_built_anew(caplog: pytest.LogCaptureFixture) -> None:
    (ids, x), _, _ = states()
    c = GraphConfig(tier="clustered", clusters=12, overlap=2, k=K, recall=0.9)
    kept = followed([(ids, x)], c)[0]
    draw = np.random.default_rng(9)
    spun = np.where((draw.random(len(ids)) < 0.45)[:, None], unit(draw.normal(size=x.shape)), x)  # not where the clusters are
    with caplog.at_level("INFO"):
        after = follow(LocalComm(5.0), kept, ids, spun, c)
    assert after is not None and after.change == "built" and "building anew" in caplog.text
    assert not np.array_equal(after.centroids, kept.centroids)


@pytest.mark.parametrize("clusters", [0, 12])
def test_small_drift_is_left_alone_and_large_drift_is_not(clusters: int) -> None:
    ids, x = states()[0]
    kept = followed([(ids, x)], config(clusters))[0]
    little = unit(x + 1e-4)
    after = follow(LocalComm(5.0), kept, ids, little, config(clusters), drift=1e-3)
    assert after is not None and (after.X.tobytes(), after.change) == (kept.X.tobytes(), "none")
    far = little.copy()
    far[10] = -far[10]
    after = follow(LocalComm(5.0), kept, ids, far, config(clusters), drift=1e-3)
    assert after is not None and np.flatnonzero((after.X != kept.X).any(1)).tolist() == [10] and after.change == "repaired"
    step, went = x, kept
    for _ in range(4):  # by little and little it is far in the end
        step = step.copy()
        step[10] = unit((step[10] + 0.03 * np.eye(len(step[10]))[0])[None])[0]
        now = follow(LocalComm(5.0), went, ids, step, config(clusters), drift=1e-3)
        assert now is not None
        went = now
    assert went.X[10] @ step[10] > 1 - 1e-3 and not np.array_equal(went.X[10], kept.X[10])


# -- any number of ranks -------------------------------------------------------------------------------------------------


def walk(world: World) -> list[tuple[np.ndarray, np.ndarray, str, int, np.ndarray]]:
    """(ids, keys of the k nearest, change, searched, centroids) of this rank after each state, of both tiers and two walks."""
    comm = choose("torch", timeout=30.0)
    out = []
    for clusters, sequence, drift in (
        (0, wanderings(0), 0.0),
        (12, states(), 0.0),
        (0, states(), 0.02),
        (0, wanderings(3), 0.02),
    ):
        graph: KeptGraph | None = None
        for ids, x in sequence:
            own = owner_of(ids, world.size) == world.rank
            graph = follow(comm, graph, ids[own], x[own], config(clusters), drift)
            assert graph is not None
            out.append((graph.ids, graph.keys[:, :K].copy(), graph.change, graph.searched, graph.centroids))
    return out


def test_any_number_of_ranks_has_the_same_graph() -> None:
    one = run_ranks(walk, 1, timeout=90)[0]
    assert {change for _, _, change, _, _ in one} == {"built", "repaired"}
    for size in (2, 3, 4):
        ranks = run_ranks(walk, size, timeout=120)
        for at, (ids, keys, change, searched, centroids) in enumerate(one):
            parts = [r[at] for r in ranks]
            joined = np.concatenate([part[0] for part in parts])
            order = np.argsort(joined)
            assert np.array_equal(joined[order], ids)
            assert np.array_equal(np.concatenate([part[1] for part in parts])[order], keys), (at, size)
            assert all(part[2:4] == (change, searched) and np.array_equal(part[4], centroids) for part in parts), (at, size)
