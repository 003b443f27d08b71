"""One source for every array library: torch tensors give what NumPy arrays give, and stay tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from array_api_compat import array_namespace

from grace_ds import recipes
from grace_ds.graph.propagate import confidence, crowding, priority, propagate
from grace_ds.recipes import log_importance, recipe
from grace_ds.recipes.weights import any_known, rank01, shared, soft_pass, uncrowded
from grace_ds.records import Signals

N, K = 200, 5


def to_torch(x: Any) -> Any:
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


def inputs() -> dict[str, Any]:
    """Of a graph over N rows; the first three have no neighbours, and no row has a fifth one."""
    draw = np.random.default_rng(0)
    own = draw.normal(size=(N, 2)).astype(np.float32)
    own[draw.random(N) < 0.5] = np.nan
    own[draw.random(N) < 0.1, 1] = np.nan
    ages = np.where(np.isnan(own), np.inf, draw.integers(0, 4, own.shape))
    similarity = draw.uniform(-0.2, 1, (N, K)).astype(np.float32)
    place = draw.integers(0, N, (N, K))
    similarity[:, -1], place[:, -1] = -np.inf, N
    similarity[:3], place[:3] = -np.inf, N
    crowded = np.where(draw.random(N) < 0.1, np.nan, draw.uniform(0, 3, N)).astype(np.float32)
    density = draw.integers(0, 5, N).astype(np.float32)
    return {"own": own, "ages": ages, "place": place, "similarity": similarity, "density": density, "crowding": crowded}


def with_padding(facts: Any) -> Any:
    """What one rank exchanges with itself: all rows, and one of zeros at the end."""
    xp = array_namespace(facts)
    return xp.concat([facts, xp.zeros_like(facts[:1, :])], axis=0)


@pytest.mark.parametrize("hops", [1, 3])
def test_propagation_in_torch_gives_what_numpy_gives(hops: int) -> None:
    def compute(x: dict[str, Any]) -> list[Any]:
        found = propagate(x["own"], x["ages"], x["place"], x["similarity"], with_padding, hops=hops, shrink=0.5, decay=0.7)
        again = priority(10 * x["ages"][:, 0], found.disagreement)
        return [found.values, found.reached, found.disagreement, again, crowding(x["similarity"])]

    alike(compute)


def test_importance_in_torch_is_what_it_is_in_numpy() -> None:
    def compute(x: dict[str, Any]) -> list[Any]:
        loss, quality = x["own"][:, 0], soft_pass(x["own"][:, 1], 0.1, 0.3)
        rank, sparseness = rank01(loss), uncrowded(x["crowding"], 0.7)
        parts = [quality, rank, shared(x["density"]), sparseness, confidence(x["ages"], 0.5)]
        columns = (loss, x["own"][:, 1], x["density"], quality, quality, x["crowding"], x["ages"][:, 0], x["ages"][:, 1])
        s = Signals(x["ages"][:, 0], *columns, rank, sparseness)
        return parts + [log_importance(recipe(name), s, frozenset(recipes.PARTS)) for name in recipes.names()]

    alike(compute)


def alike(compute: Callable[[dict[str, Any]], list[Any]]) -> None:
    wanted = compute(inputs())
    found = compute({name: to_torch(value) for name, value in inputs().items()})
    for a, b in zip(wanted, found, strict=True):
        assert isinstance(b, torch.Tensor)
        assert str(b.dtype).removeprefix("torch.") == a.dtype.name
        np.testing.assert_allclose(b.numpy(), a, rtol=1e-6, atol=1e-9)
        assert np.isfinite(a).any()


def test_whether_anything_is_known_is_the_same_question_in_both() -> None:
    for library in (np.asarray, torch.tensor):
        assert any_known(library([float("nan"), 2.0])) is True
        assert any_known(library([float("nan"), float("inf")])) is False


def test_ranks_are_shared_by_equals_and_nobody_is_ranked_without_a_value() -> None:
    for library in (np.asarray, torch.tensor):
        got = rank01(library([3.0, float("nan"), 1.0, 3.0, 2.0]))
        assert [float(x) for x in got] == pytest.approx([2.5 / 3, 0.5, 0.0, 2.5 / 3, 1 / 3])
