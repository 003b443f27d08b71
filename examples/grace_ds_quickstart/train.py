"""An ordinary DeepSpeed ZeRO job; GRACE is the block ``grace`` in its config and ``grace_ds.initialize`` in ``main``.

Run by ``deepspeed --num_accelerators 2 --module grace_ds_quickstart.train --data DIR --out DIR --grace``, or by ``deepspeed
--launcher openmpi …`` or ``mpirun -n 2 python -m …`` with ``--comm mpi``: then what GRACE collects travels over MPI.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.utils.data import Dataset, DistributedSampler

import grace_ds
from grace_ds.utils.files import write_atomic
from grace_ds_quickstart.model import GPT, GPTConfig

MPI_NAMES = {"RANK": "RANK", "WORLD_SIZE": "SIZE", "LOCAL_RANK": "LOCAL_RANK"}  # torch's, and Open MPI's behind OMPI_COMM_WORLD_


class Sequences(Dataset[dict[str, torch.Tensor]]):
    """Rows of a .npy file of token ids, (n, length)."""

    def __init__(self, path: Path) -> None:
        self.rows = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.from_numpy(self.rows[index].astype(np.int64))}


def ds_config(args: argparse.Namespace, samples: int, comm: str = "auto") -> dict[str, Any]:
    """The job's DeepSpeed config for a pool of ``samples`` sequences; ``comm`` is the transport that GRACE is to use."""
    return {
        "train_batch_size": args.batch,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": args.zero},
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        # torch's AdamW: DeepSpeed's own would compile a C++ extension first.
        "optimizer": {"type": "AdamW", "params": {"lr": args.lr, "weight_decay": 0.1, "torch_adam": True}},
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": args.steps,
                "warmup_num_steps": max(1, args.steps // 10),
                "warmup_type": "linear",
                "cos_min_ratio": 0.1,
            },
        },
        "dataloader_drop_last": True,
        "steps_per_print": 10**9,
        "data_efficiency": {
            "enabled": True,
            "data_sampling": {
                "enabled": True,
                "grace": {
                    "enabled": args.grace,
                    "comm": comm,
                    # A fifth of the pool; more where so many steps would repeat each sample more than four times.
                    "budget": min(1.0, max(0.2, args.steps * args.batch / (4 * samples))),
                    "seed": args.order_seed,
                    "total_steps": args.steps,
                    "refresh": {"interval_steps": max(1, args.steps // 5), "cadence": "fixed"},
                    "trusted": str(args.data / "trusted.npy"),
                    "run_dir": str(args.out / "grace"),
                },
            },
        },
    }


def epochs(loader: Any, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches without end, in another order each epoch."""
    for epoch in count():
        # DeepSpeed's own loader neither seeds its sampler nor tells it the epoch: the order would always be the same.
        sampler = getattr(loader, "data_sampler", None)
        if isinstance(sampler, DistributedSampler):
            sampler.seed = seed
            sampler.set_epoch(epoch)
        yield from loader


@torch.no_grad()
def validate(engine: Any, path: Path, batch: int) -> float:
    """Mean loss over the validation rows, nats per token; the same number on every rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = np.load(path)[rank::world].astype(np.int64)
    engine.eval()
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        loss = engine(torch.from_numpy(part).to(engine.device))
        total += torch.tensor([loss.item() * len(part), len(part)], dtype=torch.float64, device=engine.device)
    engine.train()
    dist.all_reduce(total)
    return float(total[0] / total[1])


def join_mpi_world() -> None:
    """Give torch the rank and size that ``mpirun`` has given this process, if the launch says where the ranks meet.

    DeepSpeed would find them too, but asks ``hostname -I`` for the address and takes a fixed port.
    """
    found = {name: os.environ.get(f"OMPI_COMM_WORLD_{mpi}", "") for name, mpi in MPI_NAMES.items()}
    if all(found.values()) and "RANK" not in os.environ and {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        os.environ.update(found)


def main() -> None:
    """Train for ``--steps`` optimizer steps; rank 0 writes ``result.json`` into ``--out``."""
    args = parse()
    if get_accelerator().device_name() == "cpu":
        # DeepSpeed would compile shared-memory collectives for a minute, or wait for ever on a stale lock of that.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    join_mpi_world()
    deepspeed.init_distributed()
    manifest = json.loads((args.data / "manifest.json").read_text("utf-8"))
    dataset = Sequences(args.data / "train.npy")

    torch.manual_seed(args.seed)
    model = GPT(GPTConfig(vocab=manifest["vocab"], context=dataset.rows.shape[1] - 1))
    parameters = sum(p.numel() for p in model.parameters())
    start = time.perf_counter()
    engine, _, loader, _ = grace_ds.initialize(
        model=model,
        model_parameters=model.parameters(),
        training_data=dataset,
        config=ds_config(args, len(dataset), args.comm),
    )

    curve: list[dict[str, float]] = []
    training = time.perf_counter() - start
    batches = epochs(loader, args.order_seed)
    for step in range(1, args.steps + 1):
        start = time.perf_counter()
        loss = engine(next(batches)["input_ids"].to(engine.device))
        engine.backward(loss)
        engine.step()
        training += time.perf_counter() - start
        if step % args.log_every == 0 or step == args.steps:
            report(f"step {step}/{args.steps} loss {loss.item():.4f} lr {engine.get_lr()[0]:.2e}")
        if step % args.eval_every == 0 or step == args.steps:
            value = validate(engine, args.data / "validation.npy", batch=64)
            curve.append({"step": step, "val_loss": value, "train_loss": loss.item(), "seconds": training})
            report(f"step {step}/{args.steps} val_loss {value:.4f}")
    if dist.get_rank() == 0:
        found = {"parameters": parameters, "train_seconds": training, **result(args, engine, curve)}
        write_atomic(args.out / "result.json", json.dumps(found, indent=1).encode())
    dist.barrier()
    dist.destroy_process_group()


def result(args: argparse.Namespace, engine: Any, curve: list[dict[str, float]]) -> dict[str, Any]:
    """What this run found, for ``summary``; times are seconds of rank 0, validation not counted."""
    grace = getattr(engine, "grace_ds", None)
    return {
        "val_loss": curve[-1]["val_loss"],
        "steps": args.steps,
        "seed": args.seed,
        "ranks": dist.get_world_size(),
        "zero_stage": args.zero,
        "batch": args.batch,
        "curve": curve,
        "grace": _told(grace.metrics) if grace is not None else None,
    }


def _told(metrics: dict[str, Any]) -> dict[str, Any]:
    """The totals of the run, and what the hooks held at most up to the last refresh."""
    totals = {key: value for key, value in metrics.items() if _plain(value)}
    return {**totals, "collect_peak_bytes": metrics["events"].get("collect_peak_bytes", 0.0)}


def _plain(value: Any) -> bool:
    return isinstance(value, (int, float, str)) or (isinstance(value, list) and all(map(_plain, value)))


def report(line: str) -> None:
    """One line on the screen, from rank 0."""
    if dist.get_rank() == 0:
        sys.stdout.write(line + "\n")  # in one piece: mpirun may put another rank's line between two
        sys.stdout.flush()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train, trusted and validation .npy")
    parser.add_argument("--out", type=Path, required=True, help="folder for result.json")
    parser.add_argument("--grace", action="store_true", help="the flag: train on a live coreset")
    parser.add_argument("--comm", default="auto", choices=("auto", "mpi", "torch"), help="transport of what GRACE collects")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32, help="global batch, over all ranks")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--order-seed", type=int, help="of the order of the samples alone; default: --seed")
    parser.add_argument("--zero", type=int, default=2, choices=(0, 1, 2, 3))
    parser.add_argument("--eval-every", type=int, default=50)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    args = parser.parse_args()
    args.order_seed = args.seed if args.order_seed is None else args.order_seed
    args.out.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    main()
