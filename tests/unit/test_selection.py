"""Sampling against enumerated probabilities, greedy against naive greedy and the exhaustive optimum, the other objectives."""

from __future__ import annotations

import tracemalloc
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_ds import registry
from grace_ds.errors import ConfigError
from grace_ds.records import Neighbours
from grace_ds.selection import facility_location, gumbel
from grace_ds.selection.facility_location import coverage, lazy_greedy
from grace_ds.selection.objectives import select


def test_inclusion_frequencies_are_those_of_successive_sampling() -> None:
    p, k, draws = np.array([0.5, 0.25, 0.15, 0.1]), 2, 20000
    expected = np.zeros(4)
    for order in permutations(range(4), k):
        left, chance = 1.0, 1.0
        for i in order:
            chance *= p[i] / left
            left -= p[i]
        expected[list(order)] += chance
    seen = np.zeros(4)
    for version in range(draws):
        seen[select("sample", np.arange(4), np.log(p) + 3, k, seed=5, version=version).ids] += 1
    assert np.abs(seen / draws - expected).max() < 4 * np.sqrt(0.25 / draws)


def test_weights_make_the_sample_stand_for_the_window() -> None:
    rng = np.random.default_rng(0)
    log_p, value = rng.normal(size=400), rng.normal(size=400) + np.linspace(0, 3, 400)
    estimates = []
    for version in range(300):
        c = select("sample", np.arange(400), log_p, 80, seed=1, version=version)
        estimates.append((value[c.ids] * c.weights).sum() / c.weights.sum())
    assert abs(np.mean(estimates) - value.mean()) < 4 * np.std(estimates) / np.sqrt(300) + 0.02


def random_graph(rng: np.random.Generator, n: int, k: int) -> tuple[np.ndarray, Neighbours]:
    ids = np.sort(rng.choice(1000, n, replace=False)).astype(np.int64)
    nbr = np.stack([rng.choice(np.delete(ids, i), k, replace=False) for i in range(n)])
    return ids, Neighbours(nbr, np.sort(rng.random((n, k)).astype(np.float32), 1)[:, ::-1].copy())


def dense(ids: np.ndarray, g: Neighbours) -> np.ndarray:
    sim = np.eye(len(ids))
    for i in range(len(ids)):
        for j, s in zip(g.ids[i], g.similarity[i], strict=True):
            at = int(np.searchsorted(ids, j))
            sim[i, at] = max(sim[i, at], s)
            sim[at, i] = max(sim[at, i], s)
    return sim


@pytest.mark.parametrize("seed", range(8))
def test_greedy_is_greedy_and_within_its_bound(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids, graph = random_graph(rng, 10, 3)
    weights, sim = rng.random(10), dense(ids, graph)

    def value(chosen: tuple[int, ...]) -> float:
        return float((sim[:, list(chosen)].max(1) * weights).sum()) if chosen else 0.0

    got = lazy_greedy(coverage(ids, graph), weights, 4, np.ones(10, bool), np.empty(0, np.int64))
    naive: tuple[int, ...] = ()
    for _ in range(4):
        naive += (max((j for j in range(10) if j not in naive), key=lambda j: value((*naive, j))),)
    best = max(value(c) for c in combinations(range(10), 4))
    assert value(tuple(got)) == pytest.approx(value(naive), rel=1e-6)
    assert value(tuple(got)) >= (1 - 1 / np.e) * best


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(0, 2), st.integers(0, 12), st.integers(0, 4))
def test_facility_location_completes_the_included_within_its_bound(
    seed: int, k: int, forced: int, worthless: int, excluded: int
) -> None:
    """With ids that must be in, ids that must not, and samples that count for nothing and are in only where they must be."""
    rng = np.random.default_rng(seed)
    ids, graph = random_graph(rng, 12, 3)
    order = rng.permutation(12)
    include, exclude = np.sort(ids[order[: min(forced, k)]]), np.sort(ids[order[12 - excluded :]])
    log_p = rng.normal(size=12)
    log_p[rng.permutation(12)[:worthless]] = -np.inf
    got = select("facility_location", ids, log_p, k, seed=0, version=0, neighbours=graph, include=include, exclude=exclude)

    first = tuple(np.searchsorted(ids, include).tolist())
    others = [j for j in range(12) if j not in first and np.isfinite(log_p[j]) and ids[j] not in exclude]
    room = min(k - len(first), len(others))
    assert set(include) <= set(got.ids) <= set(include) | set(ids[others])
    assert len(got.ids) == len(first) + room
    weights, sim = np.exp(log_p), dense(ids, graph)

    def value(chosen: tuple[int, ...]) -> float:
        return float((sim[:, list(chosen)].max(1) * weights).sum()) if chosen else 0.0

    start, naive = value(first), first
    for _ in range(room):
        naive += (max((j for j in others if j not in naive), key=lambda j: value((*naive, j))),)
    best = max(value((*first, *c)) for c in combinations(others, room)) - start
    reached = value(tuple(np.searchsorted(ids, got.ids))) - start
    assert reached == pytest.approx(value(naive) - start, abs=1e-6)
    assert (1 - 1 / np.e) * best - 1e-6 <= reached <= best + 1e-6


def test_greedy_goes_on_past_the_last_gain_and_takes_the_lower_positions() -> None:
    ids, graph = random_graph(np.random.default_rng(3), 10, 3)
    first = np.array([6, 2])
    candidates = np.arange(10) != 4
    taken = lazy_greedy(coverage(ids, graph), np.zeros(10), 6, candidates, first)
    assert taken.tolist() == [6, 2, 0, 1, 3, 5]
    assert lazy_greedy(coverage(ids, graph), np.zeros(10), 99, candidates, first).tolist() == [6, 2, 0, 1, 3, 5, 7, 8, 9]


def dyadic_graph(rng: np.random.Generator, n: int, k: int) -> tuple[np.ndarray, Neighbours]:
    """Similarities in eighths, so that sums are exact in any order and many gains are equal."""
    ids, graph = random_graph(rng, n, k)
    return ids, Neighbours(graph.ids, np.ceil(graph.similarity * 8) / 8)


def naive_order(sim: np.ndarray, weights: np.ndarray, k: int, candidates: np.ndarray, first: list[int]) -> list[int]:
    """Greedy as defined: every gain anew for every choice."""
    taken, best = list(first), sim[:, first].max(1, initial=0.0)
    while len(taken) < k and set(np.flatnonzero(candidates)) - set(taken):
        gains = ((np.maximum(sim, best[:, None]) - best[:, None]) * weights[:, None]).sum(0)
        gains[~candidates] = gains[taken] = -1.0
        taken.append(int(np.argmax(gains)))
        best = np.maximum(best, sim[:, taken[-1]])
    return taken


@pytest.mark.parametrize("chain", [facility_location.CHAIN, 0, 10**9], ids=["rounds and heap", "heap", "rounds"])
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 60), st.integers(1, 60), st.integers(1, 9))
def test_the_order_is_naive_greedys_ties_and_all(chain: int, seed: int, n: int, k: int, band: int) -> None:
    rng = np.random.default_rng(seed)
    ids, graph = dyadic_graph(rng, n, min(4, n - 1))
    weights, candidates = rng.integers(0, 4, n).astype(float), rng.random(n) < 0.8
    first = np.sort(rng.permutation(n)[: min(k, 2)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facility_location, "CHAIN", chain)
        patch.setattr(facility_location, "BAND_ROWS", band)
        patch.setattr(facility_location, "BANDS", 4)
        got = lazy_greedy(coverage(ids, graph), weights, k, candidates, first)
    assert got.tolist() == naive_order(dense(ids, graph), weights, k, candidates, first.tolist())


def test_a_long_chain_of_equal_gains_is_taken_in_order() -> None:
    """On a path every choice waits for the one before it: rounds over the whole path would be quadratic."""
    n = 600
    at = np.arange(n)
    graph = Neighbours(np.stack([(at - 1) % n, (at + 1) % n], 1), np.full((n, 2), 0.5, np.float32))
    heaps, one_by_one = [], facility_location._one_by_one
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facility_location, "_one_by_one", lambda *given: (heaps.append(len(given[1])), one_by_one(*given)))
        got = lazy_greedy(coverage(at, graph), np.ones(n), 300, np.ones(n, bool), np.empty(0, np.int64))
    assert got.tolist()[:199] == list(range(0, 597, 3))  # whole gains of 2 first: every third, to where the ring closes
    assert heaps
    assert got.tolist() == naive_order(dense(at, graph), np.ones(n), 300, np.ones(n, bool), [])


def test_what_underflows_to_no_gain_is_covered_all_the_same() -> None:
    """Half the smallest number is 0: a candidate may add nothing to F on a row and yet take it from others."""
    ids, graph = dyadic_graph(np.random.default_rng(1), 40, 4)
    weights = np.full(40, 5e-324)
    got = lazy_greedy(coverage(ids, graph), weights, 40, np.ones(40, bool), np.empty(0, np.int64))
    assert got.tolist() == naive_order(dense(ids, graph), weights, 40, np.ones(40, bool), [])


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 1.0])
def test_sampling_holds_at_most_16_bytes_an_id(share: float) -> None:
    n = 1_000_000
    ids, log_p = np.arange(n), np.random.default_rng(0).normal(size=n)
    tracemalloc.start()
    drawn = gumbel.sample_without_replacement(ids, log_p, int(share * n), 1, 0)
    peak = tracemalloc.get_traced_memory()[1] - drawn.ids.nbytes - drawn.weights.nbytes
    tracemalloc.stop()
    assert peak <= 16 * n + 40 * gumbel.CHUNK


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 60), st.integers(-1, 62), st.integers(1, 20))
def test_a_sample_is_the_largest_of_the_perturbed(seed: int, n: int, k: int, chunk: int) -> None:
    """Whatever the chunks; with ids that are never drawn, and noise so coarse that many are equal."""
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.choice(1000, n, replace=False)).astype(np.int64)
    noise = dict(zip(ids.tolist(), rng.integers(0, 4, n).astype(float), strict=True))
    log_p = np.where(rng.random(n) < 0.7, 0.0, -np.inf)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gumbel, "CHUNK", chunk)
        patch.setattr(gumbel, "gumbel", lambda _s, _v, asked: np.array([noise[i] for i in asked.tolist()], float))
        got = gumbel.sample_without_replacement(ids, log_p, k, 1, 0)
    ranked = sorted((i for i, p in zip(ids.tolist(), log_p, strict=True) if p == 0), key=lambda i: (-noise[i], i))
    assert got.ids.tolist() == sorted(ranked[: max(k, 0)])


def test_a_weight_is_one_over_the_chance_to_be_above_the_largest_that_was_left_over() -> None:
    ids, log_p = np.arange(50), np.random.default_rng(0).normal(size=50)
    got = gumbel.sample_without_replacement(ids, log_p, 12, 1, 0)
    spread = log_p - np.log(np.exp(log_p).sum())
    threshold = np.sort(spread + gumbel.gumbel(1, 0, ids))[-13]
    wanted = 1 / (1 - np.exp(-np.exp(spread[got.ids] - threshold)))  # a Gumbel variable exceeds x with chance 1 - exp(-exp(-x))
    assert got.weights == pytest.approx(wanted / wanted.mean(), rel=1e-6)


def test_the_noise_of_an_id_depends_on_seed_and_version_and_on_no_other_id() -> None:
    ids = np.random.default_rng(0).permutation(10**6)[: gumbel.CHUNK + 500].astype(np.int64)
    noise = gumbel.gumbel(3, 4, ids)
    some = np.array([gumbel.CHUNK + 7, 5, gumbel.CHUNK - 1, 0])
    assert gumbel.gumbel(3, 4, ids[some]).tolist() == noise[some].tolist()
    for other in (gumbel.gumbel(3, 5, ids), gumbel.gumbel(4, 4, ids), gumbel.gumbel(4, 3, ids), gumbel.gumbel(3, 4, ids + 1)):
        assert abs(np.corrcoef(noise, other)[0, 1]) < 0.02


def test_rs2_takes_everything_once_a_lap() -> None:
    ids = np.arange(0, 300, 3)
    rounds = [select("rs2", ids, np.zeros(100), 25, seed=3, version=v).ids for v in range(8)]
    for lap in (rounds[:4], rounds[4:]):
        assert sorted(np.concatenate(lap)) == list(ids)
    assert list(rounds[0]) != list(rounds[4])


def test_topk_takes_the_most_probable_and_the_lower_ids() -> None:
    assert list(select("topk", np.arange(5), np.array([0.0, 2, 1, 2, 1]), 3, seed=0, version=0).ids) == [1, 2, 3]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(registry.objectives.names()), st.integers(1, 12), st.integers(0, 5), st.integers(0, 3))
def test_every_objective_obeys_size_include_and_exclude(name: str, k: int, version: int, forced: int) -> None:
    rng = np.random.default_rng(k)
    ids, graph = random_graph(rng, 20, 4)
    include, exclude = ids[7::4][: min(forced, k)], ids[-3:]
    got = select(name, ids, rng.normal(size=20), k, seed=1, version=version, neighbours=graph, include=include, exclude=exclude)
    assert len(got.ids) == k == len(set(got.ids.tolist()))
    assert list(got.ids) == sorted(got.ids)
    assert set(include) <= set(got.ids)
    assert not set(exclude) & set(got.ids)
    assert got.weights.mean() == pytest.approx(1, abs=1e-4)


def test_weights_stay_with_their_samples_where_some_must_be_in() -> None:
    rng = np.random.default_rng(2)
    ids, log_p, must = np.arange(0, 60, 2), rng.normal(size=30) * 2, np.isin(np.arange(30), [4, 11, 23])
    got = select("sample", ids, log_p, 12, seed=1, version=3, include=ids[must])
    others = gumbel.sample_without_replacement(ids[~must], log_p[~must], 9, 1, 3)
    expected = dict(zip(others.ids.tolist(), others.weights.tolist(), strict=True)) | dict.fromkeys(ids[must].tolist(), 1.0)
    assert got.ids.tolist() == sorted(expected)
    assert got.weights == pytest.approx(np.array([expected[i] for i in sorted(expected)]) * 12 / sum(expected.values()), rel=1e-5)


def test_wrong_names_and_too_many_includes_are_errors() -> None:
    with pytest.raises(ConfigError, match="rs2"):
        select("rs3", np.arange(3), np.zeros(3), 1, seed=0, version=0)
    with pytest.raises(ConfigError, match="include"):
        select("sample", np.arange(3), np.zeros(3), 1, seed=0, version=0, include=np.arange(2))


@pytest.mark.parametrize("name", [name for name in registry.objectives.names() if name != "facility_location"])
def test_of_an_empty_window_nothing_is_drawn_whoever_must_be_in(name: str) -> None:
    got = select(name, np.empty(0, np.int64), np.empty(0), 3, seed=0, version=0, include=np.arange(2), exclude=np.arange(2, 4))
    assert len(got.ids) == len(got.weights) == 0


@settings(max_examples=80, deadline=None)
@given(
    st.sets(st.integers(0, 40), min_size=1), st.lists(st.integers(-3, 45), max_size=9), st.lists(st.integers(-3, 45), max_size=9)
)
def test_included_and_excluded_ids_are_those_of_the_window(window: set[int], include: list[int], exclude: list[int]) -> None:
    ids, exclude = np.array(sorted(window), np.int64), sorted(set(exclude) - set(include))
    asked = {"include": np.array(sorted(include), np.int64), "exclude": np.array(exclude, np.int64)}
    got = select("uniform", ids, np.zeros(len(ids)), len(ids), seed=0, version=0, **asked)
    assert set(got.ids.tolist()) == window - set(exclude)
    forced = sorted(window & set(include))
    if forced:
        assert select("topk", ids, np.zeros(len(ids)), len(forced), seed=0, version=0, **asked).ids.tolist() == forced
