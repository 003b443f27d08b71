"""Small ZeRO jobs for the tests, started by a real launcher: ``zero_job.py SPECS.json``.

SPECS maps names to jobs, which run one after another, each with an engine of its own.  The dataset's items carry their own
index beside the tokens, so what was trained on is known without asking grace_ds.  Each rank writes ``OUT/NAME-RANK.json``.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.nn.functional as F
from deepspeed.ops import __compatible_ops__
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

import grace_ds
from grace_ds.errors import GraceError

# It would be compiled first, for a minute, under a lock that a killed rank leaves behind.
__compatible_ops__["deepspeed_shm_comm"] = False

VOCAB, LENGTH, SAMPLES = 61, 17, 192


class Corpus(Dataset[dict[str, torch.Tensor]]):
    """Item i: LENGTH tokens that depend on i, and i itself.  Every fourth is a near copy of its predecessor."""

    def __init__(self, n: int = SAMPLES, salt: int = 0) -> None:
        rng = np.random.default_rng(salt)
        self.tokens = rng.integers(0, VOCAB, (n, LENGTH))
        self.tokens[::2] = np.arange(LENGTH) * 3 % VOCAB + self.tokens[::2] % 7
        self.tokens[3::4] = self.tokens[2::4]
        self.tokens[3::4, 5] = 1

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.from_numpy(self.tokens[i]), "sid": torch.tensor([i])}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(F.gelu(self.up(x)))
        return out


class Model(nn.Module):
    """Embedding, blocks with a causal mean between them, head; returns the mean cross-entropy."""

    def __init__(self, checkpointing: str = "none", width: int = 32) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.embed = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(4))
        self.head = nn.Linear(width, VOCAB, bias=False)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        ids = batch["input_ids"]
        x = self.embed(ids[:, :-1])
        x = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)[:, None]
        for block in self.blocks:
            if self.checkpointing == "none" or not self.training:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
        return F.cross_entropy(self.head(x).float().flatten(0, 1), ids[:, 1:].flatten())


def drop_multiples_of_sixteen(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    kept = [x for x in items if int(x["sid"]) % 16]
    return torch.utils.data.default_collate(kept)  # raises for a lone multiple of sixteen, as such functions do


def ds_config(spec: dict[str, Any]) -> dict[str, Any]:
    config = {
        "train_batch_size": spec.get("batch", 8),
        "gradient_accumulation_steps": spec.get("gas", 1),
        "zero_optimization": {"stage": spec.get("stage", 2)},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "steps_per_print": 10**9,
        **spec.get("ds", {}),
    }
    if spec.get("bf16", True):
        config["bf16"] = {"enabled": True}
    if spec.get("grace") is not None:
        config["data_efficiency"] = {"enabled": True, "data_sampling": {"enabled": True, "grace": spec["grace"]}}
    return config


def break_stage(spec: dict[str, Any], rank: int) -> Callable[[], None]:
    """Replaces one function by one that fails (or hangs) on one rank, in its call number ``after`` + 1; returns the undoing."""
    fault = spec.get("fault")
    if fault is None or rank != fault["rank"]:
        return lambda: None
    module = importlib.import_module(fault["module"])
    original, calls = getattr(module, fault["name"]), []

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) != fault.get("after", 1) + 1:
            return original(*args, **kwargs)
        if fault.get("hang"):
            time.sleep(fault["hang"])
            return original(*args, **kwargs)
        raise RuntimeError("injected fault")

    setattr(module, fault["name"], broken)
    return lambda: setattr(module, fault["name"], original)


def param_digest(engine: Any) -> str:
    h = hashlib.blake2b(digest_size=16)
    stage3 = engine.zero_optimization_stage() == 3
    for p in engine.module.parameters():
        if stage3:
            with deepspeed.zero.GatheredParameters([p]):
                h.update(p.detach().float().cpu().numpy().tobytes())
        else:
            h.update(p.detach().float().cpu().numpy().tobytes())
    return h.hexdigest()


def main() -> None:
    specs = json.loads(Path(sys.argv[-1]).read_text())
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank = torch.distributed.get_rank()
    for name, spec in specs["jobs"].items():
        print(f"[{rank}] job {name}", flush=True)
        try:
            record = run(spec, rank)
        except GraceError as error:
            record = {"error": f"{type(error).__name__}: {error}"}
        Path(specs["out"], f"{name}-{rank}.json").write_text(json.dumps(record))
    torch.distributed.destroy_process_group()


def run(spec: dict[str, Any], rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    undo = break_stage(spec, rank)
    model = Model(spec.get("checkpointing", "none"))
    data = Corpus()
    collate = drop_multiples_of_sixteen if spec.get("filter") else None
    start = deepspeed.initialize if spec.get("via") == "deepspeed" else grace_ds.initialize
    engine, _, loader, _ = start(
        model=model, model_parameters=model.parameters(), training_data=data, config=ds_config(spec), collate_fn=collate
    )
    grace = getattr(engine, "grace_ds", None)
    try:
        if spec.get("workers") is not None and grace is not None:
            loader = grace.deepspeed_loader(num_local_io_workers=spec["workers"])
        if spec.get("load"):
            engine.load_checkpoint(spec["load"], tag=spec.get("load_tag"))
        record = train(spec, engine, loader)
        record["params"] = param_digest(engine)
        if grace is not None:
            c = grace.controller
            record["metrics"], record["comm"] = grace.metrics, c.comm.name
            record["schedules"] = [[s.version, s.start, s.digest()] for s in c.book.schedules]
            record["table"] = {str(i): int(v) for i, v in zip(c.table.ids, c.table.visits, strict=True)}
            record["hooks"] = len(engine.module._forward_hooks) + len(engine.module._forward_pre_hooks)
            record["align"] = np.isfinite(c.table.rows.align).mean().item() if len(c.table) else 0.0
            record["reference"] = {str(k): v for k, v in c.reference.items()}
    finally:
        undo()
        if grace is not None:
            grace.detach()
    return record


def train(spec: dict[str, Any], engine: Any, loader: Any) -> dict[str, Any]:
    """Runs to ``steps`` optimizer steps; returns the ids of each step, in order, on this rank."""
    steps: list[list[int]] = [[]]
    losses: list[float] = []
    extra = Corpus(8, salt=9)
    if spec.get("peek"):  # a look at the shapes, with an iterator of its own
        next(iter(loader))
    iterator = iter(loader)
    if spec.get("skip"):  # a batch that is taken and never trained on
        next(iterator)
    while engine.global_steps < spec.get("steps", 12):
        try:
            batch = next(iterator)
        except StopIteration:
            iterator = iter(loader)
            continue
        if spec.get("evaluate"):  # in train mode, as some jobs do
            with torch.no_grad():
                engine(torch.utils.data.default_collate([extra[i] for i in range(4)]))
        loss = engine(batch)
        if spec.get("overflow") == engine.global_steps:
            loss = loss * float("nan")
        engine.backward(loss)
        steps[-1] += batch["sid"].flatten().tolist()
        losses.append(float(loss))
        boundary = engine.is_gradient_accumulation_boundary()
        engine.step()
        if boundary:
            steps.append([])
            if engine.global_steps in spec.get("save_at", []):
                engine.save_checkpoint(spec["save"])
    return {"steps": steps[:-1], "losses": losses}


if __name__ == "__main__":
    main()
