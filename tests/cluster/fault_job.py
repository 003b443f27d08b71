"""Small jobs in which something goes wrong at a chosen point: ``fault_job.py SPEC.json ...``, by hand or by a launcher.

A SPEC holds the DeepSpeed config, where to save, the time limit of the job's collectives, the steps, and the fault: the rank,
the place (a function of grace_ds, or ``train``) and whether the rank is killed there or waits there for the world to end.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.ops import __compatible_ops__

import grace_ds
from tests.multirank.toy import Corpus, Model

__compatible_ops__["deepspeed_shm_comm"] = False
FAULT_STEP = 8  # its step, its refresh and its checkpoint


def fault(spec: dict[str, Any], folder: Path) -> None:
    """What befalls this rank: it is killed, or it stops until its host is cut off, and goes on."""
    if spec["how"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / "here").touch()
    while not (folder / "cut").exists():
        time.sleep(0.05)


def arm(spec: dict[str, Any], folder: Path, due: Callable[[], bool]) -> None:
    """Puts the fault in front of a function, for the first call once it is due."""
    module, name = spec["place"]
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original = getattr(owner, last)
    left = [True]

    def faulty(*args: Any, **kwargs: Any) -> Any:
        if left and due():
            left.clear()
            fault(spec, folder)
        return original(*args, **kwargs)

    setattr(owner, last, faulty)


def main() -> None:
    torch.set_num_threads(1)
    specs = [json.loads(Path(word).read_text()) for word in sys.argv[1:] if word.endswith(".json")]
    limit = timedelta(seconds=specs[0]["limit"])
    deepspeed.init_distributed(dist_backend="gloo", verbose=False, timeout=limit)
    for spec in specs:
        told = run(spec, torch.distributed.get_rank())
        Path(spec["folder"], f"done-{torch.distributed.get_rank()}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


def run(spec: dict[str, Any], rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Model()
    engine, _, loader, _ = grace_ds.initialize(
        model=model, model_parameters=model.parameters(), training_data=Corpus(), config=spec["config"]
    )
    what = spec.get("fault")
    mine = what is not None and what["rank"] == rank
    folder = Path(spec["folder"])
    if mine and what["place"] != "train":
        arm(what, folder, lambda: engine.grace_ds.controller.step >= FAULT_STEP)
    if spec.get("load"):
        assert engine.load_checkpoint(spec["load"])[0] is not None
    first = engine.global_steps
    steps: list[list[int]] = []
    while engine.global_steps < first + spec["steps"]:
        for batch in loader:
            loss = engine(batch)
            if mine and what["place"] == "train" and engine.global_steps == FAULT_STEP - 1:
                fault(what, folder)
            engine.backward(loss)
            engine.step()
            steps.append(batch["sid"].flatten().tolist())
            print(f"step {engine.global_steps}", flush=True)
            if engine.global_steps % 4 == 0 and spec.get("save"):
                engine.save_checkpoint(spec["save"])
            if engine.global_steps == first + spec["steps"]:
                break
    controller = engine.grace_ds.controller
    schedules = [[s.version, s.digest()] for s in controller.book.schedules]
    told = {"first": first, "steps": steps, "schedules": schedules, "comm": controller.comm.name}
    engine.grace_ds.detach()
    return told


if __name__ == "__main__":
    main()
