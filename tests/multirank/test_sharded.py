"""Selection over samples that stay with their owners: 1 to 4 ranks draw what sorting all samples on one gives."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from grace_ds.selection.gumbel import gumbel, random_words
from tests.multirank.harness import run_ranks
from tests.multirank.sharded_job import SEEDS, SLOTS, Pool, draws_of, pool_of, sizes_of, visits_of, work

pytestmark = pytest.mark.timeout(600)

SIZES = (1, 2, 3, 4)
Found = dict[str, Any]
Worlds = dict[int, list[list[Found]]]  # ranks → of each rank → of each seed


@pytest.fixture(scope="module")
def worlds() -> Worlds:
    return {size: run_ranks(work, size, size % 2 == 0, timeout=240) for size in SIZES}


def joined(worlds: Worlds, size: int, seed: int, name: str) -> dict[int, float] | str:
    """Id → weight over all ranks; or the error, which all ranks must raise alike."""
    parts = [found[seed][name] for found in worlds[size]]
    if any(isinstance(part, str) for part in parts):
        assert len(set(map(str, parts))) == 1
        return str(parts[0])
    pairs = [pair for ids, weights in parts for pair in zip(ids, weights, strict=True)]
    assert len(dict(pairs)) == len(pairs), "two ranks have the same member"
    for found, (ids, _) in zip(worlds[size], parts, strict=True):
        assert ids == sorted(ids) and set(ids) <= set(found[seed]["ids"])
    return dict(pairs)


def test_the_pools_hold_what_is_hard() -> None:
    pools = [pool_of(seed) for seed in SEEDS]
    assert [len(p.ids) for p in pools[:3]] == [0, 1, 3]
    assert not np.isfinite(pools[7].log_p).any() and any(np.isinf(p.log_p).any() for p in pools[8:])
    assert any(len(set(p.log_p.tolist())) < len(p.ids) / 8 for p in pools[3:])


def test_some_ranks_own_nothing(worlds: Worlds) -> None:
    for size in SIZES[1:]:
        assert worlds[size][0][3]["ids"] == [] != worlds[size][-1][3]["ids"]


@pytest.mark.parametrize("seed", SEEDS)
def test_any_number_of_ranks_draws_the_same_with_the_same_weights(worlds: Worlds, seed: int) -> None:
    for draw in draws_of(pool_of(seed)):
        name = " ".join(map(str, draw))
        one = joined(worlds, 1, seed, name)
        for size in SIZES[1:]:
            assert joined(worlds, size, seed, name) == one, f"{name} on {size} ranks"


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_drawn_is_what_comes_first_of_all_samples_in_order(worlds: Worlds, seed: int) -> None:
    pool, version = pool_of(seed), seed % 3
    samples = list(zip(pool.ids.tolist(), pool.log_p.tolist(), strict=True))
    noise = dict(zip(pool.ids.tolist(), gumbel(seed, version, pool.ids).tolist(), strict=True))
    for size in SIZES:
        for k in sizes_of(pool):
            best = sorted(samples, key=lambda one: (-one[1], one[0]))[:k]
            assert sorted(i for found in worlds[size] for i in found[seed][f"top {k}"]) == sorted(i for i, _ in best)
        for name, k, forced in draws_of(pool):
            if name not in ("topk", "sample", "uniform"):
                continue
            first = set(pool.include.tolist()) & set(pool.ids.tolist()) if forced else set()
            banned = set(pool.exclude.tolist()) if forced else set()
            open_ = [(i, p) for i, p in samples if i not in first | banned and p > -math.inf]
            score = {i: {"topk": p, "sample": p + noise[i], "uniform": noise[i]}[name] for i, p in open_}
            drawn = joined(worlds, size, seed, f"{name} {k} {forced}")
            if len(first) > k:
                assert isinstance(drawn, str) and "selection.include" in drawn
            else:
                assert set(drawn) == first | set(sorted(score, key=lambda i: (-score[i], i))[: k - len(first)])


@pytest.mark.parametrize("seed", SEEDS)
def test_rs2_goes_through_the_order_of_its_lap(worlds: Worlds, seed: int) -> None:
    pool, version = pool_of(seed), seed % 3
    open_ = pool.ids[np.isfinite(pool.log_p)]
    for name, k, forced in draws_of(pool):
        if name != "rs2" or forced:
            continue
        size = min(k, len(open_))
        endless: list[int] = []
        for lap in range(version + 2):
            words = dict(zip(open_.tolist(), random_words(seed, lap, 2, open_).tolist(), strict=True))
            endless += sorted(open_.tolist(), key=lambda i: (words[i], i))
        taken: list[int] = []
        for i in endless[version * size :]:
            if i not in taken and len(taken) < size:
                taken.append(i)
        for ranks in SIZES:
            assert set(joined(worlds, ranks, seed, f"rs2 {k} False")) == set(taken)


def dense(pool: Pool) -> np.ndarray:
    """Similarity of every two samples along the graph, the larger of both directions; 1 of each to itself."""
    place = {sample: i for i, sample in enumerate(pool.ids.tolist())}
    sim = np.eye(len(pool.ids))
    for i, (near, values) in enumerate(zip(pool.edges.ids.tolist(), pool.edges.similarity.tolist(), strict=True)):
        for sample, value in zip(near, values, strict=True):
            if sample in place:
                j = place[sample]
                sim[i, j] = sim[j, i] = max(sim[i, j], value)
    return sim


def greedy(sim: np.ndarray, weights: np.ndarray, k: int, open_: np.ndarray, first: list[int]) -> dict[int, float]:
    """Greedy as defined, every gain anew for every choice, the first of equals; position → the importance that it covers."""
    taken, best, left = list(first), sim[:, first].max(1, initial=0.0), open_.copy()
    left[first] = False
    while len(taken) < k and left.any():
        gains = np.cumsum((np.maximum(sim, best[:, None]) - best[:, None]) * weights[:, None], axis=0)[-1]  # one by one
        taken.append(int(np.argmax(np.where(left, gains, -1.0))))
        left[taken[-1]] = False
        best = np.maximum(best, sim[:, taken[-1]])
    shares = dict.fromkeys(taken, 0.0)
    for row in np.flatnonzero(best > 0):
        shares[taken[int(np.argmax(sim[row, taken]))]] += weights[row]
    return shares


@pytest.mark.parametrize("seed", SEEDS)
def test_facility_location_takes_what_greedy_takes(worlds: Worlds, seed: int) -> None:
    pool = pool_of(seed)
    for name, k, forced in draws_of(pool):
        first = np.flatnonzero(np.isin(pool.ids, pool.include)).tolist() if forced else []
        if name != "facility_location" or len(first) > k:
            continue
        open_ = np.isfinite(pool.log_p) & ~(forced & np.isin(pool.ids, pool.exclude))
        weights = np.exp(pool.log_p - pool.log_p[open_].max()) if open_.any() else np.zeros(len(pool.ids))
        shares = greedy(dense(pool), weights, k, open_, first)
        for size in SIZES:
            drawn = joined(worlds, size, seed, f"{name} {k} {forced}")
            assert not isinstance(drawn, str) and set(drawn) == set(pool.ids[list(shares)].tolist())
            scale = len(shares) / sum(shares.values()) if sum(shares.values()) else 1.0
            wanted = [shares[int(np.searchsorted(pool.ids, sample))] * scale for sample in drawn]
            assert list(drawn.values()) == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_sums_ranks_and_quantiles_are_those_of_all_values(worlds: Worlds, seed: int) -> None:
    pool = pool_of(seed)
    values = pool.log_p[np.isfinite(pool.log_p)]
    one = worlds[1][0][seed]
    by_id = dict(zip(one["ids"], one["ranks"], strict=True))
    for size in SIZES:
        for found in worlds[size]:
            assert found[seed]["shared"] == one["shared"]
            mine = {i: by_id[i] for i in found[seed]["ids"]}
            assert np.array_equal(list(mine.values()), found[seed]["ranks"], equal_nan=True)
    ordered = np.sort(values)
    wanted = [ordered[int(share * (len(values) - 1))] if len(values) else None for share in (0.0, 0.25, 1.0)]
    assert one["shared"][:3] == wanted
    assert one["shared"][3] == pytest.approx(float(sum(map(Fraction, values.tolist()))), rel=1e-15, abs=1e-15)
    chances = np.exp(np.where(np.isfinite(pool.log_p), pool.log_p, 0.0))
    for source in range(9):
        assert one["shared"][4 + source] == pytest.approx(math.fsum(chances[pool.labels == source]), rel=1e-14)
    for i, rank in by_id.items():
        value = pool.log_p[pool.ids == i][0]
        less, equal = (values < value).sum(), (values == value).sum()
        expected = 0.5 if not np.isfinite(value) or len(values) == 1 else (less + (equal - 1) / 2) / (len(values) - 1)
        assert rank == pytest.approx(expected, rel=1e-15) if len(values) else math.isnan(rank)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_least_visited_members_find_a_slot(worlds: Worlds, seed: int) -> None:
    ids = pool_of(seed).ids
    for size in SIZES:
        assert all(found[seed]["slots"] is None for found in worlds[size][1:])
        members, visits = worlds[size][0][seed]["slots"]
        assert (members, visits) == tuple(worlds[1][0][seed]["slots"])
        assert members == sorted(set(members)) and set(members) <= set(ids.tolist()) and len(members) == min(SLOTS, len(ids))
        assert visits == visits_of(np.array(members, np.int64)).tolist()
        left = np.setdiff1d(ids, members)
        assert max(visits, default=0) <= min(visits_of(left), default=4)


def test_which_of_equally_visited_members_find_a_slot_is_left_to_chance(worlds: Worlds) -> None:
    places = []
    for seed in SEEDS:
        ids = pool_of(seed).ids
        unvisited = ids[visits_of(ids) == 0]
        if len(unvisited) > 2 * SLOTS:
            members, _ = worlds[1][0][seed]["slots"]
            places.append(np.searchsorted(unvisited, members).mean() / len(unvisited))
    assert len(places) > 5 and 0.4 < np.mean(places) < 0.6 and min(places) > 0.3


@pytest.mark.parametrize("seed", SEEDS)
def test_the_account_of_a_schedule_is_that_of_the_whole_window(worlds: Worlds, seed: int) -> None:
    pool, one = pool_of(seed), worlds[1][0][seed]["account"]
    if not len(pool.ids):
        return
    for size in SIZES:
        assert worlds[size][0][seed]["account"] == one
        assert all(found[seed]["account"] is None for found in worlds[size][1:])
    core = pool.ids[::3]
    assert (one["window"], one["core"], one["level"]) == (len(pool.ids), len(core), "content")
    for histogram in one["histograms"].values():
        assert sum(histogram["window"]) + histogram["unknown"] == len(pool.ids)
    losses = one["histograms"].get("loss")
    assert (losses["unknown"] if losses else len(pool.ids)) == int((pool.ids % 2).sum())
    shown = {group: [s for s in one["samples"] if s["group"] == group] for group in ("most", "least", "chosen", "passed_over")}
    assert len({s["id"] for s in one["samples"]}) == len(one["samples"])
    assert all((s["role"] == "core") == (s["id"] in core) for s in one["samples"])
    if len(pool.ids) > 100:
        assert len(shown["most"]) == len(shown["least"]) == 40
        assert min(s["chance"] for s in shown["most"]) > max(s["chance"] for s in shown["least"])
    assert one["map"]["ids"] == one["map"]["x"] == pool.ids.tolist() or max(pool.ids) > 10**5
    assert one["map"]["chosen"] == [i in core for i in one["map"]["ids"]]
