"""How a job calls its module is learned from one call and applied to other batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from grace_ds.errors import DataError
from grace_ds.integrations.trust import Call


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
