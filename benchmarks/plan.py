"""``grace-ds plan --calibrate`` against real jobs: memory that GRACE adds to a rank, seconds of its refreshes, and of collecting.

For each job a step and the dataset are timed as they are without GRACE, then the plan is made, with these two and calibrated on
as many ranks as the job has, and only then does the job run with GRACE. Memory: of the process beyond what it held before GRACE
was attached (after some training steps, the allocator's cache given back), at the peak of the refresh's stages. The trusted probe
runs the model like a training step, before those stages; its peak is noted beside that of the job's own steps. Each rank has one
thread. Seconds are wall seconds, and follow whatever else the machine does; the plan measures how busy it is, at its own time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from grace_ds_quickstart.corpus import CorpusSpec, prepare
from grace_ds_quickstart.launch import deepspeed_command, environment, free_port
from rich.console import Console

from benchmarks.record import Claim, Record

MIB = 2**20
VOCAB = 2048
# Refreshes of recipe grace come after half an interval and a whole one, then after every interval.
JOBS: dict[str, dict[str, Any]] = {
    "content": {"ranks": 2, "rows": 20_000, "tokens": 65, "recipe": "content"},
    "content, long rows": {"ranks": 1, "rows": 6_000, "tokens": 513, "batch": 8, "recipe": "content", "window": 6_000},
    "grace": {"ranks": 1, "rows": 20_000, "tokens": 65, "recipe": "grace", "window": 20_000},
    "grace, clusters": {"ranks": 2, "rows": 50_000, "tokens": 65, "recipe": "grace", "window": 50_000},
}
DEFAULTS = {"batch": 32, "width": 96, "layers": 4, "interval": 20, "refreshes": 3}
MEMORY_GOAL, SECONDS_GOAL = 0.15, 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--rows", type=int, default=0, help="rows of every job, in the place of its own")
    parser.add_argument("--data", type=Path, default=Path("runs/benchmarks/plan-data"), help="where the pool is kept")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/benchmarks/plan"),
        help="where the jobs' logs and figures are kept; finished ones are not run again",
    )


def run(args: argparse.Namespace, console: Console) -> Record:
    jobs = {name: {**DEFAULTS, **JOBS[name]} for name in args.jobs}
    for job in jobs.values():
        job["rows"] = args.rows or job["rows"]
        job["window"] = args.rows or job.get("window", 0) if "window" in job else 0
    prepare(CorpusSpec(pool_size=max(args.rows, max(job["rows"] for job in jobs.values()))), args.data)
    record = Record("plan", rows={"jobs": [], "refreshes": []})
    for name, job in jobs.items():
        row, refreshes = kept(name, job, args)
        record.rows["jobs"].append(row)
        record.rows["refreshes"] += refreshes
        console.print(f"  {name}: {row}")
    rows = record.rows["jobs"]
    worst = max(abs(r["memory error"]) for r in rows)
    record.claims.append(Claim("plan_memory_error", worst, "|planned - measured| / measured, the worst job", MEMORY_GOAL))
    factor = max(max(r["refreshes ratio"], 1 / r["refreshes ratio"]) for r in rows)
    record.claims.append(
        Claim("plan_seconds_factor", factor, "planned / measured or its inverse, all refreshes, worst", SECONDS_GOAL)
    )
    cpu = max(max(r["CPU ratio"], 1 / r["CPU ratio"]) for r in rows)
    record.claims.append(Claim("plan_cpu_factor", cpu, "the same in CPU seconds of rank 0, worst", SECONDS_GOAL))
    record.notes += [
        "memory: MiB beyond what the process held before GRACE, at the peak of a refresh's stages, the worst rank",
        "CPU ratio: the planned seconds without the others' share (busy), over the CPU seconds of the refreshes of rank 0",
        "refreshes: seconds of all of them, rank 0; first and later: one each, the later ones' mean",
        "probe, step: MiB at the peak of the trusted probe, and of the job's own steps, beyond what is held between steps",
        "busy: wall seconds over CPU seconds while the plan was made; a step's seconds then and with GRACE say how that went on",
    ]
    record.hidden.append("refreshes")
    return record


def kept(name: str, job: dict[str, Any], args: argparse.Namespace) -> tuple[dict[str, Any], list[Any]]:
    """The figures of :func:`one_job`; of one that was finished before with the same settings, those."""
    folder = args.out / name.replace(", ", "-").replace(" ", "-")
    done = folder / "done.json"
    if done.exists() and (found := json.loads(done.read_text()))["job"] == job:
        return found["row"], found["refreshes"]
    row, refreshes = one_job(name, job, args, folder)
    done.write_text(json.dumps({"job": job, "row": row, "refreshes": refreshes}))
    return row, refreshes


def one_job(name: str, job: dict[str, Any], args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """Times the step, makes the plan, runs the job; the figures of both, and the refreshes of every rank."""
    bare = launch({**job, "refreshes": -1}, args, folder / "bare")[0]
    step = median(bare["bare_step_seconds"])
    planned = plan(job, step, median(bare["item_seconds"]))
    ranks = launch(job, args, folder / "run")
    first, *later = (r["seconds"] for r in ranks[0]["refreshes"])
    total = planned["first_seconds"] + len(later) * planned["mean_seconds"]
    cpu = sum(r["cpu"] for r in ranks[0]["refreshes"])
    busy = planned["sizes"]["rates"]["busy"]
    peak = max(r["peak"] for rank in ranks for r in rank["refreshes"]) / MIB
    steps = len(ranks[0]["step_seconds"])
    row = {
        "job": name,
        "ranks": job["ranks"],
        "rows": job["rows"],
        "memory planned": planned["peak_bytes"] / MIB,
        "memory": peak,
        "memory error": planned["peak_bytes"] / MIB / peak - 1,
        "refreshes planned": total,
        "refreshes": first + sum(later),
        "refreshes ratio": total / (first + sum(later)),
        "CPU ratio": total / busy / cpu,
        "first planned": planned["first_seconds"],
        "first": first,
        "later planned": planned["mean_seconds"],
        "later": sum(later) / len(later),
        "collect planned": planned["collect_seconds"],
        "collect": ranks[0]["collect_seconds"] / steps,
        "hooks planned": planned["collect_bytes"] / MIB,
        "hooks": ranks[0]["collect_peak_bytes"] / MIB,
        "probe": max(r["probe"] - r["start"] for rank in ranks for r in rank["refreshes"][1:]) / MIB,
        "step": max(rank["step_peak_bytes"] for rank in ranks) / MIB,
        "step seconds": step,
        "with GRACE": median(ranks[0]["step_seconds"]),
        "busy": busy,
    }
    refreshes = [{"job": name, "rank": i, **r} for i, rank in enumerate(ranks) for r in rank["refreshes"]]
    keys = list(dict.fromkeys(key for r in refreshes for key in r))
    return row, [{key: r.get(key, 0.0) for key in keys} for r in refreshes]


def plan(job: dict[str, Any], step: float, item: float) -> dict[str, Any]:
    """What ``grace-ds plan`` says of the job, calibrated on as many ranks."""
    keys = ("ranks", "batch", "interval", "tokens", "layers")
    words = [word for key in keys for word in (f"--{key}", str(job[key]))]
    words += ["--samples", str(job["rows"]), "--hidden", str(job["width"]), "--vocab", str(VOCAB)]
    words += ["--steps", str(steps_of(job)), "--step-seconds", str(step), "--item-seconds", str(item), "--calibrate", "--json"]
    words += ["--set", f"recipe={job['recipe']}", f"window={job['window']}", "max_repeats=1e6"]
    command = [sys.executable, "-m", "grace_ds.cli.main", "plan", *words]
    if job["ranks"] > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(job["ranks"]), "--master-port", str(free_port())]
        command = [sys.executable, *launcher, *command[1:]]
    env = environment(Path("runs/benchmarks/plan-extensions").absolute())
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env, timeout=300).stdout
    found: dict[str, Any] = json.loads(said[said.index("{\n") : said.rindex("}") + 1])
    return found


def steps_of(job: dict[str, Any]) -> int:
    """So many that the last of the refreshes after the first one falls into the run."""
    return int(job["interval"] * job["refreshes"] + 2)


def launch(job: dict[str, Any], args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Runs it, as often as there are ``refreshes`` after the first (-1: without GRACE); the figures of every rank."""
    folder.mkdir(parents=True, exist_ok=True)
    block = {
        "recipe": job["recipe"],
        "window": job["window"],
        "refresh": {"interval_steps": job["interval"], "cadence": "fixed"},
        "guard": {"enabled": False},
    }
    sizes = {key: job[key] for key in ("rows", "tokens", "width", "layers", "batch")}
    told = json.dumps({**sizes, "steps": steps_of(job) if job["refreshes"] >= 0 else 0, "grace": block})
    words = ["--data", str(args.data.absolute()), "--out", str(folder.absolute()), "--job", told]
    with (folder / "log.txt").open("w") as log:
        command = deepspeed_command("benchmarks.plan_job", words, job["ranks"])
        env = environment((args.out / "extensions").absolute())
        ended = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False, env=env, timeout=1800)
    if ended.returncode:
        raise SystemExit(f"{folder / 'log.txt'}: ended with {ended.returncode}")
    return [json.loads((folder / f"rank-{r}.json").read_text()) for r in range(job["ranks"])]


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
