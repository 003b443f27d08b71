"""The job of ``benchmarks.chaos``, one rank of it: ``chaos_job.py SPEC.json``, started by the deepspeed launcher on two hosts.

The spec holds where to load from and to save to, the step to end at, the pace and the time limit of the job's collectives.
Each rank appends the samples of every step that it has made to a file of its own, and of each refresh the digest of its
schedule and its resident memory.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from benchmarks.soak_job import build, resident_mib

MICRO = 4  # rows; the batch has 16, so 1, 2 and 4 ranks accumulate 4, 2 and 1 of them
SAVE_EVERY = 20  # steps
KEPT = 2  # checkpoints


def main() -> None:
    spec: dict[str, Any] = json.loads(Path(next(word for word in sys.argv[1:] if word.endswith(".json"))).read_text())
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False, timeout=timedelta(seconds=spec["limit"]))
    rank = dist.get_rank()
    grace = {"run_dir": spec["run_dir"], "refresh": {"interval_steps": 40, "cadence": "fixed", "timeout_seconds": spec["limit"]}}
    whole = {"train_micro_batch_size_per_gpu": MICRO, "checkpoint": {"load_universal": bool(spec["universal"])}}
    engine, loader = build(grace, whole)
    if spec["load"]:
        assert engine.load_checkpoint(spec["load"], tag=spec["tag"])[0] is not None
    controller, saves = engine.grace_ds.controller, Path(spec["save"])
    with Path(spec["out"], f"{spec['name']}-{rank}.jsonl").open("a", buffering=1) as out:
        out.write(json.dumps({"from": engine.global_steps}) + "\n")
        ids: list[int] = []
        while engine.global_steps < spec["end"]:
            for batch in loader:
                began, before = time.monotonic(), (engine.global_steps, controller.metrics.version)
                engine.backward(engine(batch["input_ids"]))
                engine.step()
                ids += batch["sid"].tolist()
                if engine.global_steps == before[0]:
                    continue
                out.write(json.dumps({"step": before[0], "ids": ids}) + "\n")
                ids = []
                if controller.metrics.version > before[1]:
                    digest = controller.book.schedules[-1].digest()
                    row = {"version": controller.metrics.version, "digest": digest, "rss_mib": round(resident_mib(), 2)}
                    out.write(json.dumps(row) + "\n")
                if controller.frozen:
                    raise SystemExit("GRACE is frozen: what follows would be another run than the undisturbed one")
                if engine.global_steps % SAVE_EVERY == 0 or engine.global_steps == spec["end"]:
                    engine.save_checkpoint(str(saves))
                    tidy(saves, rank)
                if engine.global_steps == spec["end"]:
                    break
                time.sleep(max(0.0, spec["pace"] - (time.monotonic() - began)))
        out.write(json.dumps({"end": engine.global_steps, "failures": controller.metrics.refresh_failures}) + "\n")
    engine.grace_ds.detach()
    dist.destroy_process_group()


def tidy(saves: Path, rank: int) -> None:
    """Keeps the last checkpoints; rank 0 does."""
    if rank:
        return
    found = sorted(saves.glob("global_step*"), key=lambda path: int(path.name.removeprefix("global_step")))
    for old in found[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    main()
