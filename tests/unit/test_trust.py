"""How a job calls its module is learned from one call and applied to other batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from grace_ds.errors import DataError
from grace_ds.integrations.trust import Call, probed, unit_of


class Sum(nn.Module):
    def forward(self, x: Any, *, scale: float = 1.0, y: Any = 0.0) -> torch.Tensor:
        x = x["a"] if isinstance(x, dict) else x
        return (x * scale + y).sum()


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        (lambda b: (b,), lambda b: {}, 3.0),
        (lambda b: (b["a"],), lambda b: {}, 3.0),
        (lambda b: (b["b"].clone(),), lambda b: {"scale": 2.0}, 20.0),
        (lambda b: (), lambda b: {"x": b["a"], "y": b["b"]}, 13.0),
    ],
)
def test_a_call_is_repeated_with_another_batch(args: Any, kwargs: Any, expected: float) -> None:
    seen = {"a": torch.tensor([7.0]), "b": torch.tensor([8.0])}
    call = Call()
    call.learn(args(seen), kwargs(seen), seen)
    assert float(call.loss(Sum(), {"a": torch.tensor([3.0]), "b": torch.tensor([10.0])})) == expected


def test_an_output_without_a_loss_says_what_to_do() -> None:
    with pytest.raises(DataError, match="loss_fn"):
        Call().loss(nn.Identity(), torch.zeros(3))


def test_the_unit_is_the_median_only_where_one_sample_can_be_told_from_chance() -> None:
    rng = np.random.default_rng(0)
    clear = (0.4 + 0.1 * rng.normal(size=200)).astype(np.float32)
    assert unit_of(clear)[0] == pytest.approx(0.4, abs=0.03)
    assert unit_of(clear)[1] == pytest.approx(0.1, abs=0.02)
    for useless in (clear - 0.35, clear - 0.4, -clear):  # within the scatter, at chance, against the trusted direction
        assert unit_of(useless)[0] == 0


def test_the_probe_stays_within_its_share() -> None:
    assert probed(0.03, 500, 2048) == 256  # a large job: a few hundred samples are enough
    assert probed(0.1, 80, 32) == 128  # 10 % of 2,560, half of it for each half
    assert probed(0.03, 4, 8) == 16  # a toy: fewer would fit nothing
