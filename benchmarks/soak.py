"""A long job under ranks that are late at random: whether memory stays flat, and whether all ranks always hold one schedule.

Two ranks train a small model by the deepspeed launcher, with every stage of a refresh in use. Before every step, and before
every refresh, each rank draws whether it comes late and by how much. After each refresh the ranks exchange the digests of
their schedules and note their resident memory, once freed pages have been given back: what a leak would hold on to.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from grace_ds_quickstart.launch import free_port
from rich.console import Console

from benchmarks.record import Claim, Record

GOAL_GROWTH = 0.02
SETTLED = 3  # refreshes after which memory must be flat


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--refreshes", type=int, default=30, metavar="N", help="refreshes of the job")
    parser.add_argument("--minutes", type=float, default=20.0, help="that the job is stretched to by pauses")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes of the job")


def run(args: argparse.Namespace, console: Console) -> Record:
    record = Record("soak")
    with tempfile.TemporaryDirectory(prefix="grace_ds_soak_") as folder:
        out = Path(folder) / "rows.jsonl"
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(args.ranks)]
        command += ["--master_port", str(free_port()), "--module", "benchmarks.soak_job"]
        command += ["--out", str(out), "--refreshes", str(args.refreshes), "--seconds", str(60 * args.minutes)]
        env = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": f"{folder}/ext"}
        limit = 60 * (3 * args.minutes + 10)
        subprocess.run(command, env={**os.environ, **env}, check=True, timeout=limit, cwd=Path(__file__).parents[1])
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    record.rows["refreshes"] = rows
    settled, last = rows[SETTLED - 1], rows[-1]
    growth = max(max(row["rss_mib"][r] for row in rows[SETTLED:]) / settled["rss_mib"][r] - 1 for r in range(args.ranks))
    console.print(f"  {len(rows)} refreshes in {last['seconds'] / 60:.1f} minutes")
    record.claims = [
        Claim("soak_memory_growth", growth, f"of the memory after refresh {SETTLED}, worst rank and refresh", GOAL_GROWTH),
        Claim("soak_disagreements", float(sum(not row["agreed"] for row in rows)), "refreshes with unlike schedules", 0.0),
        Claim("soak_failures", float(last["failures"]), "refreshes given up", 0.0),
        Claim("soak_refreshes", float(len(rows)), "refreshes", float(args.refreshes), higher_is_better=True),
    ]
    return record
