"""Jobs whose training is over, in several ways, and that are then told to go: ``over_job.py FOLDER WAY...``.

Each is a forked process of its own, with its output in FOLDER/WAY and its exit status in FOLDER/codes.json.  It says what has
become of the signal: ``former`` where its own handler of before was called.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import deepspeed
import torch
from deepspeed.ops import __compatible_ops__

import grace_ds
from grace_ds.integrations.preemption import PreemptionWatch
from tests.multirank.toy import Corpus, Model

__compatible_ops__["deepspeed_shm_comm"] = False
CONFIG = {
    "train_batch_size": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "steps_per_print": 10**9,
}


def former(number: int, frame: FrameType | None) -> None:
    print(f"former: {signal.Signals(number).name}", flush=True)
    sys.exit(7)


def main() -> None:
    folder, ways = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    codes: dict[str, int] = {}
    for start in range(0, len(ways), 4):
        children = {}
        for way in ways[start : start + 4]:
            pid = os.fork()
            if pid == 0:
                out = os.open(folder / way, os.O_WRONLY | os.O_CREAT)
                os.dup2(out, 1)
                os.dup2(out, 2)
                signal.alarm(60)
                return job(way, folder)
            children[pid] = way
        for pid, way in children.items():
            codes[way] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    (folder / "codes.json").write_text(json.dumps(codes))


def job(way: str, folder: Path) -> None:
    if "python" in way:
        signal.signal(signal.SIGTERM, former)
    deepspeed.init_distributed("gloo", verbose=False, init_method=f"file://{folder}/{way}-rendezvous", rank=0, world_size=1)
    engine, watch = start(str(folder / f"{way}-saved"), 60.0 if "slow" in way else 1.0)
    train(engine, 3)
    print(f"steps {engine.global_steps}", flush=True)
    if "pending" in way:  # it comes while nobody is in a step, and then the engine goes
        os.kill(os.getpid(), signal.SIGTERM)
    if "group" in way:
        torch.distributed.destroy_process_group()
    if "destroy" in way:
        engine.destroy()
    if "gone" in way:
        del engine, watch
        gc.collect()
    if "usr1" in way:
        os.kill(os.getpid(), signal.SIGUSR1)
    elif "pending" not in way:
        os.kill(os.getpid(), signal.SIGTERM)
    if "step" in way:  # late, but in time
        time.sleep(0.3)
        train(engine, 1)
    time.sleep(20)
    print("still here", flush=True)


def start(folder: str, seconds: float) -> tuple[deepspeed.DeepSpeedEngine, PreemptionWatch]:
    model = Model()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=CONFIG)
    return engine, grace_ds.watch_preemption(engine, folder, step_seconds=seconds)


def train(engine: deepspeed.DeepSpeedEngine, steps: int) -> None:
    batch = torch.utils.data.default_collate([Corpus(4)[i] for i in range(4)])
    for _ in range(steps):
        engine.backward(engine(batch))
        engine.step()


if __name__ == "__main__":
    main()
