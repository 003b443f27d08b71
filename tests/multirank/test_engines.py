"""Engines made, trained and destroyed one after another in one process leave nothing behind: nothing held, open or running."""

from __future__ import annotations

import gc
import os
import socket
import weakref
from pathlib import Path
from typing import Any

import pytest

from tests.multirank.harness import World, run_ranks
from tests.multirank.launch import COLLECTING

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(300)]

ENGINES, WARM = 50, 5  # the first few fill caches of torch, DeepSpeed and the allocator
# How an engine ends, and its ZeRO stage: one that is only dropped is destroyed by DeepSpeed once it is collected, which with
# ZeRO it never is, without GRACE either.
ENDS = (("destroy", 2), ("detach", 2), ("drop", 0))


def engines(world: World, folder: str, count: int, grace: bool) -> list[dict[str, Any]]:
    """What is alive, open and running after each engine."""
    os.environ.update({"RANK": str(world.rank), "LOCAL_RANK": str(world.rank), "WORLD_SIZE": str(world.size)})
    import logging

    import deepspeed
    import torch
    from deepspeed.ops import __compatible_ops__

    from grace_ds.monitor import progress

    __compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first, for a minute
    logging.disable(logging.INFO)
    deepspeed.init_distributed("gloo", verbose=False)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as drawer:
        drawer.bind(f"{folder}/progress-{world.rank}")  # never read: what it does not take is dropped
        os.environ[progress.VARIABLE] = f"{folder}/progress-{world.rank}"
        refs: list[weakref.ref[Any]] = []
        found = [left_after(one_engine(refs, folder, grace, *ENDS[i % len(ENDS)]), refs) for i in range(count)]
        torch.distributed.barrier()  # a rank that ends before the other has counted takes its connections with it
        return found


def one_engine(refs: list[weakref.ref[Any]], folder: str, grace: bool, end: str, stage: int) -> None:
    """Three steps with two refreshes of an engine; watched for pre-emption and told of, as far as GRACE is there."""
    import deepspeed
    import torch
    from torch.utils.data import DataLoader, DistributedSampler

    import grace_ds
    from tests.multirank.toy import Corpus, Model

    model, data = Model(), Corpus(64)
    config = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    refs += [weakref.ref(model), weakref.ref(engine)]
    if grace:
        handle = grace_ds.attach(engine, data, {**COLLECTING, "enabled": True}, trusted_data=Corpus(64, salt=3))
        grace_ds.watch_preemption(engine, folder, signals=["SIGTERM"])
        refs += [weakref.ref(handle), weakref.ref(handle.controller)]
        loader: Any = handle.loader()
    else:
        loader = DataLoader(data, 4, sampler=DistributedSampler(data))
    for batch in loader:
        engine.backward(engine(batch))
        engine.step()
        if engine.global_steps == 3:
            break
    if grace:
        assert handle.metrics["refreshes"] == 2 and grace_ds.sample_weights().shape == torch.Size([4])
    if grace and end == "detach":
        handle.detach()
    if end != "drop":
        engine.destroy()
        assert not grace or engine.grace_ds is None


def left_after(_: None, refs: list[weakref.ref[Any]]) -> dict[str, Any]:
    import signal
    import sys

    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "alive": sum(ref() is not None for ref in refs),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "hook": repr(sys.excepthook),
        "SIGTERM": repr(signal.getsignal(signal.SIGTERM)),
        "MiB": resident / 2**20,
    }


def test_fifty_engines_leave_nothing_behind(tmp_path: Path) -> None:
    # DeepSpeed's own engines leave nothing, so nothing is all that is allowed.
    for found in run_ranks(engines, 2, str(tmp_path), 2 * WARM, False, timeout=100):
        assert flat(found) == {}, found
    (tmp_path / "grace").mkdir()
    for found in run_ranks(engines, 2, str(tmp_path / "grace"), ENGINES, True, timeout=180):
        print(found[0], found[WARM], found[-1])
        assert flat(found) == {}, found
        assert found[-1]["alive"] == 0
        assert found[-1]["MiB"] - found[WARM]["MiB"] < 16, [round(x["MiB"], 1) for x in found]


def flat(found: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """What differs after the warm-up and at the end."""
    keys = ("alive", "descriptors", "threads", "hook", "SIGTERM")
    return {key: [after[key] for after in found] for key in keys if len({after[key] for after in found[WARM:]}) > 1}
