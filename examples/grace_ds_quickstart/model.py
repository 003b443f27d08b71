"""A small GPT, as anybody would write it; of the package it uses only the choice of a dtype that a CPU can multiply.

Shape legend: B = sequences, T = tokens, C = width, V = vocabulary.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grace_ds.gradients.projection import product_dtype


@dataclass(frozen=True)
class GPTConfig:
    """Sizes; the defaults give 0.65M parameters (the head shares the embedding's)."""

    vocab: int = 2048
    context: int = 64
    layers: int = 4
    heads: int = 4
    width: int = 96


class Linear(nn.Linear):
    """``nn.Linear`` that is as fast on a CPU without instructions for bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs), in the dtype of ``x``."""
        kind = product_dtype(x)
        bias = None if self.bias is None else self.bias.to(kind)
        return F.linear(x.to(kind), self.weight.to(kind), bias).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention, (B, T, C) to (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width)
        self.out = Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix along the sequence."""
        b, t, c = x.shape
        wide = self.qkv(x).to(product_dtype(x))
        q, k, v = (y.view(b, t, self.heads, c // self.heads).transpose(1, 2) for y in wide.chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        projected: Tensor = self.out(mixed.transpose(1, 2).reshape(b, t, c).to(x.dtype))
        return projected


class Block(nn.Module):
    """Pre-norm transformer block, (B, T, C) to (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.up = Linear(config.width, 4 * config.width)
        self.down = Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """One layer."""
        x = x + self.attention(self.norm1(x))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return x


class GPT(nn.Module):
    """Token ids in, mean next-token cross-entropy out."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.norm = nn.LayerNorm(config.width)
        self.lm_head = Linear(config.width, config.vocab, bias=False)
        # Not GPT-2's 0.02, which suits wide models: one of 96 sits on its first plateau for as long as chance will have it then,
        # and ends up to 0.3 nats apart for the order of its samples alone; so it was measured.
        std = config.width**-0.5
        self.apply(functools.partial(_initialise, std=std))
        for name, weight in self.named_parameters():
            # Each block adds two branches to the residual stream: scaled so that its variance does not grow with depth.
            if name.endswith(("attention.out.weight", "down.weight")):
                nn.init.normal_(weight, std=std / (2 * config.layers) ** 0.5)
        self.lm_head.weight = self.tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token of ``input_ids`` (B, T + 1), a scalar in float32."""
        x, targets = input_ids[:, :-1], input_ids[:, 1:]
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        logits = self.lm_head(self.norm(h)).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _initialise(module: nn.Module, std: float) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
