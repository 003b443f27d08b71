"""What collecting adds to a run's steps: CPU seconds of the same job with and without GRACE, in interleaved pairs.

Two engines of one process train the same model on the same batches: one from ``deepspeed.initialize``, one from
``grace_ds.initialize`` in shadow mode, with the default's layers and share of steps whose gradients are collected, losses read
at every step, and no refresh in the timed steps. A pair is a few steps of the one and as many of the other, in random order,
the collected ones in proportion; its figure is the ratio of their CPU seconds. A trusted basis is in force, which doubles the
projections: the dearer case. FLOPs are counted by torch's own counter, bytes by the hooks' own.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from grace_ds_quickstart.launch import free_port
from grace_ds_quickstart.model import GPT, GPTConfig
from rich.console import Console
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.record import Claim, Record, median_interval
from grace_ds.config.schema import LEAST_COLLECTED, GraceConfig
from grace_ds.records import SampleRecords
from grace_ds.refresh.decision import collect_every

MODELS = {"small": GPTConfig(width=80), "large": GPTConfig(width=256)}  # about 0.5M and 4M parameters
EVERY = round(1 / GraceConfig().collect.share)  # one step in so many is collected
STEPS = {"small": 2 * EVERY, "large": EVERY}  # of one half of a pair
ROWS, LENGTH = 16, 65  # of a micro-batch: the quickstart's on one of its two ranks
GOAL, WATCH_GOAL = 1.02, 0.001
WATCHED_STEPS = 60
WATCH_METHODS = ("trained", "advance", "collected", "compare", "published")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=int, default=40, metavar="N", help="pairs of turns, with and without")
    parser.add_argument(
        "--models", nargs="+", choices=sorted(MODELS), default=sorted(MODELS, reverse=True), help="sizes of the model"
    )
    parser.add_argument("--fp32", action="store_true", help="float32 in the place of bf16")


def run(args: argparse.Namespace, console: Console) -> Record:
    prepare_process()
    record = Record("collect")
    record.notes.append("ratio: CPU seconds with collecting / without, median of the pairs with its 95 % interval; one thread")
    record.rows["pairs"], record.rows["by model"] = [], []
    for name in args.models:
        pairs, facts = measure(name, args.pairs, not args.fp32)
        median, low, high = median_interval([with_ / without for with_, without in pairs])
        console.print(f"  {name}: {median:.3f} [{low:.3f}, {high:.3f}], {len(pairs)} pairs")
        record.rows["pairs"] += [{"model": name, "with": a, "without": b} for a, b in pairs]
        record.rows["by model"].append({"model": name, "ratio": median, "low": low, "high": high, **facts})
        record.claims.append(Claim(f"collect_ratio_{name}", high, "CPU s with / without, upper 95 % bound", GOAL))
        share = watched(name, not args.fp32)
        record.claims.append(Claim(f"watch_share_{name}", share, "of a step's CPU s, what is watched of it", WATCH_GOAL))
        ratios = watch_ratios(name, args.pairs, not args.fp32)
        median, low, high = median_interval(ratios)
        console.print(f"  {name}, watched / not: {median:.4f} [{low:.4f}, {high:.4f}]")
        record.rows["by model"][-1] |= {"watch_ratio": median, "watch_low": low, "watch_high": high}
        unit = "CPU s watched / not, lower 95 % bound: at most 1 where pairs of runs see no cost"
        record.claims.append(Claim(f"watch_ratio_{name}", low, unit, 1.0))
    record.hidden.append("pairs")
    return record


def prepare_process() -> None:
    """One rank on one thread, nothing compiled: spinning threads would be counted as work."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def measure(name: str, count: int, bf16: bool) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    """(CPU seconds with, without) of each pair, and what is counted rather than timed."""
    with_us, plain = Job(name, bf16, grace=True), Job(name, bf16, grace=False)
    for job in (with_us, plain):
        job.steps(12)  # the first collected step sets the layers' scale, the refresh after it fits the basis
    with_us.no_more_refreshes()
    pairs = interleaved(with_us, plain, STEPS[name], count, seed=0)
    facts = {"parameters": sum(p.numel() for p in plain.engine.module.parameters())} | with_us.counts(plain)
    for job in (with_us, plain):
        job.close()
    return pairs, facts


def watched(name: str, bf16: bool) -> float:
    """Share of a training step's CPU seconds that the watch over steps takes, its refreshes' comparison included."""
    job = Job(name, bf16, grace=True, mode="train")
    job.steps(12)
    controller, spent = job.engine.grace_ds.controller, [0.0]
    for owner, method in ((controller.watch, m) for m in WATCH_METHODS):
        setattr(owner, method, _timed(getattr(owner, method), spent))
    controller.follow = _timed(controller.follow, spent)
    total = job.steps(WATCHED_STEPS)
    job.close()
    return spent[0] / total


def watch_ratios(name: str, count: int, bf16: bool) -> list[float]:
    """CPU seconds of the same job with the watch over steps and without it, in interleaved pairs."""
    watched, blind = Job(name, bf16, grace=True, mode="train"), Job(name, bf16, grace=True, mode="train")
    for method in WATCH_METHODS:
        setattr(blind.engine.grace_ds.controller.watch, method, _nothing)
    blind.engine.grace_ds.controller.follow = _nothing
    for job in (watched, blind):
        job.steps(12)
        job.no_more_refreshes()
    pairs = interleaved(watched, blind, STEPS[name], count, seed=1)
    for job in (watched, blind):
        job.close()
    return [a / b for a, b in pairs]


def interleaved(a: Job, b: Job, steps: int, count: int, seed: int) -> list[tuple[float, float]]:
    """CPU seconds of ``count`` turns of ``a`` and of ``b``, so many steps each; which goes first is drawn for each pair."""
    rng, pairs = np.random.default_rng(seed), []
    for _ in range(count):
        seconds = {id(job): job.steps(steps) for job in ((a, b) if rng.random() < 0.5 else (b, a))}
        pairs.append((seconds[id(a)], seconds[id(b)]))
    return pairs


def _nothing(*args: Any, **kwargs: Any) -> int:
    return 0


def _timed(call: Any, spent: list[float]) -> Any:
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.thread_time()
        try:
            return call(*args, **kwargs)
        finally:
            spent[0] += time.thread_time() - started

    return timed


class Job:
    """One engine and its batches."""

    def __init__(self, name: str, bf16: bool, grace: bool, mode: str = "shadow") -> None:
        import deepspeed

        import grace_ds

        torch.manual_seed(0)
        model = GPT(MODELS[name])
        data = _Tokens(4096, MODELS[name].vocab)
        config: dict[str, Any] = {
            "train_batch_size": ROWS,
            "zero_optimization": {"stage": 2 if bf16 else 0},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "steps_per_print": 10**9,
        }
        if bf16:
            config["bf16"] = {"enabled": True}
        block = {
            "recipe": "grace",
            "mode": mode,
            "refresh": {"interval_steps": EVERY * LEAST_COLLECTED, "cadence": "fixed"},
            "guard": {"enabled": False},  # random tokens are clean text to it, and clean text is not collected
        }
        more: dict[str, Any] = {}
        if grace:
            config["data_efficiency"] = {"enabled": True, "data_sampling": {"enabled": True, "grace": block}}
            more["trusted_data"] = _Tokens(128, MODELS[name].vocab, seed=9)
        start = grace_ds.initialize if grace else deepspeed.initialize
        self.engine, *_ = start(model=model, model_parameters=model.parameters(), training_data=data, config=config, **more)
        # No workers: their processes would take CPU seconds that nobody counts.
        handle = getattr(self.engine, "grace_ds", None)
        self.loader = (
            handle.deepspeed_loader(num_local_io_workers=0) if handle else self.engine.deepspeed_io(data, num_local_io_workers=0)
        )
        self.batches = self._forever()

    def _forever(self) -> Iterator[Any]:
        while True:
            yield from self.loader

    def steps(self, count: int) -> float:
        """Trains for ``count`` steps; returns the CPU seconds of this process."""
        started = time.process_time()
        for _ in range(count):
            loss = self.engine(next(self.batches)["input_ids"])
            self.engine.backward(loss)
            self.engine.step()
        return time.process_time() - started

    def no_more_refreshes(self) -> None:
        controller = self.engine.grace_ds.controller
        assert controller.metrics.refresh_failures == 0
        # Random tokens give no basis that is worth its while; what is measured is the cost of one.
        basis = controller.influence_probe.fit(controller.metrics.version, np.arange(256)).basis
        controller.take_basis(basis)
        controller.reference = {basis.version: 1.0}
        controller.next_refresh = 10**9
        controller.collector.sketcher.reset_peak()
        assert collect_every(controller.config, controller.book) == EVERY

    def counts(self, plain: Job) -> dict[str, Any]:
        """FLOPs of as many steps as hold one that is collected, and bytes, counted."""
        flops = []
        for job in (self, plain):
            with FlopCounterMode(display=False) as counter:
                job.steps(EVERY)
            flops.append(counter.get_total_flops())
        collector = self.engine.grace_ds.controller.collector
        columns = vars(SampleRecords.empty(collector.sketcher.dim)).values()
        return {
            "layers": len(collector.sketcher.layers),
            "added_flops_share": flops[0] / flops[1] - 1,
            "hook_peak_bytes": collector.sketcher.peak_bytes,
            "row_bytes": sum(column.dtype.itemsize * math.prod(column.shape[1:]) for column in columns),
        }

    def close(self) -> None:
        if getattr(self.engine, "grace_ds", None) is not None:
            self.engine.grace_ds.detach()
        self.engine.destroy()


class _Tokens(Dataset[dict[str, torch.Tensor]]):
    """Random rows: what a step costs does not depend on what it reads."""

    def __init__(self, n: int, vocab: int, seed: int = 0) -> None:
        self.rows = torch.randint(0, vocab, (n, LENGTH), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[i]}
