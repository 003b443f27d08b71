"""A model narrow enough for dense second moments, and what its layers see, without hooks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

VOCAB, NAMES = 20, ["first", "second"]
Dense = Mapping[str, np.ndarray]


class Narrow(nn.Module):
    """Mean next-token loss of tokens (n, T + 1) int64; layers of 12 → 16 and 16 → 12, the last one idle."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tokens, self.first, self.second = nn.Embedding(VOCAB, 12), nn.Linear(12, 16), nn.Linear(16, 12)
        self.head, self.idle = nn.Linear(12, VOCAB), nn.Linear(12, 14)

    def steps(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Outputs of the first layer, of its activation, of the second layer, and the logits."""
        h = self.first(x)
        z = torch.tanh(h)
        o = self.second(z)
        return h, z, o, self.head(torch.tanh(o))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.steps(self.tokens(tokens[:, :-1]))[-1]
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def cycles(n: int, seed: int, noise: float, length: int = 9) -> torch.Tensor:
    """(n, length) int64: 0, 1, 2, … from anywhere, a share of the tokens being noise."""
    rng = np.random.default_rng(seed)
    rows = (rng.integers(0, VOCAB, (n, 1)) + np.arange(length)) % VOCAB
    return torch.from_numpy(np.where(rng.random((n, length)) < noise, rng.integers(0, VOCAB, (n, length)), rows))


def seen(model: Narrow, tokens: torch.Tensor) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Layer → its inputs (tokens, in) and the gradients of each sample's own mean loss by its outputs (tokens, out)."""
    x = model.tokens(tokens[:, :-1]).detach()
    h, z, o, logits = model.steps(x)
    each = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
    by_h, by_o = torch.autograd.grad(each.sum(), [h, o])
    pairs = {"first": (x, by_h), "second": (z, by_o)}
    return {k: (a.detach().double().flatten(0, 1).numpy(), g.double().flatten(0, 1).numpy()) for k, (a, g) in pairs.items()}


def moments(model: Narrow, pool: torch.Tensor) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Layer → its mean a aᵀ and its mean g gᵀ over the tokens of ``pool``."""
    return {k: (a.T @ a / len(a), g.T @ g / len(g)) for k, (a, g) in seen(model, pool).items()}


def gradient(model: Narrow, tokens: torch.Tensor) -> Dense:
    """Layer → (in, out), the sum of the samples' gradients by its weight."""
    return {k: a.T @ g for k, (a, g) in seen(model, tokens).items()}


def damped(moment: np.ndarray) -> np.ndarray:
    """With a tenth of its mean eigenvalue added."""
    return moment + 0.1 * np.linalg.eigvalsh(moment).mean() * np.eye(len(moment))


def direction(model: Narrow, pool: torch.Tensor, trusted: torch.Tensor) -> Dense:
    """Layer → (in, out), the trusted gradient divided by the pool's moments from both sides."""
    second, first = moments(model, pool), gradient(model, trusted)
    return {k: np.linalg.solve(damped(second[k][0]), first[k]) @ np.linalg.inv(damped(second[k][1])) for k in NAMES}


def influences(model: Narrow, samples: torch.Tensor, along: Dense, sigma: Mapping[str, float]) -> np.ndarray:
    """(n,) product of each sample's gradient with ``along``, over the length of the latter in units of 1 / sigma."""
    length = np.sqrt(sum((sigma[k] * np.linalg.norm(along[k])) ** 2 for k in NAMES))
    single = [gradient(model, samples[i : i + 1]) for i in range(len(samples))]
    return np.array([sum((g[k] * along[k]).sum() for k in NAMES) for g in single]) / length
