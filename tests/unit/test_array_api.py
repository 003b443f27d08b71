"""One source for every array library: torch tensors give what NumPy arrays give, and stay tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from grace_ds.propagate import confidence, priority, propagate
from grace_ds.selection.probability import combine, rank01, soft_pass

N, K = 200, 5


def to_torch(x: Any) -> Any:
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


def inputs() -> dict[str, Any]:
    draw = np.random.default_rng(0)
    values = draw.normal(size=(N, K, 2)).astype(np.float32)
    values[draw.random((N, K)) < 0.3] = np.nan
    own = draw.normal(size=(N, 2)).astype(np.float32)
    own[draw.random(N) < 0.5] = np.nan
    age = np.where(np.isnan(own[:, 0]), np.inf, draw.integers(0, 4, N))
    similarity = draw.uniform(-0.2, 1, (N, K)).astype(np.float32)
    similarity[:, -1] = -np.inf
    values[:3], similarity[:3] = np.nan, -np.inf
    return {"own": own, "age": age, "values": values, "ages": draw.integers(0, 5, (N, K)).astype(float), "similarity": similarity}


def propagated(x: dict[str, Any]) -> list[Any]:
    found = propagate(x["own"], x["age"], x["values"], x["ages"], x["similarity"], shrink=0.5, decay=0.7)
    return [found.values, found.confidence, found.disagreement, priority(10 * x["age"], found.disagreement)]


def selected(x: dict[str, Any]) -> list[Any]:
    loss, keep = x["own"][:, 0], soft_pass(x["own"][:, 1], 0.1, 0.3)
    ranks = rank01(loss)
    density = x["ages"][:, 0]
    return [keep, ranks, combine(keep, density, ranks, None), combine(None, density, None, keep), confidence(x["age"], 0.5)]


@pytest.mark.parametrize("compute", [propagated, selected])
def test_torch_gives_what_numpy_gives(compute: Callable[[dict[str, Any]], list[Any]]) -> None:
    wanted = compute(inputs())
    found = compute({name: to_torch(value) for name, value in inputs().items()})
    for a, b in zip(wanted, found, strict=True):
        assert isinstance(b, torch.Tensor)
        assert str(b.dtype).removeprefix("torch.") == a.dtype.name
        np.testing.assert_allclose(b.numpy(), a, rtol=1e-6, atol=1e-9)
    assert any(np.isnan(a).any() for a in wanted) or compute is selected


def test_ranks_are_shared_by_equals_and_nobody_is_ranked_without_a_value() -> None:
    for library in (np.asarray, torch.tensor):
        got = rank01(library([3.0, float("nan"), 1.0, 3.0, 2.0]))
        assert [float(x) for x in got] == pytest.approx([2.5 / 3, 0.5, 0.0, 2.5 / 3, 1 / 3])
