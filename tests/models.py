"""A GPT small enough for tests, with the kinds of activation checkpointing that jobs use."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

IGNORED = -100


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, d = x.shape
        q, k, v = (y.view(n, t, self.heads, -1).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(n, t, d)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class TinyGPT(nn.Module):
    """Returns the mean next-token loss of tokens (n, T + 1) int64; targets of IGNORED do not count.

    Args:
        recompute: "none", "reentrant" or "nonreentrant" activation checkpointing of every block.
    """

    def __init__(
        self,
        vocab: int = 64,
        width: int = 32,
        depth: int = 4,
        heads: int = 4,
        context: int = 32,
        dropout: float = 0.0,
        recompute: str = "none",
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        self.recompute = recompute

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        inputs, targets = tokens[:, :-1].clamp(min=0), tokens[:, 1:]
        x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1], device=inputs.device))
        for block in self.blocks:
            x = block(x) if self.recompute == "none" else checkpoint(block, x, use_reentrant=self.recompute == "reentrant")
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def text(n: int, length: int = 17, vocab: int = 64, seed: int = 0, padded: bool = True) -> torch.Tensor:
    """(n, length) int64 random tokens; with ``padded`` sample i ends in 2·i (at most half of them) IGNORED tokens."""
    tokens = torch.randint(0, vocab, (n, length), generator=torch.Generator().manual_seed(seed))
    if padded:
        for i in range(n):
            pad = min(2 * i, length // 2)
            if pad:
                tokens[i, -pad:] = IGNORED
    return tokens
