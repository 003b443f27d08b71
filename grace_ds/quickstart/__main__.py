"""``python -m grace_ds.quickstart``: build the data, train with the flag off and on, compare."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from grace_ds.commandline import INTERRUPTED, Parser, amount, count, in_one_line, positive, wants_debug
from grace_ds.quickstart.corpus import POOLS, Corpus, CorpusSpec, prepare
from grace_ds.quickstart.launch import Arm, ArmFailed, deepspeed_command, environment, run_arm
from grace_ds.quickstart.summary import summarise, table, write

ARMS = ("uniform", "grace")


def main(argv: list[str] | None = None) -> int:
    """Run the quickstart; 0 when every arm ended well, 1 when one did not, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = wants_debug(words)
    return in_one_line("quickstart", lambda: _run(parse(words), debug), debug)


def _run(args: argparse.Namespace, debug: bool) -> int:
    console = Console(soft_wrap=not sys.stdout.isatty())
    # A terminated quickstart must end its launches as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return compare(args, console)
    except ArmFailed as error:
        for line in error.tail if debug else error.causes:
            console.print("  " + line, markup=False, highlight=False)
        raise
    except KeyboardInterrupt:
        console.print("[red]interrupted; no process is left behind[/red]")
        return INTERRUPTED


def compare(args: argparse.Namespace, console: Console) -> int:
    """Data, one launch an arm, the table and the files."""
    args.out.mkdir(parents=True, exist_ok=True)  # before a minute of reading, if it cannot be
    with console.status("reading the standard library, training the tokeniser"):
        corpus = prepare(CorpusSpec(pool=args.pool, pool_size=args.pool_size), args.out / "data")
    describe(corpus, args.pool, console)
    results: dict[str, dict[str, Any]] = {}
    wall: dict[str, float] = {}
    env = environment((args.out / "torch_extensions").absolute())
    for name in args.arms:
        folder = (args.out / name).absolute()
        # Else a run that writes nothing would be taken for the one before it.
        shutil.rmtree(folder, ignore_errors=True)
        arm = Arm(
            name=name,
            command=deepspeed_command("grace_ds.quickstart.train", _train_arguments(args, name, folder), args.ranks),
            log=folder / "log.txt",
            steps=args.steps,
            limit_seconds=args.timeout,
        )
        wall[name] = run_arm(arm, env, console)
        results[name] = json.loads((folder / "result.json").read_text("utf-8"))
    summary = summarise(args.pool, corpus.manifest, results, wall)
    write(summary, args.arms, args.out)
    console.print(table(summary, args.arms))
    console.print(f"written: {args.out / 'summary.json'}, {args.out / 'loss_curves.png'}")
    return 0


def describe(corpus: Corpus, pool: str, console: Console) -> None:
    """Say on the screen what the pool is made of."""
    rows, kinds = corpus.manifest["rows"], corpus.manifest["kinds"]
    origin = "reused" if corpus.reused else "built"
    console.print(
        f"data {origin}: Python {corpus.manifest['key']['python']} standard library, {rows['train']:,} training,"
        f" {rows['trusted']:,} trusted, {rows['validation']:,} validation sequences, split by package"
    )
    if pool == "crawl":
        console.print(
            f"pool crawl, polluted on purpose as a crawl is: {kinds['unique']:,} unique, {kinds['duplicate']:,}"
            f" near-duplicates, {kinds['junk']:,} junk (random bytes, base64, shuffled tokens); validation is clean"
        )
    else:
        console.print("pool natural: the text as it is")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python -m grace_ds.quickstart",
        description="Trains a small GPT on the sources of the Python standard library, once on everything and once with "
        "GRACE, and compares. Downloads nothing; about three minutes on two CPU cores that do nothing else.",
        example="""\
            python -m grace_ds.quickstart
            python -m grace_ds.quickstart --pool natural --seed 1 --out runs/natural
            python -m grace_ds.quickstart --steps 20 --pool-size 600 --out runs/small     does it run at all?
            """,
    )
    parser.add_argument(
        "--pool",
        choices=POOLS,
        default="crawl",
        help="crawl: half near-duplicates and junk, put there on purpose; natural: the text as it is",
    )
    parser.add_argument(
        "--pool-size", type=positive, default=CorpusSpec.pool_size, metavar="N", help="training sequences of 65 tokens"
    )
    parser.add_argument("--steps", type=positive, default=400, metavar="N", help="optimizer steps of each arm")
    parser.add_argument("--seed", type=count, default=0, metavar="S", help="of the weights and the order of the samples")
    parser.add_argument("--order-seed", type=count, metavar="S", help="of the order alone (default: --seed)")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), metavar="DIR", help="folder for all that it writes")
    parser.add_argument("--arms", type=_arms, default=list(ARMS), help="what to train: uniform,grace or one (default: both)")
    parser.add_argument("--ranks", type=positive, default=2, metavar="N", help="processes that train together")
    parser.add_argument("--timeout", type=amount, default=900.0, metavar="S", help="seconds that one arm may take")
    args: argparse.Namespace = parser.parse_args(argv)
    return args


def _arms(text: str) -> list[str]:
    names = text.split(",")
    if set(names) - set(ARMS) or len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(ARMS)}, each once")
    return names


def _train_arguments(args: argparse.Namespace, arm: str, folder: Path) -> list[str]:
    # DeepSpeed starts the ranks in the working directory, but absolute paths read better in the log.
    values = ["--data", str((args.out / "data").absolute()), "--out", str(folder)]
    values += ["--steps", str(args.steps), "--seed", str(args.seed)]
    if args.order_seed is not None:
        values += ["--order-seed", str(args.order_seed)]
    return [*values, "--grace"] if arm == "grace" else values


if __name__ == "__main__":
    sys.exit(main())
