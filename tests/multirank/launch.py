"""Starts ``zero_job.py``, by itself or under the real launchers, and reads its records back."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.multirank.harness import free_port, mpirun, run_command, run_module

# Collected and chosen from the first steps on: with no trusted set no warm-up waits for influences, so the losses and the
# copies tell samples apart; and the guard, which is not what most jobs here are about, finds toy corpora clean.
COLLECTING: dict[str, Any] = {
    "recipe": "grace",
    "budget": 0.3,
    "start_step": 0,
    "pseudo_trusted": False,
    "guard": {"enabled": False},
    "refresh": {"interval_steps": 4, "cadence": "fixed", "timeout_seconds": 30},
}
# Optimizer steps after which its refreshes come: recipe grace opens with an interval in two halves.
REFRESHES = (0, 2, 4, 8, 12, 16, 20, 24, 28)

SCRIPT = Path(__file__).with_name("zero_job.py")
Records = dict[str, list[dict[str, Any]]]


def environment(folder: Path) -> dict[str, str]:
    root = str(SCRIPT.parents[2])
    return {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(folder / "ext"), "PYTHONPATH": root, "PYTHONUNBUFFERED": "1"}


def run_jobs(
    folder: Path, jobs: dict[str, Any], ranks: int = 2, *, launcher: str = "", timeout: float = 240.0
) -> tuple[Records, str]:
    """Runs ``jobs`` on ``ranks`` ranks; returns each job's records by rank, and the output.

    Args:
        launcher: ``deepspeed`` or ``mpirun``; by default the ranks are forked with their imports done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    specs = folder / "specs.json"
    specs.write_text(json.dumps({"out": str(folder), "jobs": jobs}))
    if launcher == "deepspeed":
        options = ["--num_accelerators", str(ranks), "--master_port", str(free_port())]
        command = [str(Path(sys.executable).with_name("deepspeed")), *options]
    elif launcher == "mpirun":
        command = [*mpirun(), "-n", str(ranks), "-x", f"MASTER_PORT={free_port()}", sys.executable]
    if launcher:
        output = run_command([*command, str(SCRIPT), str(specs)], timeout=timeout, env=environment(folder))
    else:
        output = run_module("tests.multirank.zero_job", [specs], ranks, timeout=timeout, env=environment(folder))
    records = {name: [json.loads((folder / f"{name}-{r}.json").read_text()) for r in range(ranks)] for name in jobs}
    return records, output


def refreshes(steps: int) -> int:
    """Refreshes of a job of so many steps."""
    return sum(at <= steps for at in REFRESHES)


def stream(records: list[dict[str, Any]], first: int = 0) -> list[list[int]]:
    """The ids of each optimizer step over all ranks, sorted within the step, from step ``first`` of the records on."""
    return [sorted(i for rank in step for i in rank) for step in zip(*(r["steps"][first:] for r in records), strict=True)]
