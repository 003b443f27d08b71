"""From signals to the chance of a sample: filters, shares and ranks, their product, and the parts that can be left out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_ds import recipes
from grace_ds.comm.local import LocalComm
from grace_ds.recipes import log_importance, recipe
from grace_ds.recipes.weights import rank01, shared, soft_pass
from grace_ds.records import Signals
from grace_ds.refresh.signals import relative

NAN = math.nan
EVERY = frozenset(recipes.PARTS)
# What a part of the recipe is read from: with the part switched off, and with these unknown, a run must choose alike.
READS = {"gradients": "influence", "loss": "loss_rank", "graph": "sparseness"}
# Better for a sample: a higher or a lower value.
BETTER = {"quality": 1, "density": -1, "influence": 1, "loss": 1, "crowding": -1}


def signals(n: int, **known: Iterable[float]) -> Signals:
    """Of n samples; what is not given is unknown, and nothing has a copy."""
    columns: dict[str, Any] = {f.name: np.full(n, np.nan, np.float32) for f in dataclasses.fields(Signals)}
    columns |= {"ids": np.arange(n), "density": np.zeros(n, np.float32)}
    columns |= {name: np.asarray(list(values), np.float32) for name, values in known.items()}
    columns["loss_rank"], columns["sparseness"] = relative(LocalComm(5.0), columns["loss"], columns["crowding"])
    return Signals(**columns)


def chances(name: str, s: Signals, parts: frozenset[str] = EVERY) -> np.ndarray:
    return np.exp(log_importance(recipe(name), s, parts))


def some(n: int, seed: int = 0) -> Signals:
    """Everything is known of most samples, something is unknown of the others."""
    draw = np.random.default_rng(seed)
    unknown = draw.random((3, n)) < 0.2
    return signals(
        n,
        quality=draw.uniform(0.02, 1, n),
        density=draw.integers(0, 5, n),
        influence=np.where(unknown[0], np.nan, draw.normal(-1, 1, n)),
        loss=np.where(unknown[1], np.nan, draw.normal(0, 1, n)),
        crowding=np.where(unknown[2], np.nan, draw.uniform(0, 3, n)),
    )


# -- single signals ----------------------------------------------------------------------------------------------------


def test_a_filter_turns_at_its_cut_and_excludes_nobody() -> None:
    found = soft_pass(np.array([-1.5, -1.3, -1.7, 1e9, -1e9, np.inf, -np.inf, np.nan]), -1.5, 0.2)
    np.testing.assert_allclose(found, [0.51, 0.7364378, 0.2835622, 1, 0.02, 1, 0.02, 1], atol=1e-6)
    assert (np.diff(soft_pass(np.linspace(-9, 9, 50), -1.5, 0.2)) >= 0).all()


def test_rank01_averages_ties_and_centres_the_unknown() -> None:
    found = rank01(np.array([3.0, np.nan, 1.0, 3.0, 9.0, -5.0]))
    assert found.tolist() == [0.625, 0.5, 0.25, 0.625, 1.0, 0.0]
    assert rank01(np.array([7.0])).tolist() == [0.5]
    assert rank01(np.array([np.nan, np.nan])).tolist() == [0.5, 0.5]
    assert rank01(np.array([])).tolist() == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([-2.0, 0.0, 1.5, 8.0, math.nan]), max_size=12), st.randoms())
def test_rank01_follows_a_permutation(values: list[float], rng: Any) -> None:
    order = list(range(len(values)))
    rng.shuffle(order)
    assert rank01(np.array(values)[order] if order else np.array([])).tolist() == rank01(np.array(values))[order].tolist()


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_all_copies_of_a_text_together_are_as_likely_as_one_unique_text(crowds: list[int]) -> None:
    text = np.repeat(np.arange(len(crowds)), crowds)
    run_on_all_ranks = np.bincount(text, weights=shared(np.repeat(np.array(crowds) - 1.0, crowds)))
    np.testing.assert_allclose(run_on_all_ranks, 1, rtol=1e-12)


def sparseness(crowding: np.ndarray) -> np.ndarray:
    return relative(LocalComm(5.0), crowding, crowding)[1]


def test_a_crowd_thins_out_by_its_density_against_the_sparse_quarter_of_the_window() -> None:
    found = sparseness(np.array([7.0, 0.5, np.nan, 1.0, 4.0, 2.0], np.float32))
    np.testing.assert_allclose(found, [1 / 64, 4 / 9, 1, 1 / 4, 1 / 25, 1 / 9], rtol=1e-6)  # a quarter is no denser than 1
    assert found.dtype == np.float64


@given(
    st.lists(st.floats(2**-10, 16, width=32) | st.sampled_from([0.0, NAN]), max_size=30), st.sampled_from([2.0**-6, 0.5, 1024.0])
)
def test_the_unit_of_a_density_does_not_matter_and_the_denser_is_never_the_likelier(values: list[float], unit: float) -> None:
    crowding = np.array(values, np.float32)
    found, known = sparseness(crowding), ~np.isnan(crowding)
    if not known.any():
        assert np.isnan(found).all()
        return
    assert ((found > 0) & (found <= 1)).all() and (found[~known] == 1).all()
    assert (np.diff(found[known][np.argsort(crowding[known])]) <= 1e-12).all()
    np.testing.assert_allclose(sparseness(crowding * np.float32(unit)), found, rtol=1e-6)


def test_where_nothing_is_near_to_anything_nobody_is_crowded() -> None:
    for crowding in ([0.0, 0.0, 0.0], [0.0, NAN], []):
        assert (sparseness(np.array(crowding, np.float32)) == 1).all()


# -- their product -----------------------------------------------------------------------------------------------------


def test_chances_multiply_what_is_known() -> None:
    text = signals(2, quality=[0.5, 1.0], density=[3, 0])
    for name in ("content", "grace"):
        np.testing.assert_allclose(chances(name, text), [0.5 / 4, 1])
    np.testing.assert_allclose(chances("density", text), [1 / 4, 1])
    assert chances("uniform", text).tolist() == [1, 1]
    # Of three losses: the lowest, one that is unknown, the highest.
    np.testing.assert_allclose(chances("grace", signals(3, loss=[-2, NAN, 7])), [0.3, 0.8, 1.3])
    np.testing.assert_allclose(chances("grace", signals(3, influence=[-1e3, 1e3, NAN])), [0.02, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(chances("grace", signals(4, crowding=[2, 2, 6, NAN])), [1 / 4, 1 / 4, 1 / 16, 1], rtol=1e-6)
    np.testing.assert_allclose(chances("grace", signals(2, loss_pass=[0.5, 1], loss=[9, 1])), [0.5, 1])  # in its place
    all_of_it = signals(2, quality=[0.5, 1], density=[3, 0], loss=[4, 1], influence=[-1e3, 1e3], crowding=[2, 6])
    np.testing.assert_allclose(chances("grace", all_of_it), [0.5 / 4 * 1.3 * 0.02 / 4, 0.3 / 16], rtol=1e-6)


@pytest.mark.parametrize("name", recipes.names())
def test_of_nothing_known_all_are_alike(name: str) -> None:
    found = log_importance(recipe(name), signals(3), EVERY)
    assert found.tolist() == [0, 0, 0] and found.dtype == np.float64
    assert len(log_importance(recipe(name), signals(0), EVERY)) == 0


@pytest.mark.parametrize("part", READS)
@pytest.mark.parametrize("seed", range(3))
def test_a_part_that_is_switched_off_is_as_if_its_signal_were_unknown(part: str, seed: int) -> None:
    s = some(50, seed)
    off = log_importance(recipe("grace"), s, EVERY - {part})
    unknown = Signals(**vars(s) | {READS[part]: np.full(50, np.nan, np.float32)})
    assert np.array_equal(off, log_importance(recipe("grace"), unknown, EVERY))
    assert not np.array_equal(off, log_importance(recipe("grace"), s, EVERY))


def test_without_all_its_parts_a_recipe_is_the_one_that_it_falls_back_to() -> None:
    s = some(50)
    assert np.array_equal(log_importance(recipe("grace"), s, frozenset()), log_importance(recipe("content"), s, EVERY))
    bare = dataclasses.replace(s, quality=np.full(50, np.nan, np.float32))  # without a trusted set
    assert np.array_equal(log_importance(recipe("content"), bare, EVERY), log_importance(recipe("density"), s, EVERY))


def test_a_recipe_ignores_parts_that_it_does_not_use() -> None:
    s = some(50)
    for name in ("content", "density", "uniform"):
        assert np.array_equal(log_importance(recipe(name), s, EVERY), log_importance(recipe(name), s, frozenset()))


@pytest.mark.parametrize("seed", range(3))
def test_samples_in_another_order_have_their_own_chances(seed: int) -> None:
    s, order = some(60, seed), np.random.default_rng(seed).permutation(60)
    mixed = Signals(**{name: column[order] for name, column in vars(s).items()})
    for name in recipes.names():
        a, b = (log_importance(recipe(name), x, EVERY) for x in (s, mixed))
        assert np.array_equal(a[order], b)


@pytest.mark.parametrize("signal", BETTER)
def test_what_is_better_is_never_less_likely(signal: str) -> None:
    """Of two samples that differ in one signal alone."""
    s = some(60)
    for name in ("grace", "content", "density"):
        column = np.sort(getattr(s, signal))
        known = column[np.isfinite(column)]
        alike = signals(len(known), **{signal: known})
        found = BETTER[signal] * np.diff(log_importance(recipe(name), alike, EVERY))
        assert (found >= 0).all()
        used = name == "grace" or signal == "density" or (signal == "quality" and name == "content")
        assert (found > 0).any() == used


# -- the recipes themselves --------------------------------------------------------------------------------------------


def test_every_recipe_falls_back_to_less_and_in_the_end_to_nothing() -> None:
    for name in recipes.names():
        chain = [recipe(name)]
        while chain[-1].fallback is not None:
            chain.append(recipe(chain[-1].fallback))
        assert len(chain) - 1 == recipes.depth(name) and chain[-1].name == "uniform"
        for more, less in pairwise(chain):
            assert less.uses <= more.uses and less.content <= more.content and less.trusted <= more.trusted
        assert recipe(name).uses <= EVERY
    assert list(recipes.names()) == sorted(recipes.names(), key=recipes.depth, reverse=True)  # the richest first


def test_auto_is_the_richest() -> None:
    assert recipe(recipes.AUTO).name == recipes.DEFAULT == recipes.names()[0] == "grace"
    assert recipes.AUTO not in recipes.names()
