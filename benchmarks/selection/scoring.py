"""Scoring passes: per-sample losses and last-layer gradient norms, by forward passes that leave no trace in the model.

Shape legend: B = rows, T = positions, V = vocabulary, C = width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from grace_ds_quickstart.model import GPT, GPTConfig
from torch import Tensor

from benchmarks.selection.sizes import forward_flops, head_norm_flops
from benchmarks.selection.visits import VisitCounts
from grace_ds.records import Array, FloatArray

BATCH = 64


def hidden_states(model: GPT, inputs: Tensor) -> Tensor:
    """(B, T, C): what the head reads.  The model's own forward joins the losses of a batch, so it is walked here."""
    h = model.tokens(inputs) + model.positions(torch.arange(inputs.shape[1], device=inputs.device))
    for block in model.blocks:
        h = block(h)
    final: Tensor = model.norm(h)
    return final


def row_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """(B,) mean loss of each row in nats per token, from (B, T, V) and (B, T)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).mean(1)


def head_gradient_norms(hidden: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """(B,) Frobenius norm of the gradient of each row's mean loss by the head's weight, without a backward pass.

    The gradient is sum_t d_t h_t^T / T with d_t the softmax minus the target, so its squared norm is the sum over s, t of
    (d_s . d_t) (h_s . h_t) / T^2.
    """
    d = torch.softmax(logits, -1)
    d.scatter_add_(-1, targets.unsqueeze(-1), torch.full((), -1.0).expand(*targets.shape, 1))
    squares = (d @ d.transpose(1, 2)) * (hidden @ hidden.transpose(1, 2))
    return squares.sum((1, 2)).clamp_min(0).sqrt() / targets.shape[1]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the mode is put back on exit."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def mean_loss(model: torch.nn.Module, rows: Array) -> float:
    """Mean loss over ``rows`` (n, T + 1), nats per token."""
    total = 0.0
    with evaluating(model):
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            total += float(model(torch.from_numpy(part.astype(np.int64)))) * len(part)
    return total / len(rows)


class Scorer:
    """Passes of one model over rows, each of them entered in the visit counts.

    Args:
        model: as it is at the moment of a pass.
        config: its shape.
        visit counts: takes the FLOPs; CPU seconds are its caller's to count.
    """

    def __init__(self, model: GPT, config: GPTConfig, visits: VisitCounts) -> None:
        self.model, self.config, self.visits = model, config, visits

    def losses(self, rows: Array) -> FloatArray:
        """(n,) float32, mean loss of each of ``rows`` (n, T + 1), nats per token."""
        self.visits.flops_selection += len(rows) * forward_flops(self.config)
        return self._pass(rows, lambda hidden, logits, targets: row_losses(logits, targets))

    def gradient_norms(self, rows: Array) -> FloatArray:
        """(n,) float32, norm of the head's gradient for each of ``rows`` (n, T + 1)."""
        self.visits.flops_selection += len(rows) * (forward_flops(self.config) + head_norm_flops(self.config))
        return self._pass(rows, head_gradient_norms)

    def _pass(self, rows: Array, of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> FloatArray:
        # Filled in place: small results kept one by one would hold the large blocks between them, gigabytes in all.
        found = np.empty(len(rows), np.float32)
        with evaluating(self.model):
            for start in range(0, len(rows), BATCH):
                batch = torch.from_numpy(rows[start : start + BATCH].astype(np.int64))
                hidden = hidden_states(self.model, batch[:, :-1])
                logits = self.model.lm_head(hidden).float()
                found[start : start + BATCH] = of(hidden, logits, batch[:, 1:]).numpy()
        return found
