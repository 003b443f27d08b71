"""``grace-ds``: run a script with GRACE, read a schedule back."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from grace_ds.errors import GraceError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="grace-ds", description="GRACE coreset selection for DeepSpeed jobs.")
    top.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="run an unchanged training script with GRACE",
        description="Starts the deepspeed launcher on SCRIPT with deepspeed.initialize replaced by grace_ds.initialize. "
        "Options before SCRIPT go to the launcher, those after it to the script.",
    )
    run.add_argument("rest", nargs=argparse.REMAINDER, metavar="[LAUNCHER OPTIONS] SCRIPT [ARGUMENTS]")
    trace = commands.add_parser(
        "trace",
        help="which samples stood in a global batch, and why",
        description="Reads the schedules that a run kept in its run_dir (or that a checkpoint holds) and prints the "
        "samples of one optimizer step.",
    )
    trace.add_argument("where", help="a run_dir, its 'schedules' folder, or the grace_ds folder of a checkpoint")
    trace.add_argument("--step", type=int, required=True, help="optimizer step, counted from 0")
    trace.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status.  Errors of ours are one line unless ``--debug``."""
    args = parser().parse_args(argv)
    try:
        if args.command == "run":
            return run(args.rest)
        from grace_ds.cli.trace import trace

        sys.stdout.write(trace(args.where, args.step, as_json=args.json))
        return 0
    except GraceError as error:
        if args.debug:
            raise
        sys.stderr.write(f"grace-ds: {error}\n")
        return 1


def run(rest: Sequence[str]) -> int:
    """Replaces this process by the deepspeed launcher with ``--module grace_ds.run`` before the script."""
    at = next((i for i, word in enumerate(rest) if word.endswith(".py")), None)
    if at is None:
        sys.stderr.write("grace-ds run: no script given; usage: grace-ds run [launcher options] train.py [arguments]\n")
        return 2
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", *rest[:at], "--module", "grace_ds.run", *rest[at:]]
    os.execv(sys.executable, launcher)


if __name__ == "__main__":
    raise SystemExit(main())
