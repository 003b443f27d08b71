"""``python -m benchmarks NAME --json FILE``: runs one benchmark, prints its tables, keeps its raw figures."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from rich.console import Console

NAMES = ("harvest", "refresh", "graph", "quickstart", "greedy", "selection", "soak")


def main(argv: list[str] | None = None) -> int:
    """Entry point; 0 when the benchmark ran to its end, whatever its claims say."""
    given = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name in NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        command = commands.add_parser(name, help=(module.__doc__ or name).splitlines()[0], description=module.__doc__)
        command.add_argument("--json", type=Path, help="where to write the figures")
        module.add_arguments(command)
    args = parser.parse_args(given)
    console = Console(width=None if sys.stdout.isatty() else 150)
    record = importlib.import_module(f"benchmarks.{args.name}").run(args, console)
    record.show(console)
    if args.json is not None:
        record.write(args.json)
        console.print(f"written: {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
