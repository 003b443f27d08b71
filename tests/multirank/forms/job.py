"""The engine that a form trains: a sample's tokens tell its id, so that the model sees which samples it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

VOCAB, LENGTH, SAMPLES, ROWS = 64, 12, 96, 4


class Samples(Dataset[Any]):
    """Sample i begins with tokens that spell i; ``make`` turns its tokens into an item."""

    def __init__(self, make: Callable[[torch.Tensor], Any] = lambda t: {"input_ids": t}, n: int = SAMPLES) -> None:
        draw = np.random.default_rng(n)
        self.tokens = torch.from_numpy(draw.integers(2, VOCAB, (n, LENGTH)))
        self.tokens[:, 0], self.tokens[:, 1] = torch.arange(n) % 50, torch.arange(n) // 50
        self.make = make

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> Any:
        return self.make(self.tokens[i].clone())


def spelled(tokens: torch.Tensor) -> list[int]:
    """The ids of the samples in rows of tokens."""
    return [int(a) + 50 * int(b) for a, b in tokens[:, :2]]


class Net(nn.Module):
    """A language model; ``answer`` makes its output of loss and logits."""

    def __init__(
        self, answer: Callable[[torch.Tensor, torch.Tensor], Any] = lambda loss, logits: loss, again: bool = False
    ) -> None:
        super().__init__()
        self.answer, self.again = answer, again
        self.embed = nn.Embedding(VOCAB, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2))
        self.head = nn.Linear(16, VOCAB)

    def forward(self, input_ids: Any, labels: torch.Tensor | None = None, attention_mask: Any = None) -> Any:
        tokens = input_ids["input_ids"] if isinstance(input_ids, dict) else input_ids
        tokens = tokens.long()
        x, y = (tokens[:, :-1], tokens[:, 1:]) if labels is None else (tokens, labels)
        h = self.embed(x)
        for block in self.blocks:
            h = h + (checkpoint(block, h, use_reentrant=False) if self.again else block(h))
        logits = self.head(h).float()
        return self.answer(F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100), logits)


class Job:
    """An engine with GRACE, and a record of what the model was given beside what it was put down to.

    Args:
        grace: further keys of the block.
        model, data, collate: of the job.
        trusted, loss_fn: as for ``grace_ds.initialize``.
        workers: whether processes of the loader read the data, as they do by default.
        engine: further keys of DeepSpeed's config.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        data: Any = None,
        collate: Any = None,
        grace: dict[str, Any] | None = None,
        accumulation: int = 1,
        stage: int = 0,
        workers: bool = False,
        trusted: Any = None,
        loss_fn: Any = None,
        **engine: Any,
    ) -> None:
        import torch.distributed as dist

        import grace_ds

        block = {
            "budget": 0.4,
            "recipe": "grace",
            "start_step": 0,
            "pseudo_trusted": False,
            "guard": {"enabled": False},
            "refresh": {"interval_steps": 4, "cadence": "fixed", "timeout_seconds": 20},
            **(grace or {}),
        }
        config = {
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_accumulation_steps": accumulation,
            "train_batch_size": ROWS * accumulation * dist.get_world_size(),
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "dataloader_drop_last": True,
            "steps_per_print": 10**9,
            "data_efficiency": {"enabled": True, "data_sampling": {"enabled": True, "grace": block}},
            **engine,
        }
        torch.manual_seed(0)
        model = model if model is not None else Net()  # a compiled one has no truth of its own
        made = grace_ds.initialize(
            model=model,
            model_parameters=model.parameters(),
            training_data=Samples() if data is None else data,
            collate_fn=collate,
            config=config,
            trusted_data=trusted,
            loss_fn=loss_fn,
        )
        self.engine = made[0]
        # Workers that end with the garbage are waited for, ten seconds a form: only the forms about them have any.
        self.loader = made[2] if workers else self.engine.grace_ds.deepspeed_loader(num_local_io_workers=0)
        self.controller = self.engine.grace_ds.controller
        self.bound: list[tuple[list[int], list[int]]] = []  # what the model was given, and what it was put down to
        self.unbound = 0
        self._watch()

    def _watch(self) -> None:
        original = self.controller.before_forward

        def before_forward(inputs: Any) -> None:
            original(inputs)
            current = self.controller._current
            given = next(t for t in _tensors(inputs) if t.dim() == 2)
            if current is None:
                self.unbound += 1
            elif len(current[0].ids) == len(given):
                self.bound.append((spelled(given), current[0].ids.tolist()))
            else:
                self.bound.append((spelled(given), []))

        self.controller.before_forward = before_forward

    def batches(self) -> Iterator[Any]:
        """The loader's, epoch after epoch."""
        while True:
            yield from self.loader

    def train(self, steps: int, forward: Callable[[Any], Any] | None = None) -> None:
        """``forward`` gives the loss of a batch; default: the engine called with it whole."""
        batches, until = self.batches(), self.engine.global_steps + steps
        while self.engine.global_steps < until:
            batch = next(batches)
            loss = forward(batch) if forward is not None else self.engine(batch)
            self.engine.backward(loss)
            self.engine.step()

    def found(self, **more: Any) -> dict[str, Any]:
        """What there is to judge by; takes GRACE off."""
        c, g = self.controller, self.controller.geometry
        told = {
            "right": sum(a == b for a, b in self.bound),
            "wrong": [pair for pair in self.bound if pair[0] != pair[1]][:2],
            "unbound": self.unbound,
            "cursor": c.cursor,
            "expected": c.step * g.batch,
            "rows": c.collector.rows_kept if c.collector is not None else 0,
            "mismatches": c.watch.mismatches,
            "slips": c.watch.slips,
            "failures": c.metrics.refresh_failures,
            **more,
        }
        self.engine.grace_ds.detach()
        return told


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _tensors(value)


def trained(forward: Callable[[Job, Any], Any] | None = None, steps: int = 10, **how: Any) -> dict[str, Any]:
    """A job of ``steps`` steps, as found."""
    job = Job(**how)
    job.train(steps, None if forward is None else lambda batch: forward(job, batch))
    return job.found()
