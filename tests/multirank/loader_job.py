"""A script that knows only torch and DeepSpeed, builds its own loaders, and has its config in code: ``loader_job.py SPECS.json``.

SPECS maps names to jobs, which run one after another.  Each rank writes ``OUT/NAME-RANK.json``: the samples of every
optimizer step, those of the validations, losses, and a digest of the parameters.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.ops import __compatible_ops__
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from tests.multirank.toy import Corpus, Model

__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first, for a minute


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([corpus[i] for corpus in [Corpus()] for i in range(len(corpus))])


def loader_of(spec: dict[str, Any], data: Any) -> Any:
    options: dict[str, Any] = {"batch_size": spec.get("rows", 4), "num_workers": spec.get("workers", 0)}
    if spec.get("sampler") == "random":
        return DataLoader(data, shuffle=True, **options)
    if spec.get("sampler") == "stream":
        return DataLoader(Streamed(), **options)
    return DataLoader(data, sampler=DistributedSampler(data, seed=spec.get("seed", 5)), **options)


class Endless:
    """Gives batches for ever, as scripts do that count in steps; its first iterator is older than the engine."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.iterator = loader, iter(loader)

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        try:
            return next(self.iterator)
        except StopIteration:
            self.iterator = iter(self.loader)
            return next(self.iterator)


def validate(engine: Any, loader: Any, seen: list[list[int]]) -> None:
    engine.eval()
    with torch.no_grad():
        for batch in loader:
            engine(batch)
            seen.append(batch["sid"].flatten().tolist())
    engine.train()


def run(spec: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    data, model = Corpus(), Model()
    loader, validation = loader_of(spec, data), DataLoader(Corpus(12, salt=3), batch_size=4)
    batches = Endless(loader) if spec.get("endless") else None
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": spec.get("gas", 1),
        "zero_optimization": {"stage": spec.get("stage", 1)},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "steps_per_print": 10**9,
        **({"grace_ds": spec["grace"]} if "grace" in spec else {}),
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    try:
        return train(spec, engine, config, loader if batches is None else batches, validation)
    finally:
        engine.destroy()


def train(spec: dict[str, Any], engine: Any, config: dict[str, Any], loader: Any, validation: Any) -> dict[str, Any]:
    other = None
    if spec.get("reference"):  # a model that only judges, by the same config
        judge = Model()
        other, *_ = deepspeed.initialize(model=judge, model_parameters=judge.parameters(), config=config)
        other.eval()
    if "load" in spec:
        engine.load_checkpoint(spec["load"])
    told: dict[str, Any] = {"steps": [], "validated": [], "losses": []}
    step: list[int] = []
    skip = spec.get("skip", 0)
    validate(engine, validation, told["validated"])
    epoch = engine.global_steps * spec.get("gas", 1) // 24
    while engine.global_steps < spec.get("steps", 8):
        if isinstance(getattr(loader, "sampler", None), DistributedSampler):
            loader.sampler.set_epoch(epoch)
        for batch in loader:
            if skip:
                skip -= 1
                continue
            if other is not None:
                with torch.no_grad():
                    other(batch)
            loss = engine(batch)
            engine.backward(loss)
            if spec.get("stray"):  # an optimizer that the engine does not know
                for p in engine.module.parameters():
                    p.grad = None
                continue
            engine.step()
            step += batch["sid"].flatten().tolist()
            told["losses"].append(float(loss))
            if engine.global_steps > len(told["steps"]) + spec.get("from", 0):
                told["steps"].append(step)
                step = []
                if engine.global_steps % 3 == 0:
                    validate(engine, validation, told["validated"])
                if engine.global_steps == spec.get("save_at"):
                    engine.save_checkpoint(spec["save"])
            if engine.global_steps == spec.get("steps", 8):
                break
        epoch += 1
    told["touched"] = getattr(engine, "grace_ds", None) is not None
    if told["touched"]:
        told["metrics"] = {k: v for k, v in engine.grace_ds.metrics.items() if isinstance(v, (int, float, str))}
        table = engine.grace_ds.controller.table
        told["table"] = {str(i): int(v) for i, v in zip(table.ids, table.last, strict=True)}
    told["other_touched"] = getattr(other, "grace_ds", None) is not None
    h = hashlib.blake2b(digest_size=16)
    for p in engine.module.parameters():
        h.update(p.detach().float().cpu().numpy().tobytes())
    told["params"] = h.hexdigest()
    return told


def main() -> None:
    specs = json.loads(Path(sys.argv[-1]).read_text())
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank = torch.distributed.get_rank()
    for name, spec in specs["jobs"].items():
        print(f"[{rank}] job {name}", flush=True)
        try:
            told = run(spec)
        except Exception as error:
            if type(error).__module__ != "grace_ds.errors":
                raise
            told = {"error": f"{type(error).__name__}: {error}"}
        Path(specs["out"], f"{name}-{rank}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
