"""Slow and obviously correct answers to compare with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn


def batch_of_one_gradients(
    model: nn.Module, weights: Mapping[str, torch.Tensor], batch: torch.Tensor, loss_fn: Callable[[nn.Module, Any], Any]
) -> list[dict[str, np.ndarray]]:
    """For each sample alone: layer name → (inputs, outputs) float64, the full weight gradient of its own mean loss.

    Args:
        weights: layer name → its weight (outputs, inputs), as nn.Linear has it.
        batch: (n, ...) whose rows are the samples.
    """
    gradients = []
    for row in range(len(batch)):
        loss = loss_fn(model, batch[row : row + 1])
        found = torch.autograd.grad(loss, list(weights.values()))
        gradients.append({name: g.double().numpy().T for name, g in zip(weights, found, strict=True)})
    return gradients


def sketch_of(
    gradient: Mapping[str, np.ndarray],
    bases: Mapping[str, tuple[np.ndarray, np.ndarray, float]],
    tables: Mapping[str, tuple[np.ndarray, np.ndarray]],
    dim: int,
    sigma: Mapping[str, float] | None = None,
) -> np.ndarray:
    """(dim,) float64: each layer's gradient projected from both sides, over its scale, put into buckets one by one.

    Args:
        bases: layer name → (P_in, P_out, unit).
        tables: layer name → (source, sign) of the fold: slot s of bucket s % dim takes coordinate source[s].
    """
    folded = np.zeros(dim)
    for name, full in gradient.items():
        p_in, p_out, unit = bases[name]
        projected = unit * (p_in.astype(np.float64) @ full @ p_out.astype(np.float64).T).ravel()
        projected /= 1.0 if sigma is None else sigma[name]
        for slot, (coordinate, sign) in enumerate(zip(*tables[name], strict=True)):
            if sign:
                folded[slot % dim] += sign * projected[coordinate]
    return folded
