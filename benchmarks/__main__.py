"""``python -m benchmarks NAME --json FILE``: runs one benchmark, prints its tables, keeps its raw figures."""

from __future__ import annotations

import ast
import importlib
import signal
import sys
from pathlib import Path

from rich.console import Console

from grace_ds.cli.commandline import Parser, in_one_line, wants_debug
from grace_ds.errors import ConfigError

NAMES: tuple[str, ...] = (
    "collect",
    "refresh",
    "graph",
    "quickstart",
    "greedy",
    "density",
    "selection",
    "soak",
    "finetune",
    "plan",
    "gpu_check",
    "scale",
    "features",
    "peers",
    "chaos",
    "fuzz",
)
EXAMPLES = {
    "collect": "collect --pairs 10 --models small",
    "refresh": "refresh --sizes 5000 10000",
    "graph": "graph --sizes 50000 --repeats 1",
    "quickstart": "quickstart --pools crawl --seeds 1",
    "greedy": "greedy --sizes 6250 --libraries",
    "density": "density --sizes 1000 10000",
    "selection": "selection --pool crawl --arms content --seeds 1",
    "soak": "soak --refreshes 3 --minutes 2",
    "finetune": "finetune --data train.jsonl --arms content --seeds 1",
    "plan": "plan --jobs content",
    "peers": "peers --only crawl --arms bm25 --seeds 1",
    "scale": "scale --sizes 100000 1000000 --large 0",
    "chaos": "chaos --steps 100",
    "fuzz": "fuzz --cases 2000",
    "features": "features --rows 5000 --repeats 3",
    "gpu_check": "gpu_check --rows 2000 --device cpu",
}


def main(argv: list[str] | None = None) -> int:
    """Entry point; 0 when the benchmark ran to its end, whatever its claims say."""
    given = list(sys.argv[1:] if argv is None else argv)
    return in_one_line("benchmarks", lambda: _run(given), wants_debug(given))


def _run(given: list[str]) -> int:
    parser = Parser(
        prog="python -m benchmarks",
        description="Runs one benchmark, prints its tables and what it claims, and keeps its raw figures.",
        example="""\
            python -m benchmarks collect --json collect.json
            python -m benchmarks selection --help
            """,
    )
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    chosen = next((word for word in given if not word.startswith("-")), None)
    for name in NAMES:
        told = _told(name)
        example = f"python -m benchmarks {EXAMPLES.get(name, name)}"
        command = commands.add_parser(name, help=told.splitlines()[0], description=told, example=example)
        command.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
        if name == chosen:  # the others' libraries take seconds to import
            importlib.import_module(f"benchmarks.{name}").add_arguments(command)
    args = parser.parse_args(given)
    if args.json is not None and not args.json.absolute().parent.is_dir():  # not after an hour of measuring
        raise ConfigError(f"--json {args.json}: there is no folder {args.json.absolute().parent}; make it, or name another place")
    console = Console(width=None if sys.stdout.isatty() else 150)
    record = importlib.import_module(f"benchmarks.{args.name}").run(args, console)
    record.show(console)
    if args.json is not None:
        record.write(args.json)
        console.print(f"written: {args.json}")
    return 0


def _told(name: str) -> str:
    """The docstring of a benchmark's module, without importing it."""
    path = Path(__file__).with_name(name)
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text("utf-8")
    return ast.get_docstring(ast.parse(source)) or name


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a terminated benchmark must end its runs as Ctrl-C does
    sys.exit(main())
