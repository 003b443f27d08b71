"""``grace-ds``: run a script with GRACE, read a schedule back, look at a machine before a job does."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from grace_ds.cli.launch import USAGE, run
from grace_ds.errors import GraceError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="grace-ds", description="GRACE coreset selection for DeepSpeed jobs.")
    top.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "run",
        help="run an unchanged training script with GRACE",
        usage=USAGE,
        description="Starts the deepspeed launcher on the script with deepspeed.initialize replaced by grace_ds.initialize. "
        "Options before the script go to the launcher, those after it to the script.",
    )
    tracer = commands.add_parser(
        "trace",
        help="which samples stood in a global batch, and why",
        description="Reads the schedules that a run kept in its run_dir (or that a checkpoint holds) and prints the "
        "samples of one optimizer step.",
    )
    tracer.add_argument("where", help="a run_dir, its 'schedules' folder, or the grace_ds folder of a checkpoint")
    tracer.add_argument("--step", type=int, required=True, help="optimizer step, counted from 0")
    tracer.add_argument("--json", action="store_true", help="print JSON instead of a table")
    checker = commands.add_parser(
        "doctor",
        help="what would stop a job on this machine",
        description="Looks at versions, launcher, GPU libraries, stale locks, the port, limits and shared storage. Start it as "
        "the job is started, to see what its ranks see. Exit status 1 where something would stop a job.",
    )
    checker.add_argument("--shared", type=Path, metavar="DIR", help="folder that checkpoints will lie in")
    checker.add_argument("--config", type=Path, metavar="FILE", help="DeepSpeed config of the job, to compare its memory too")
    checker.add_argument("--parameters", type=float, default=0, metavar="N", help="of the model, such as 1.3e9 (with --config)")
    checker.add_argument("--samples", type=float, default=0, metavar="N", help="of the dataset (with --config)")
    checker.add_argument("--ranks", type=int, default=1, metavar="N", help="data-parallel ranks of the job (with --config)")
    checker.add_argument("--here", type=int, metavar="N", help="ranks on this machine (default: all)")
    checker.add_argument("--json", action="store_true", help="print JSON instead of lines")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status.  Errors of ours are one line unless ``--debug``."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = next((i for i, word in enumerate(words) if not word.startswith("-")), len(words))
    if words[command : command + 1] == ["run"] and words[command + 1 : command + 2] not in (["-h"], ["--help"]):
        # Not by argparse: it would take the launcher's options for its own.
        return run(words[command + 1 :])
    args = parser().parse_args(words)
    try:
        if args.command == "doctor":
            from grace_ds.cli.doctor import doctor
            from grace_ds.cli.memory import Job

            job = None
            if args.config is not None:
                job = Job(
                    args.config, args.parameters, args.samples, args.ranks, args.here if args.here is not None else args.ranks
                )
            said, status = doctor(os.environ, args.shared, args.json, job)
            sys.stdout.write(said)
            return status
        from grace_ds.cli.trace import trace

        sys.stdout.write(trace(args.where, args.step, as_json=args.json))
        return 0
    except GraceError as error:
        if args.debug:
            raise
        sys.stderr.write(f"grace-ds: {error}\n")
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
