from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_ds.comm.local import LocalComm
from grace_ds.data.pool import read_sources
from grace_ds.errors import ConfigError, DataError
from grace_ds.graph import backends
from grace_ds.graph.ring import nearest
from grace_ds.graph.rows import Request
from grace_ds.records import Coreset
from grace_ds.selection.objectives import select
from grace_ds.selection.sources import allocate, by_source

NOBODY = np.empty(0, np.int64)
IDS = np.arange(3, 3 + 2 * 600, 2)  # not their own positions
LABELS = np.random.default_rng(0).choice([7, 40, 41], 600, p=[0.7, 0.25, 0.05])
LOG_P = np.random.default_rng(1).normal(size=600) - 6.0 * (LABELS == 41)  # the filter dislikes the smallest source


def drawn(policy, k=120, include=NOBODY, exclude=NOBODY, log_p=LOG_P, objective="sample", version=0, neighbours=None):
    def draw(ids, log_p, k, include, exclude):
        kept = {"neighbours": neighbours, "include": include, "exclude": exclude}
        return select(objective, ids, log_p, k, seed=1, version=version, **kept)

    return by_source(draw, policy, LABELS, IDS, log_p, k, include, exclude, whole=neighbours is not None)


def counts(coreset: Coreset) -> dict[int, int]:
    names, found = np.unique(LABELS[np.searchsorted(IDS, coreset.ids)], return_counts=True)
    return dict(zip(names.tolist(), found.tolist(), strict=True))


@pytest.mark.parametrize("objective", ["sample", "topk", "uniform", "rs2"])
def test_kept_shares_are_those_of_the_window_to_one_sample(objective: str) -> None:
    coreset = drawn("keep", objective=objective)
    assert len(coreset.ids) == 120 and (np.diff(coreset.ids) > 0).all() and np.isin(coreset.ids, IDS).all()
    for name, found in counts(coreset).items():
        assert abs(found - 120 * (name == LABELS).mean()) <= 1


def test_a_floor_leaves_half_its_share_to_a_source_and_the_rest_to_the_chances() -> None:
    free = counts(select("sample", IDS, LOG_P, 120, seed=1, version=0))
    floor, keep = counts(drawn("floor")), counts(drawn("keep"))
    assert free.get(41, 0) == 0 < floor[41] < keep[41]
    assert floor[41] == int(0.5 * 120 * (LABELS == 41).mean())
    liked = np.where(LABELS == 40, 0.5, 0.0)  # nobody is below the floor: nothing is held
    many = [counts(drawn("floor", log_p=liked, version=v))[40] for v in range(3)]
    share = np.exp(0.5) * (LABELS == 40).sum() / np.exp(liked).sum()
    assert all(abs(found - min(120 * share, (LABELS == 40).sum())) <= 1 for found in many)


def test_the_graph_objective_draws_each_source_from_the_whole_window() -> None:
    rows = np.random.default_rng(2).normal(size=(600, 8))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    edges = nearest(LocalComm(5.0), Request.of(IDS, rows, 8), backends.exact("torch"))
    include = np.array([IDS[name == LABELS][5] for name in (7, 40, 41)])
    coreset = drawn("keep", objective="facility_location", neighbours=edges, include=np.sort(include))
    assert len(np.unique(coreset.ids)) == len(coreset.ids) == 120 and np.isin(include, coreset.ids).all()
    for name, found in counts(coreset).items():
        assert abs(found - 120 * (name == LABELS).mean()) <= 1


def test_included_and_excluded_samples_are_heeded_in_every_source() -> None:
    small = IDS[LABELS == 41]
    include, exclude = small[:20], IDS[LABELS == 7][:300]
    coreset = drawn("keep", include=include, exclude=exclude)
    assert np.isin(include, coreset.ids).all() and not np.isin(exclude, coreset.ids).any()
    assert len(coreset.ids) == 120 and counts(coreset)[41] == 20  # more than its share: they must be in
    with pytest.raises(ConfigError, match="include holds 120 samples of the window, the coreset 100"):
        drawn("keep", k=100, include=IDS[:120])
    nobody = drawn("floor", k=300, exclude=IDS[LABELS != 41])
    assert counts(nobody) == {41: len(small)}  # fewer than asked for, and all there are


@pytest.mark.parametrize("policy", ["keep", "floor"])
def test_the_weights_of_a_source_add_up_to_its_share_of_the_window(policy: str) -> None:
    coreset = drawn(policy)
    of = LABELS[np.searchsorted(IDS, coreset.ids)]
    for name in (7, 40, 41):
        assert coreset.weights[of == name].sum() / coreset.weights.sum() == pytest.approx((name == LABELS).mean(), rel=1e-4)


@pytest.mark.parametrize("policy", ["keep", "floor"])
def test_weighted_means_stand_for_the_window(policy: str) -> None:
    value = np.where(LABELS == 7, 1.0, np.where(LABELS == 40, 5.0, 30.0)) + np.arange(600) % 3
    log_p = np.where(np.arange(600) % 2, 1.0, 0.0)
    means = []
    for version in range(60):
        coreset = drawn(policy, log_p=log_p, version=version)
        assert coreset.weights.mean() == pytest.approx(1, abs=1e-5)
        means.append(np.average(value[np.searchsorted(IDS, coreset.ids)], weights=coreset.weights))
    assert np.mean(means) == pytest.approx(value.mean(), abs=4 * np.std(means) / 60**0.5 + 0.01)


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=4),
    st.integers(0, 50),
)
@settings(max_examples=200, deadline=None)
def test_an_allocation_adds_up_within_its_bounds(parts, k: int) -> None:
    wanted = np.array([p[0] for p in parts])
    low, high = (np.array([f(p[1:]) for p in parts], np.int64) for f in (min, max))
    found = allocate(wanted, low, high, k)
    assert (low <= found).all() and (found <= high).all()
    assert found.sum() == min(max(k, low.sum()), high.sum())


def test_an_allocation_is_the_nearest_to_the_proportions() -> None:
    """Against every other one, in the largest deviation: the quotas of a blend are few enough to try all."""
    draw = np.random.default_rng(5)
    for _ in range(30):
        share = draw.dirichlet(np.ones(3))
        found = allocate(share, np.zeros(3, np.int64), np.full(3, 20, np.int64), 14)
        best = min(max(abs(np.array(q) - 14 * share)) for q in product(range(15), repeat=3) if sum(q) == 14 and max(q) <= 20)
        assert max(abs(found - 14 * share)) == pytest.approx(best, abs=1e-6)


def test_a_file_of_sources_must_fit_the_dataset(tmp_path) -> None:
    with pytest.raises(DataError, match="does not exist: correct selection.sources"):
        read_sources(tmp_path / "none.npy", 4)
    np.save(tmp_path / "a.npy", np.arange(3))
    with pytest.raises(DataError, match="names the source of 3 samples, the dataset has 4"):
        read_sources(tmp_path / "a.npy", 4)
    np.save(tmp_path / "b.npy", np.array(["web", "code"]))
    with pytest.raises(DataError, match="integer"):
        read_sources(tmp_path / "b.npy", 2)
    np.save(tmp_path / "c.npy", np.array([5, 5, 9], np.uint8))
    assert read_sources(tmp_path / "c.npy", 3).tolist() == [5, 5, 9]
