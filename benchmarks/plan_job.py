"""The jobs of ``benchmarks.plan``, one rank of one; started by the deepspeed launcher.

Trains a few steps before GRACE is attached, so that the model, the optimizer and the activations have their memory; what the
process holds beyond that at the peak of a refresh is GRACE's.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.ops import __compatible_ops__
from grace_ds_quickstart.model import GPT, GPTConfig
from torch.utils.data import Dataset

import grace_ds
from grace_ds.refresh import runner
from grace_ds.refresh.runner import RefreshRunner
from grace_ds.utils.heap import trim_heap
from grace_ds.utils.methods import replace_method

__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first, for a minute

WARM, TIMED = 4, 12  # steps before GRACE is there


class SampleRecords(Dataset[dict[str, torch.Tensor]]):
    """The first ``count`` rows of a .npy of token ids; of several rows each, where they are to be longer."""

    def __init__(self, path: Path, count: int, tokens: int) -> None:
        rows = np.load(path, mmap_mode="r")
        self.rows, self.count, self.each = rows, count, -(-tokens // rows.shape[1])
        self.tokens = tokens

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        at = (i * self.each + np.arange(self.each)) % len(self.rows)
        return {"input_ids": torch.from_numpy(self.rows[at].reshape(-1)[: self.tokens].astype(np.int64))}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--job", type=json.loads, required=True, help="see benchmarks.plan")
    args = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    found = run(args.job, args.data)
    (args.out / f"rank-{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run(job: dict[str, Any], data: Path) -> dict[str, Any]:
    """Trains; returns this rank's figures."""
    torch.manual_seed(0)
    pool = SampleRecords(data / "train.npy", job["rows"], job["tokens"])
    trusted = SampleRecords(data / "trusted.npy", 256 if job["tokens"] > 100 else 384, job["tokens"])
    model = GPT(GPTConfig(context=job["tokens"] - 1, width=job["width"], layers=job["layers"]))
    config = {
        "train_batch_size": job["batch"],
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    share = job["batch"] // torch.distributed.get_world_size()
    plain = torch.stack([pool[i]["input_ids"] for i in range(share)])
    step(engine, plain, WARM)
    resting = resident()
    mark()
    bare = step(engine, plain, TIMED)
    step_peak, before = status("VmHWM") - resting, resident()
    if not job["steps"]:
        return {"bare_step_seconds": bare, "item_seconds": read(pool)}
    refreshes: list[dict[str, float]] = []
    _watch(refreshes, before)
    handle = grace_ds.attach(engine, pool, job["grace"], trusted_data=trusted)
    seconds = []
    while engine.global_steps < WARM + TIMED + job["steps"]:
        for batch in handle.loader():
            spent = handle.metrics["refresh_seconds"]
            took = step(engine, batch["input_ids"], 1)[0]
            seconds.append(took - (handle.metrics["refresh_seconds"] - spent))
            if engine.global_steps == WARM + TIMED + job["steps"]:
                break
    metrics = handle.metrics
    return {
        "parameters": sum(p.numel() for p in engine.module.parameters()),
        "before_bytes": before,
        "bare_step_seconds": bare,
        "step_seconds": seconds,
        "step_peak_bytes": step_peak,
        "refreshes": refreshes,
        "held_bytes": resident() - before,
        "collect_seconds": metrics["collect_seconds"],
        "collect_peak_bytes": metrics["events"].get("collect_peak_bytes", 0.0),
        "failures": metrics["refresh_failures"],
    }


def read(pool: SampleRecords) -> list[float]:
    """Seconds of one item, of several hundreds at a time."""
    out = []
    for start in range(0, 3000, 300):
        began = time.perf_counter()
        for i in range(start, start + 300):
            pool[i % len(pool)]
        out.append((time.perf_counter() - began) / 300)
    return out


def step(engine: Any, ids: torch.Tensor, count: int) -> list[float]:
    """Trains ``count`` steps on one batch; seconds of each."""
    out = []
    for _ in range(count):
        started = time.perf_counter()
        engine.backward(engine(ids))
        engine.step()
        out.append(time.perf_counter() - started)
    return out


def _watch(refreshes: list[dict[str, float]], before: float) -> None:
    """Notes seconds and memory of every refresh: at the peak of its stages, and of the trusted probe before them.

    The probe runs the model as a training step does, so what it takes is what the steps take, at another time.
    """
    module: Any = runner
    owner: Any = RefreshRunner
    stages, made = module.refresh, owner.__init__

    def run_refresh(original: Callable[..., Any], *args: Any) -> Any:
        start = resident() - before
        mark()
        began, cpu = time.perf_counter(), time.process_time()
        result = original(*args)
        refreshes[-1] |= {"start": start, "seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
        return result

    def refresh(*args: Any) -> Any:
        probe = status("VmHWM") - before
        mark()
        outcome = stages(*args)
        refreshes.append({"probe": probe, "peak": status("VmHWM") - before, **outcome.seconds})
        return outcome

    def init(self: RefreshRunner, *args: Any) -> None:
        made(self, *args)
        replace_method(self, "run_refresh", run_refresh)

    module.refresh, owner.__init__ = refresh, init


def mark() -> None:
    """Starts a new high-water mark of this process's memory."""
    Path("/proc/self/clear_refs").write_text("5")


def resident() -> float:
    """Bytes that this process holds, without what its allocator keeps for later."""
    gc.collect()
    trim_heap()
    return status("VmRSS")


def status(key: str) -> float:
    """A figure of /proc/self/status, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(key + ":"))) * 1024


if __name__ == "__main__":
    main()
