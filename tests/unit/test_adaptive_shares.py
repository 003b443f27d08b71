"""Shares of sources that are learned from the influences of what was chosen from them, within bounds."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from grace_ds.comm.local import LocalComm
from grace_ds.config.load import load_config
from grace_ds.errors import ConfigError
from grace_ds.records import Coreset, FloatArray, IntArray
from grace_ds.refresh.choice import in_words, source_shares
from grace_ds.selection.objectives import select
from grace_ds.selection.sources import Learned, by_source

NOBODY = np.empty(0, np.int64)
IDS = np.arange(4000)
LABELS = np.random.default_rng(0).choice([3, 5, 8, 9], len(IDS), p=[0.4, 0.3, 0.2, 0.1])
BUDGET = 1000
GIVEN = {s: float((s == LABELS).mean()) for s in (3, 5, 8, 9)}
HALF = {3: 0.5, 8: 0.5}


def coreset(learned: Learned, version: int = 0, include: IntArray = NOBODY) -> Coreset:
    def draw(ids: IntArray, log_p: Any, k: int, include: IntArray, exclude: IntArray) -> Coreset:
        return select("sample", ids, log_p, k, seed=1, version=version, include=include, exclude=exclude)

    return by_source(draw, "adapt", LABELS, IDS, np.zeros(len(IDS)), BUDGET, include, NOBODY, learned=learned)


def shares(of: Coreset) -> dict[int, float]:
    """Of the coreset over those of the window."""
    return {int(s): (LABELS[of.ids] == s).mean() / (s == LABELS).mean() for s in np.unique(LABELS)}


def run(effect: dict[int, float], seed: int, refreshes: int = 20, measured: int = 600, **bounds: float) -> list[dict[int, float]]:
    """Shares after each refresh of a pool whose samples' influences are noise around their source's, with a heavy tail."""
    rng = np.random.default_rng(seed)
    learned, told = Learned(**bounds), []
    for version in range(refreshes):
        chosen = coreset(learned, version)
        told.append(shares(chosen))
        sampled = rng.choice(chosen.ids, min(measured, len(chosen.ids)), replace=False)
        centre = np.array([effect.get(int(s), 0.0) for s in LABELS[sampled]])
        influence: FloatArray = (centre + rng.standard_t(3, len(sampled))).astype(np.float32)
        influence[rng.random(len(sampled)) < 0.1] = np.nan
        learned = learned.after(GIVEN, LABELS[sampled], influence)
    return told


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("junk", [3, 8])
def test_the_share_of_a_junk_source_falls_to_its_lower_bound(seed: int, junk: int) -> None:
    told = run({junk: -2.0}, seed)
    assert all(share == pytest.approx(1, abs=0.02) for share in told[0].values())
    for after in told[6:]:
        assert after[junk] == pytest.approx(0.5, abs=0.04)
    told = run({junk: -2.0}, seed, least=0.1)
    assert told[-1][junk] == pytest.approx(0.1, abs=0.04)


@pytest.mark.parametrize("junk", [3, 8])
def test_what_it_loses_goes_to_all_others(junk: int) -> None:
    last = [run({junk: -2.0}, seed)[-1] for seed in range(30)]
    means = {good: np.mean([after[good] for after in last]) for good in {3, 5, 8, 9} - {junk}}
    expected = (1 - 0.5 * GIVEN[junk]) / (1 - GIVEN[junk])
    assert all(mean == pytest.approx(expected, rel=0.1) for mean in means.values()), means
    # Each has noise of its own, the smallest source the most.
    assert all(np.std(np.log([after[good] for after in last])) < 0.3 for good in means)


@pytest.mark.parametrize("seed", range(5))
def test_a_good_source_gains_up_to_its_upper_bound(seed: int) -> None:
    told = run({8: 2.0}, seed, most=1.5)
    assert told[-1][8] == pytest.approx(1.5, abs=0.03)
    assert max(share for after in told for share in after.values()) <= 1.5 + 0.06


def test_equal_sources_keep_their_shares_within_noise() -> None:
    ratios = np.array([[after[s] for s in (3, 5, 8, 9)] for seed in range(20) for after in run({}, seed, refreshes=30)])
    assert np.abs(np.log(ratios)).mean() < 0.018
    assert (np.abs(np.log(ratios)) < 0.3).mean() > 0.99
    np.testing.assert_allclose(ratios.mean(0), 1, atol=0.05)


def test_what_was_learned_is_forgotten_once_it_no_longer_holds() -> None:
    learned = Learned({3: np.log(0.5), 8: np.log(2.0)})
    for _ in range(30):
        learned = learned.after(GIVEN, NOBODY, np.empty(0, np.float32))
    assert all(share == pytest.approx(1, abs=0.06) for share in shares(coreset(learned)).values())


def test_too_few_or_unknown_influences_change_nothing() -> None:
    rng = np.random.default_rng(0)
    source, influence = np.repeat([3, 8], 7), np.repeat([5.0, -5.0], 7) + rng.normal(size=14)
    for of, value in (
        (source, influence),
        (np.repeat([3, 8], 20), np.full(40, np.nan)),
        (np.repeat(3, 40), rng.normal(size=40)),  # nothing to compare with
        (np.repeat([3, 8], 20), np.ones(40)),
        (np.repeat([1, 2], 20), np.repeat([5.0, -5.0], 20) + rng.normal(size=40)),  # not in the window any more
    ):
        assert list(Learned().after(HALF, of, value).factors.values()) == pytest.approx([0, 0], abs=1e-9)
    moved = Learned().after(HALF, np.repeat([3, 8], 20), np.repeat([5.0, -5.0], 20) + rng.normal(size=40)).factors
    assert moved[3] > 0.2 and moved[8] < -0.2 and np.exp(list(moved.values())).mean() == pytest.approx(1)


def test_one_huge_influence_decides_nothing() -> None:
    rng = np.random.default_rng(1)
    source, influence = np.repeat([3, 8], 40), rng.normal(size=80)
    plain = Learned().after(HALF, source, influence).factors
    influence[0] = 1e6
    huge = Learned().after(HALF, source, influence).factors
    assert all(abs(huge[s] - plain[s]) < 0.15 for s in (3, 8))


def test_the_unit_of_influences_does_not_matter() -> None:
    rng = np.random.default_rng(2)
    source, influence = np.repeat([3, 8], 40), rng.normal(size=80) + np.repeat([1.0, 0.0], 40)
    one, other = (Learned().after(HALF, source, unit * influence + shift).factors for unit, shift in ((1.0, 0.0), (1e-3, 7.0)))
    assert one == pytest.approx(other) and one[3] > 0.1


def test_included_samples_are_in_whatever_was_learned() -> None:
    include = IDS[LABELS == 9][:60]
    chosen = coreset(Learned({9: np.log(0.5)}), include=include)
    assert np.isin(include, chosen.ids).all() and len(chosen.ids) == BUDGET


def test_factors_go_through_json_bit_for_bit() -> None:
    learned = Learned({3: 0.1 + 0.2, -7: -1 / 3}, 0.25, 4.0)
    assert Learned.of(json.loads(json.dumps(learned.meta())), 0.25, 4.0) == learned


def test_the_log_names_the_sources_that_moved_most() -> None:
    words = in_words(source_shares(LocalComm(5.0), LABELS, LABELS[coreset(Learned({3: np.log(0.5)})).ids]))
    assert words.startswith("3: 0.4") and float(words.split(",")[0].split("→")[1]) < 0.3


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"selection": {"shares": "adapt"}}, "without selection.sources"),
        ({"recipe": "content", "selection": {"shares": "adapt", "sources": "s.npy"}}, "learns from influences"),
        ({"recipe": "grace", "ablate": ["gradients"], "selection": {"shares": "adapt", "sources": "s.npy"}}, "learns from"),
        ({"selection": {"least_share": 1.5}}, "least_share = 1.5; it must be between 0 and 1"),
        ({"selection": {"most_share": 0.5}}, "most_share = 0.5; it must be 1 or more"),
    ],
)
def test_what_cannot_be_learned_is_refused(block: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config({"enabled": True, **block}, "block")
