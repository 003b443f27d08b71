"""Arms × seeds, run and put together."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from grace_ds_quickstart.launch import environment, free_port
from rich.console import Console

from benchmarks.finetune.arms import ARMS
from benchmarks.finetune.model import prepare_model
from benchmarks.interrupts import deferred_interrupts
from benchmarks.record import Claim, Record, SampleRecords
from grace_ds.utils.processes import end_group

ROOT = Path(__file__).resolve().parents[2]
POOLS = ("natural", "polluted")
SOURCES = ("arms.py", "problems.py", "model.py", "job.py")
TAIL = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FILE", help="GSM8K's train.jsonl")
    add("--test", type=Path, metavar="FILE", help="its test.jsonl; default: beside --data")
    add("--pool", choices=POOLS, default="natural", help="polluted: 30 %% near-duplicates and 20 %% shuffled words")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    add("--seeds", type=int, default=2)
    add("--steps", type=int, default=30, help="optimizer steps of every arm")
    add("--batch", type=int, default=4)
    add("--lr", type=float, default=1e-3)
    add("--budget", type=float, default=0.15, help="share of the pool that a subset holds")
    add("--pool-size", type=int, default=320)
    add("--trusted", type=int, default=96, help="problems of the training file that are in no pool")
    add("--test-size", type=int, default=64, help="test problems whose loss is measured: the file's first that fit")
    add("--generate", type=int, default=20, help="of those, the first so many are answered")
    add("--new-tokens", type=int, default=80, help="tokens of an answer at most")
    add("--max-tokens", type=int, default=112, help="longer problems are left out everywhere")
    add("--jobs", type=int, default=2, help="processes at once, each on one thread")
    add("--limit", type=float, default=3600.0, help="seconds of one run, at most")
    add("--out", type=Path, default=Path("runs/benchmarks/finetune"), help="where the model and the runs are kept")


def run(args: argparse.Namespace, console: Console) -> Record:
    say = functools.partial(console.print, highlight=False, markup=False)
    args.test = args.test or args.data.with_name("test.jsonl")
    for path in (args.data, args.test):
        if not path.is_file():
            raise SystemExit(f"{path} does not exist: --data takes GSM8K's train.jsonl, --test its test.jsonl")
    model = prepare_model((args.out / "smollm2").resolve())
    specs = [spec_of(args, arm, seed, model) for seed in range(args.seeds) for arm in args.arms if arm != "none" or not seed]
    results = run_all(specs, args.out / "runs", args.jobs, args.limit, say)
    return record_of(args, results)


def spec_of(args: argparse.Namespace, arm: str, seed: int, model: Path) -> dict[str, Any]:
    """Everything that a run's result depends on, and where its files are."""
    keys = ["pool", "steps", "batch", "lr", "budget", "pool_size", "trusted", "test_size", "generate", "new_tokens", "max_tokens"]
    code = hashlib.blake2b(digest_size=8)
    for name in SOURCES:
        code.update(Path(__file__).with_name(name).read_bytes())
    return {
        **{key: getattr(args, key) for key in keys},
        "arm": arm,
        "seed": seed,
        "data": str(args.data.resolve()),
        "test": str(args.test.resolve()),
        "digest": hashlib.blake2b(args.data.read_bytes() + args.test.read_bytes(), digest_size=8).hexdigest(),
        "model_folder": str(model),
        "code": code.hexdigest(),
        "versions": " ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers", "accelerate", "peft")),
    }


_PLACES = ("data", "test", "model_folder")  # say where, not what


def finished(spec: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """The result of a run with the same settings; None where there is none."""
    try:
        result: dict[str, Any] = json.loads(path.read_text("utf-8"))
        same = all(result["settings"][key] == value for key, value in spec.items() if key not in _PLACES)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result if same else None


def run_all(specs: list[dict[str, Any]], folder: Path, jobs: int, limit: float, say: Any) -> list[dict[str, Any]]:
    """The results of ``specs`` in their order; runs those that are not there yet, a process each.

    Raises:
        SystemExit: some run failed; the others were run to their end first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{spec['pool']}-{spec['arm']}-n{spec['steps']}-s{spec['seed']}.json" for spec in specs]
    todo = [(spec, path) for spec, path in zip(specs, paths, strict=True) if finished(spec, path) is None]
    say(f"{len(specs) - len(todo)} runs are there already, {len(todo)} to do")
    running: list[tuple[subprocess.Popen[bytes], Path, float]] = []
    failed: list[str] = []
    try:
        while todo or running:
            while todo and len(running) < jobs:
                with deferred_interrupts():
                    running.append((*_start(*todo.pop(0)), time.monotonic() + limit))
            time.sleep(0.2)
            for child, path, deadline in [r for r in running if r[0].poll() is not None or time.monotonic() > r[2]]:
                running.remove((child, path, deadline))
                code = child.poll()
                end_group(child.pid, signal.SIGTERM, 5.0)
                child.wait()
                tail = path.with_suffix(".log").read_text("utf-8", "replace").splitlines()[-TAIL:]
                say(f"  {path.stem}: " + (tail[-1] if code == 0 and tail else f"failed ({code})"))
                if code != 0:
                    why = f"exit status {code}" if code is not None else f"not done after {limit:.0f} s (--limit)"
                    failed.append("\n".join([f"{path.stem}: {why}", *tail]))
    finally:
        for child, _, _ in running:
            end_group(child.pid, signal.SIGTERM, 5.0)
            child.wait()
    if failed:
        raise SystemExit("\n\n".join([f"{len(failed)} run(s) failed", *failed]))
    return [json.loads(path.read_text("utf-8")) for path in paths]


def _start(spec: dict[str, Any], path: Path) -> tuple[subprocess.Popen[bytes], Path]:
    asked = path.with_suffix(".spec.json")
    asked.write_text(json.dumps(spec, indent=1))
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env = {**environment(path.parent / "extensions"), **place, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH", "")]))
    with path.with_suffix(".log").open("wb") as out:
        command = [sys.executable, "-m", "benchmarks.finetune.job", str(asked), str(path)]
        child = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    return child, path


def record_of(args: argparse.Namespace, results: list[dict[str, Any]]) -> Record:
    """The table by arm, and what GRACE's arms came to against the random subsets."""
    record = Record("finetune")
    by_arm = {arm: [r for r in results if r["settings"]["arm"] == arm] for arm in args.arms}
    record.rows["arms"] = [row_of(arm, found) for arm, found in by_arm.items() if found]
    record.rows["runs"] = [_run_row(r) for r in results]
    for ours in ("content", "grace"):
        for theirs in ("uniform", "rs2", "full"):
            if by_arm.get(ours) and by_arm.get(theirs):
                gap = differences(by_arm[ours], by_arm[theirs])
                spread = (
                    f"mean of {len(gap)} seeds, standard error {np.std(gap, ddof=1) / len(gap) ** 0.5:.3f}"
                    if len(gap) > 1
                    else "one seed"
                )
                unit = f"nats/answer token, {spread}"
                record.claims.append(Claim(f"{args.pool}_{ours}_minus_{theirs}", float(np.mean(gap)), unit, None))
    cpu, wall = _total(results, "train_cpu_s", "judging_cpu_s"), _total(results, "train_wall_s")
    drawn = args.steps * args.batch
    subset = round(args.budget * args.pool_size)
    record.notes += [
        f"{args.pool} pool of {args.pool_size} problems, {args.trusted} trusted, all of at most {args.max_tokens} tokens; "
        f"{args.steps} steps of {args.batch} are {drawn} samples: {drawn / subset:.1f} times a subset of {subset}, "
        f"{drawn / args.pool_size:.1f} times the pool",
        f"one seed's exact match has a standard error of about {100 * (0.05 * 0.95 / args.generate) ** 0.5:.0f} points at 5 %",
        "CPU seconds are those of the training process, choosing included; refresh and collect are wall seconds of it",
        f"all runs: {cpu:.0f} CPU s; training took {wall:.0f} s of wall time, {args.jobs} runs at once beside other work",
        f"{results[0]['settings'].get('versions', '')}; one thread, bfloat16",
        "none: the model as it comes; the guard is off in content and grace; rs2 is the system's own (recipe uniform)",
    ]
    return record


def _total(results: SampleRecords, *keys: str) -> float:
    return float(sum(r.get(key, 0.0) for r in results for key in keys))


def differences(ours: SampleRecords, theirs: SampleRecords) -> list[float]:
    """Of the losses, seed by seed."""
    other = {r["settings"]["seed"]: r["nll"] for r in theirs}
    return [r["nll"] - other[r["settings"]["seed"]] for r in ours if r["settings"]["seed"] in other]


def row_of(arm: str, found: SampleRecords) -> dict[str, Any]:
    """An arm's figures over its seeds."""
    losses = [r["nll"] for r in found]
    right, asked = sum(r["right"] for r in found), sum(r["asked"] for r in found)

    def mean(key: str) -> float | None:
        values = [r[key] for r in found if key in r]
        return float(np.mean(values)) if values else None

    return {
        "arm": arm,
        "seeds": len(found),
        "answer NLL": float(np.mean(losses)),
        "± s.e.": float(np.std(losses, ddof=1) / len(losses) ** 0.5) if len(losses) > 1 else None,
        "right": f"{right} of {asked}",
        "training CPU s": mean("train_cpu_s"),
        "refresh s": mean("refresh_seconds"),
        "collect s": mean("collect_seconds"),
        "probed samples": mean("probe_samples"),
    }


def _run_row(r: dict[str, Any]) -> dict[str, Any]:
    keys = ("nll", "right", "asked", "train_cpu_s", "train_wall_s", "refresh_seconds", "collect_seconds", "refreshes")
    return {"arm": r["settings"]["arm"], "seed": r["settings"]["seed"], **{key: r.get(key) for key in keys}}
