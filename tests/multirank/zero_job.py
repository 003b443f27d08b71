"""Small ZeRO jobs for the tests, started by a real launcher: ``zero_job.py SPECS.json``.

SPECS maps names to jobs, which run one after another, each with an engine of its own.  The dataset's items carry their own
index beside the tokens, so what was trained on is known without asking grace_ds.  Each rank writes ``OUT/NAME-RANK.json``.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import importlib
import json
import logging
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.ops import __compatible_ops__
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

import grace_ds
import grace_ds.refresh.choice
from grace_ds.errors import GraceError
from grace_ds.selection.guard import Contrast
from tests.multirank.toy import SAMPLES, Corpus, Model, Stream, drop_multiples_of_sixteen

# It would be compiled first, for a minute, under a lock that a killed rank leaves behind.
__compatible_ops__["deepspeed_shm_comm"] = False


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
    """Lets one function (or ``Class.method``) misbehave on one rank, in its call number ``after`` + 1; returns the undoing.

    It raises; with ``hang`` it sleeps that many seconds first and then works; with ``poison`` it writes
    that number over the first element of the argument or the result that the fault names.
    """
    fault = spec.get("fault")
    if fault is None or rank != fault["rank"]:
        return lambda: None
    owner: Any = importlib.import_module(fault["module"])
    *path, name = fault["name"].split(".")
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), []

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) != fault.get("after", 1) + 1:
            return original(*args, **kwargs)
        if "hang" in fault:
            time.sleep(fault["hang"])
            return original(*args, **kwargs)
        if "poison" in fault:
            if "argument" in fault:
                args[fault["argument"]].reshape(-1)[0] = float(fault["poison"])
                return original(*args, **kwargs)
            result = original(*args, **kwargs)
            getattr(result.rows, fault["column"]).reshape(-1)[0] = float(fault["poison"])
            return result
        raise RuntimeError("injected fault")

    setattr(owner, name, broken)
    return lambda: setattr(owner, name, original)


def find_harm(spec: dict[str, Any]) -> Callable[[], None]:
    """Lets every comparison of core and audit samples that can be made say that the core has done harm; returns the undoing."""
    original = grace_ds.refresh.choice.contrast

    def harmful(*args: Any) -> Contrast:
        found = original(*args)
        return dataclasses.replace(found, high=-1e-6) if np.isfinite(found.difference) else found

    if spec.get("harm"):
        grace_ds.refresh.choice.contrast = harmful
    return lambda: setattr(grace_ds.refresh.choice, "contrast", original)


def extras(spec: dict[str, Any]) -> dict[str, Any]:
    """What the job hands to ``initialize`` beside its config: its validation set, a tokeniser."""
    out: dict[str, Any] = {}
    if "validation" in spec:
        out["validation_data"] = Corpus(**spec["validation"])
    if spec.get("tokenize"):
        out["tokenize"] = lambda text: [int(word) for word in text.split()]
    if "loss_fn" in spec:
        out["loss_fn"] = own_loss(spec["loss_fn"])
    return out


def own_loss(fault: dict[str, Any]) -> Callable[[Any, Any], torch.Tensor]:
    """A ``loss_fn`` of the job's; it raises on one rank, in its call number ``after`` + 1, where the spec says so."""
    calls = []

    def loss(module: Any, batch: Any) -> torch.Tensor:
        calls.append(1)
        if torch.distributed.get_rank() == fault.get("rank") and len(calls) == fault["after"] + 1:
            raise RuntimeError("injected fault")
        out: torch.Tensor = module(batch)
        return out

    return loss


def fill_disk(folder: Path, leave: int) -> None:
    """Leaves ``leave`` bytes on the file system of ``folder``."""
    room = shutil.disk_usage(folder).free - leave
    with (folder / "filler").open("wb", buffering=0) as f:
        for _ in range(room // 4096):
            f.write(bytes(4096))


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
    gc.freeze()  # what has been imported is not looked through after every job
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank = torch.distributed.get_rank()
    for name, spec in specs["jobs"].items():
        print(f"[{rank}] job {name}", flush=True)
        try:
            record = run(spec, rank)
        except GraceError as error:
            if spec.get("uncaught"):  # as in a script that knows nothing of us
                raise
            record = {"error": f"{type(error).__name__}: {error}"}
        Path(specs["out"], f"{name}-{rank}.json").write_text(json.dumps(record))
    torch.distributed.destroy_process_group()


def run(spec: dict[str, Any], rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    undo, undo_harm = break_stage(spec, rank), find_harm(spec)
    model = Model(spec.get("checkpointing", "none"))
    if model.checkpointing == "deepspeed":
        deepspeed.checkpointing.configure(None)
    data: Any = Corpus(spec.get("samples", SAMPLES), clean=spec.get("clean", False), bare=spec.get("bare", False))
    if spec.get("stream"):
        data = Stream(data)
    collate = drop_multiples_of_sixteen if spec.get("filter") else None
    start = grace_ds.initialize if spec.get("via") is None else deepspeed.initialize
    given = None if spec.get("own") else data
    config: Any = ds_config(spec)
    if "config_file" in spec:
        config = f"{spec['config_file']}-{rank}.json"
        Path(config).write_text("# DeepSpeed reads comments, so do we\n" + json.dumps(ds_config(spec)))
    engine, _, loader, _ = start(
        model=model, model_parameters=model.parameters(), training_data=given, config=config, collate_fn=collate, **extras(spec)
    )
    sampler = own_sampler(spec["own"], engine, data) if spec.get("own") else None
    attached = spec.get("via") == "attach"
    grace = grace_ds.attach(engine, data, sampler=sampler) if attached else getattr(engine, "grace_ds", None)
    try:
        if spec.get("own"):
            loader = own_loader(spec["own"], engine, grace, data, sampler)
        elif spec.get("workers") is not None and grace is not None:
            loader = grace.deepspeed_loader(num_local_io_workers=spec["workers"])
        if spec.get("damage") and torch.distributed.get_rank() == 0:
            damage(Path(spec["load"]), **spec["damage"])
        torch.distributed.barrier()
        if spec.get("load"):
            engine.load_checkpoint(spec["load"], tag=spec.get("load_tag"))
        record = train(spec, engine, loader)
        record["params"] = param_digest(engine)
        record["layer_hooks"] = layer_hooks(engine.module)
        if grace is not None:
            c = grace.controller
            record["metrics"], record["comm"] = grace.metrics, c.comm.name
            record["schedules"] = [[s.version, s.start, s.digest()] for s in c.book.schedules]
            record["seen"] = {str(i): int(v) for i, v in zip(c.seen.ids, c.seen.last, strict=True)}
            record["table"] = {str(i): int(v) for i, v in zip(c.table.ids, c.table.last, strict=True)}
            record["hooks"] = len(engine.module._forward_hooks) + len(engine.module._forward_pre_hooks)
            record["levels"] = [[s.version, s.meta.get("guard", {}).get("level")] for s in c.book.schedules]
            record["influence"] = np.isfinite(c.table.rows.influence).mean().item() if len(c.table) else 0.0
            record["scale"] = {} if c.collector is None else c.collector.sketcher.scale.by_name()
            record["reference"] = {str(k): v for k, v in c.reference.items()}
    finally:
        undo()
        undo_harm()
        stop_workers()
        if grace is not None:
            grace.detach()
    return record


def layer_hooks(module: torch.nn.Module) -> int:
    """Hooks of all kinds on the module's own modules, itself left out."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, kind)) for m in module.modules() if m is not module for kind in kinds)


def damage(folder: Path, source: str, name: str, how: str) -> None:
    """Makes ``folder`` a copy of the checkpoint ``source`` with one file that is torn, missing, or from the future."""
    shutil.copytree(source, folder)
    (path,) = folder.glob(name)
    if how == "tear":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "remove":
        path.unlink()
    else:
        state = torch.load(path, weights_only=False)
        state["grace_ds"]["schema"] += 1
        torch.save(state, path)


def stop_workers() -> None:
    """Ends the workers of this job's loaders; left to the garbage collector of a later job, each would be waited for."""
    for x in gc.get_objects():
        if isinstance(x, _MultiProcessingDataLoaderIter):
            x._shutdown_workers()


def arguments(spec: dict[str, Any], batch: dict[str, torch.Tensor]) -> tuple[Any, ...]:
    """What the job calls its engine with: the batch, or tokens and targets that it cuts from it, or makes on some ranks."""
    if "call" not in spec:
        return (batch,)
    tokens, targets = batch["input_ids"][:, :-1], batch["input_ids"][:, 1:]
    if spec["call"] == "copies":  # as a move to a device does
        tokens, targets = tokens.clone(), targets.clone()
    elif torch.distributed.get_rank() in spec["call"]:
        targets = targets.masked_fill(targets == tokens, -100)
    return tokens, targets


def own_sampler(own: dict[str, Any], engine: Any, data: Corpus) -> Any:
    """The sampler of a job that builds its own loader; one without a seed is of a kind whose order nobody can tell."""
    seed = own.get("seed", 0)
    if seed is None:
        return RandomSampler(data)
    return DistributedSampler(data, engine.dp_world_size, torch.distributed.get_rank(), shuffle=True, seed=seed)


def own_loader(own: dict[str, Any], engine: Any, grace: Any, data: Corpus, sampler: Any) -> Any:
    """The loader of a job that builds its own; with the handle where there is one."""
    if grace is not None:
        return grace.loader(num_workers=own["workers"], drop_last=True)
    rows = engine.train_micro_batch_size_per_gpu()
    return DataLoader(data, rows, sampler=sampler, num_workers=own["workers"], drop_last=True)


def train(spec: dict[str, Any], engine: Any, loader: Any) -> dict[str, Any]:
    """Runs to ``steps`` optimizer steps; returns the ids of each step, in order, on this rank."""
    steps: list[list[int]] = [[]]
    losses: list[float] = []
    failed: list[str] = []
    weighed: list[list[list[float]]] = [[]]
    too_early = ""
    if spec.get("weights"):
        try:
            grace_ds.sample_weights()
        except GraceError as error:
            too_early = f"{type(error).__name__}: {error}"
    waiting: deque[Any] = deque()
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
        if spec.get("ahead"):  # one batch is always fetched before the one that is trained on
            waiting.append(batch)
            if len(waiting) < 2:
                continue
            batch = waiting.popleft()
        if spec.get("evaluate"):  # in train mode, as some jobs do
            with torch.no_grad():
                engine(torch.utils.data.default_collate([extra[i] for i in range(4)]))
        if spec.get("clone"):  # as a move to a device does
            batch = {key: value.clone() for key, value in batch.items()}
        loss = engine(*arguments(spec, batch))
        ids = batch.get("sid", batch["input_ids"][:, 0]).flatten().tolist()
        if spec.get("weights"):
            weighed[-1] += [[i, w] for i, w in zip(ids, grace_ds.sample_weights(engine).tolist(), strict=True)]
        if spec.get("overflow") == engine.global_steps:
            loss = loss * float("nan")
        engine.backward(loss)
        steps[-1] += ids
        losses.append(float(loss))
        boundary = engine.is_gradient_accumulation_boundary()
        engine.step()
        if boundary:
            steps.append([])
            weighed.append([])
            if engine.global_steps in spec.get("save_at", []):
                if "fill" in spec and engine.global_steps == spec["save_at"][-1] and torch.distributed.get_rank() == 0:
                    fill_disk(Path(spec["fill"]["folder"]), spec["fill"]["leave"])
                try:
                    engine.save_checkpoint(spec["save"])
                except GraceError as error:
                    failed.append(f"{type(error).__name__}: {error}")
    told = {"weights": weighed[:-1], "too_early": too_early} if spec.get("weights") else {}
    return {"steps": steps[:-1], "losses": losses, "failed_saves": failed, **told}


if __name__ == "__main__":
    main()
