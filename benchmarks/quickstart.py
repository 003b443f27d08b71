"""The quickstart over seeds and pools: GRACE against uniform at equal steps, beside uniform against uniform.

A seed sets the weights and the order of the samples; all seeds of a pool train on the same pool. The second uniform run of a
seed differs from the first in the order alone: the spread that nothing but luck makes. Every run is a launch of its own
(``python -m grace_ds_quickstart``); one that was finished before with the same settings is taken from --runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from grace_ds_quickstart.corpus import FORMAT, POOLS
from grace_ds_quickstart.launch import LAUNCHERS
from rich.console import Console

from benchmarks.record import Claim, Record

ORDER = 1000  # added to the seed for the order of the second uniform run
LEAST = 0.005  # nats: differences below this count as none


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pools", nargs="+", choices=POOLS, default=list(POOLS), help="which pools")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="number of seeds: 0, 1, …")
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="optimizer steps of a run")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="auto", help="as for the quickstart")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmarks/quickstart"), help="where the runs are kept")


def run(args: argparse.Namespace, console: Console) -> Record:
    record = Record("quickstart", rows={"runs": [], "by pool": []})
    for pool in args.pools:
        rows = [one_seed(args, pool, seed, console) for seed in range(args.seeds)]
        record.rows["runs"] += rows
        record.rows["by pool"].append(summary(pool, rows))
        deltas = [r["delta"] for r in rows]
        if pool == "crawl":
            record.claims.append(Claim("quickstart_crawl_delta_max", max(deltas), "nats/token, GRACE minus uniform", -1e-9))
        else:
            goal = max(LEAST, standard_error(deltas))
            record.claims.append(
                Claim("quickstart_natural_delta_mean", float(np.mean(deltas)), "nats/token, GRACE minus uniform", goal)
            )
    record.notes += [
        "delta: validation loss of GRACE minus uniform of the same seed, after the last step; below zero GRACE is better",
        "luck: uniform minus uniform in another order, same weights",
        "choosing: collecting gradients (collect) and refreshes, share of GRACE's training time; slower: GRACE's training time / "
        "uniform's",
        "time to equal loss: GRACE's seconds, all cost in, until it reaches uniform's final loss / uniform's seconds; inf: never",
    ]
    record.hidden.append("runs")
    return record


def one_seed(args: argparse.Namespace, pool: str, seed: int, console: Console) -> dict[str, Any]:
    """Both arms, and the second uniform run."""
    both = launch(args, pool, seed, seed, "uniform,grace", console)
    other = launch(args, pool, seed, seed + ORDER, "uniform", console)
    uniform, grace = both["uniform"], both["grace"]
    console.print(f"  {pool} seed {seed}: uniform {uniform['val_loss']:.4f}, delta {both['delta']:+.4f}")
    return {
        "pool": pool,
        "seed": seed,
        "uniform": uniform["val_loss"],
        "grace": grace["val_loss"],
        "delta": both["delta"],
        "luck": other["uniform"]["val_loss"] - uniform["val_loss"],
        "launcher": both["launcher"],
        "transport": grace["transport"],
        "sources": both["sources"],
        "choosing_share": grace["choosing_share"],
        "collect_overhead": grace["collect_overhead"],
        "refresh_overhead": grace["refresh_overhead"],
        "slower": grace["train_seconds"] / uniform["train_seconds"],
        "time_to_equal_loss": equal_loss_seconds(grace["curve"], uniform["val_loss"]) / uniform["train_seconds"],
        "curves": {"uniform": uniform["curve"], "grace": grace["curve"]},
        "versions": both["versions"],
    }


def launch(args: argparse.Namespace, pool: str, seed: int, order: int, arms: str, console: Console) -> dict[str, Any]:
    """The summary of one quickstart; runs it unless it is there with the same settings."""
    out = args.runs / f"{pool}-{seed}-{order}"
    options = ["--pool", pool, "--steps", str(args.steps), "--seed", str(seed), "--order-seed", str(order), "--arms", arms]
    options += ["--launcher", args.launcher]
    stamp, done, settings = out / "options.json", out / "summary.json", {"options": options, "data": FORMAT}
    if not (done.exists() and stamp.exists() and json.loads(stamp.read_text()) == settings):
        stamp.unlink(missing_ok=True)
        command = [sys.executable, "-m", "grace_ds_quickstart", "--out", str(out), *options]
        ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if ended.returncode:
            console.print(ended.stdout, markup=False, highlight=False)
            raise SystemExit(f"{' '.join(command)} ended with {ended.returncode}")
        stamp.write_text(json.dumps(settings))
    result: dict[str, Any] = json.loads(done.read_text())
    return result


def equal_loss_seconds(curve: list[dict[str, float]], loss: float) -> float:
    """Seconds at which ``curve`` first reaches ``loss``, straight between its points; infinity if it never does."""
    for before, after in itertools.pairwise(curve):
        if after["val_loss"] <= loss:
            share = (before["val_loss"] - loss) / (before["val_loss"] - after["val_loss"])
            return before["seconds"] + min(max(share, 0.0), 1.0) * (after["seconds"] - before["seconds"])
    return float("inf")


def standard_error(values: list[float]) -> float:
    """Of the mean; 0 for a single value, which tells nothing about it."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def summary(pool: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    deltas, luck = [r["delta"] for r in rows], [r["luck"] for r in rows]
    return {
        "pool": pool,
        "seeds": len(rows),
        "uniform": float(np.mean([r["uniform"] for r in rows])),
        "delta mean": float(np.mean(deltas)),
        "± s.e.": standard_error(deltas),
        "worst": max(deltas),
        "luck, r.m.s.": float(np.sqrt(np.mean(np.square(luck)))),
        "choosing": float(np.median([r["choosing_share"] for r in rows])),
        "collect": float(np.median([r["collect_overhead"] for r in rows])),
        "refresh": float(np.median([r["refresh_overhead"] for r in rows])),
        "slower": float(np.median([r["slower"] for r in rows])),
        "time to equal loss": float(np.median([r["time_to_equal_loss"] for r in rows])),
    }
