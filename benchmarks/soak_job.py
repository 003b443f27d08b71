"""The job of ``benchmarks.soak``, one rank of it; started by the deepspeed launcher."""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops import __compatible_ops__
from grace_ds_quickstart.model import GPT, GPTConfig
from torch.utils.data import Dataset

import grace_ds
from grace_ds.utils.heap import trim_heap

__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first, for a minute

SAMPLES, LENGTH, BATCH, INTERVAL = 4000, 65, 16, 40
LATE_SHARE, LATE_SECONDS = 0.1, 1.5  # of the steps, at most so much


class Chains(Dataset[dict[str, torch.Tensor]]):
    """Tokens in chains; every fifth sample is drawn at random, every seventh a copy of its predecessor."""

    def __init__(self, samples: int, seed: int, vocabulary: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(0, vocabulary, (samples, LENGTH), generator=draw)
        steps = torch.randint(1, 4, (samples, LENGTH), generator=draw).cumsum(1)
        chained = torch.arange(samples) % 5 != 4
        self.tokens[chained] = (self.tokens[chained, :1] + 7 * steps[chained]) % vocabulary
        self.tokens[6::7] = self.tokens[5::7][: len(self.tokens[6::7])]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[i], "sid": torch.tensor(i)}


def resident_mib() -> float:
    """Resident memory of this process without what its allocator keeps for later."""
    gc.collect()
    trim_heap()
    words = Path("/proc/self/statm").read_text().split()
    return int(words[1]) * 4096 / 2**20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--refreshes", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    draw = random.Random(dist.get_rank())
    engine, loader = build()
    controller = engine.grace_ds.controller
    refresh = controller.refresh

    def late() -> None:
        if draw.random() < LATE_SHARE:
            time.sleep(LATE_SECONDS * draw.random())

    def late_refresh() -> None:
        time.sleep(LATE_SECONDS * draw.random())
        refresh()

    controller.refresh = late_refresh
    started, made = time.monotonic(), 0
    pace = args.seconds / (args.refreshes * INTERVAL)  # seconds a step
    while made < args.refreshes:
        for batch in loader:
            late()
            engine.backward(engine(batch["input_ids"]))
            before = controller.metrics.version
            engine.step()
            if controller.metrics.version > before or controller.metrics.refresh_failures > made + 1:
                made += 1
                note(args.out, controller, made, time.monotonic() - started)
                if made == args.refreshes:
                    break
            ahead = started + engine.global_steps * pace - time.monotonic()
            if ahead > 0:
                time.sleep(ahead)
    dist.destroy_process_group()


def build(grace_more: dict[str, Any] | None = None, more: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """Engine and loader; the arguments are added to its ``grace_ds`` block and to the rest of its config."""
    torch.manual_seed(0)
    shape = GPTConfig(width=64)
    grace = {
        "recipe": "grace",
        "budget": 0.3,
        "start_step": 0,
        "window": 3000,
        "guard": {"enabled": False},  # it may find the pool clean, and then nothing is collected
        "refresh": {"interval_steps": INTERVAL, "cadence": "fixed", "timeout_seconds": 120},
    }
    config = {
        "train_batch_size": BATCH,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "steps_per_print": 10**9,
        "grace_ds": grace | (grace_more or {}),
        **(more or {}),
    }
    model = GPT(shape)
    data, trusted = Chains(SAMPLES, 1, shape.vocab), Chains(256, 2, shape.vocab)
    engine, _, loader, _ = grace_ds.initialize(
        model=model, model_parameters=model.parameters(), training_data=data, trusted_data=trusted, config=config
    )
    return engine, loader


def note(out: Path, controller: Any, number: int, seconds: float) -> None:
    """A line about a refresh, by rank 0."""
    schedule = controller.book.schedules[-1]
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (schedule.digest(), resident_mib(), len(controller.table)))
    if dist.get_rank():
        return
    row = {
        "refresh": number,
        "seconds": round(seconds, 1),
        "version": schedule.version,
        "agreed": len({digest for digest, _, _ in told}) == 1,
        "failures": controller.metrics.refresh_failures,
        "rows": [rows for _, _, rows in told],
        "rss_mib": [round(mib, 2) for _, mib, _ in told],
    }
    with out.open("a") as f:
        f.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
