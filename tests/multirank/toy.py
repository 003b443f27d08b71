"""The corpus and the model of the test jobs.  Knows nothing of DeepSpeed or GRACE, so an unchanged script can use it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, IterableDataset

VOCAB, LENGTH, SAMPLES = 61, 17, 192


class Corpus(Dataset[dict[str, torch.Tensor]]):
    """Item i: LENGTH tokens that depend on i, and i itself.

    Every other is a shifted run with some noise, every fourth a near copy of its predecessor; a ``clean`` one has neither,
    and a ``bare`` one's items are the tokens alone.
    """

    def __init__(self, n: int = SAMPLES, salt: int = 0, clean: bool = False, bare: bool = False) -> None:
        rng = np.random.default_rng(salt)
        self.tokens, self.bare = rng.integers(0, VOCAB, (n, LENGTH)), bare
        if clean:
            return
        self.tokens[::2] = np.arange(LENGTH) * 3 % VOCAB + self.tokens[::2] % 7
        self.tokens[3::4] = self.tokens[2::4]
        self.tokens[3::4, 5] = 1

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        tokens = torch.from_numpy(self.tokens[i])
        return {"input_ids": tokens} if self.bare else {"input_ids": tokens, "sid": torch.tensor([i])}


def write_trusted(path: Path, rows: Any) -> Path:
    """Writes token rows (n, T) as a trusted file of items like the corpus's, and returns its path."""
    path.write_text("\n".join(json.dumps({"input_ids": row.tolist(), "sid": [0]}) for row in rows))
    return path


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(F.gelu(self.up(x)))
        return out


class Model(nn.Module):
    """Embedding, blocks with a causal mean between them, head; returns the mean cross-entropy.

    ``checkpointing``: none, reentrant, nonreentrant, or deepspeed (which the script must have configured).
    """

    def __init__(self, checkpointing: str = "none", width: int = 32) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.embed = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(4))
        self.head = nn.Linear(width, VOCAB, bias=False)

    def forward(self, batch: dict[str, torch.Tensor] | torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Mean loss of a batch of the corpus, or of tokens (n, T) and their ``targets``."""
        if isinstance(batch, dict):
            batch, targets = batch["input_ids"][:, :-1], batch["input_ids"][:, 1:]
        assert targets is not None
        x = self.embed(batch)
        x = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)[:, None]
        for block in self.blocks:
            x = self._run(block, x)
        return F.cross_entropy(self.head(x).float().flatten(0, 1), targets.flatten())

    def _run(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if self.checkpointing == "none" or not self.training:
            out: torch.Tensor = block(x)
        elif self.checkpointing == "deepspeed":
            import deepspeed

            out = deepspeed.checkpointing.checkpoint(block, x)
        else:
            out = checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
        return out


def drop_multiples_of_sixteen(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    kept = [x for x in items if int(x["sid"]) % 16]
    return torch.utils.data.default_collate(kept)  # raises for a lone multiple of sixteen, as such functions do


class Stream(IterableDataset[dict[str, torch.Tensor]]):
    """The samples of a :class:`Corpus` one after another; ``sid`` is the position over all passes, if it is told the pass."""

    def __init__(self, corpus: Corpus) -> None:
        super().__init__()
        self.corpus, self.epoch = corpus, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        n = len(self.corpus)
        for i in range(n):
            yield {**self.corpus[i], "sid": torch.tensor([self.epoch * n + i])}
