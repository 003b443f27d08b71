"""``python -m grace_ds_quickstart``: build the data, train with the flag off and on over MPI, compare."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from grace_ds.cli.commandline import INTERRUPTED, Parser, amount, count, in_one_line, positive, wants_debug
from grace_ds_quickstart.corpus import POOLS, Corpus, CorpusSpec, prepare
from grace_ds_quickstart.generated import TEMPLATES
from grace_ds_quickstart.launch import (
    LAUNCHERS,
    TAIL,
    Arm,
    ArmFailed,
    Launcher,
    choose_launcher,
    deepspeed_command,
    environment,
    mpi_environment,
    openmpi_command,
    run_arm,
)
from grace_ds_quickstart.summary import count_sources, source_table, summarise, table, write

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
    """Data, one launch an arm, the tables and the files."""
    args.out.mkdir(parents=True, exist_ok=True)  # before a minute of reading, if it cannot be
    launcher = choose_launcher(args.launcher)
    console.print(f"launcher {launcher.name}: {launcher.why}", highlight=False)
    with console.status("reading the standard library, training the tokeniser"):
        corpus = prepare(CorpusSpec(pool=args.pool, pool_size=args.pool_size), args.out / "data")
    describe(corpus, args.pool, console)
    results: dict[str, dict[str, Any]] = {}
    wall: dict[str, float] = {}
    for name in args.arms:
        folder = (args.out / name).absolute()
        # Else a run that writes nothing would be taken for the one before it.
        shutil.rmtree(folder, ignore_errors=True)
        command, env = launch(launcher, train_arguments(args, name, folder, launcher.comm), args, folder)
        arm = Arm(name=name, command=command, log=folder / "log.txt", steps=args.steps, limit_seconds=args.timeout)
        wall[name] = run_arm(arm, env, console)
        results[name] = read_result(arm, folder)
    trained = results["grace"]["steps"] * results["grace"]["batch"] if "grace" in results else 0
    sources = count_sources(args.out / "data", args.out / "grace" / "grace", trained)
    summary = summarise(args.pool, corpus.manifest, results, wall, launcher=launcher.name, sources=sources)
    write(summary, args.arms, args.out)
    console.print(table(summary, args.arms))
    if args.pool == "crawl" and "grace" in results:
        console.print(source_table(summary))
    console.print(f"written: {args.out / 'summary.json'}, {args.out / 'loss_curves.png'}")
    return 0


def launch(launcher: Launcher, arguments: list[str], args: argparse.Namespace, folder: Path) -> tuple[list[str], dict[str, str]]:
    """The command that trains one arm on all ranks, and its environment."""
    module = "grace_ds_quickstart.train"
    env = environment((args.out / "torch_extensions").absolute())
    if launcher.binaries is None:
        return deepspeed_command(module, arguments, args.ranks), env
    return openmpi_command(module, arguments, args.ranks, folder / "hostfile"), mpi_environment(env, launcher.binaries)


def read_result(arm: Arm, folder: Path) -> dict[str, Any]:
    """What an arm has written; raises ArmFailed if that is nothing."""
    # DeepSpeed's launcher ends with 0 where a signal ended what it has started.
    try:
        found: dict[str, Any] = json.loads((folder / "result.json").read_text("utf-8"))
    except FileNotFoundError:
        lines = arm.log.read_text("utf-8", errors="replace").splitlines()
        raise ArmFailed(f"arm {arm.name}: ended without a result; check the end of its log, {arm.log}", lines[-TAIL:]) from None
    return found


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
            f"pool crawl, polluted on purpose as a crawl is: {kinds['unique']:,} unique, {kinds['duplicate']:,} near-duplicates,"
            f" {kinds['generated']:,} machine-written ({len(TEMPLATES)} templates), {kinds['junk']:,} junk (random bytes, base64,"
            " shuffled tokens); validation is clean"
        )
    else:
        console.print("pool natural: the text as it is")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python -m grace_ds_quickstart",
        description="Trains a small GPT on the sources of the Python standard library, once on everything and once with "
        "GRACE, and compares. What GRACE collects travels over MPI. Downloads nothing; about three minutes on two CPU cores "
        "that do nothing else.",
        example="""\
            python -m grace_ds_quickstart
            python -m grace_ds_quickstart --pool natural --seed 1 --out runs/natural
            python -m grace_ds_quickstart --launcher deepspeed                            without MPI
            python -m grace_ds_quickstart --steps 20 --pool-size 600 --out runs/small     does it run at all?
            """,
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--pool",
        choices=POOLS,
        default="crawl",
        help="crawl: 40 %% unique text, 20 %% near-duplicates, 25 %% machine-written code and 15 %% junk, put there on purpose; "
        "natural: the text as it is",
    )
    data.add_argument(
        "--pool-size", type=positive, default=CorpusSpec.pool_size, metavar="N", help="training sequences of 65 tokens"
    )
    training = parser.add_argument_group("training")
    training.add_argument("--arms", type=_arms, default=list(ARMS), help="what to train: uniform,grace or one (default: both)")
    training.add_argument("--steps", type=positive, default=400, metavar="N", help="optimizer steps of each arm")
    training.add_argument("--seed", type=count, default=0, metavar="S", help="of the weights and the order of the samples")
    training.add_argument("--order-seed", type=count, metavar="S", help="of the order alone (default: --seed)")
    start = parser.add_argument_group("launch")
    start.add_argument(
        "--launcher",
        choices=LAUNCHERS,
        default="auto",
        help="openmpi: deepspeed --launcher openmpi, rows travel over MPI; deepspeed: its own one, rows travel over "
        "torch.distributed; auto: openmpi if mpirun and mpi4py are installed, else deepspeed",
    )
    start.add_argument("--ranks", type=positive, default=2, metavar="N", help="processes that train together")
    start.add_argument("--timeout", type=amount, default=900.0, metavar="S", help="seconds that one arm may take")
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, default=Path("runs/quickstart"), metavar="DIR", help="folder for all that it writes")
    args: argparse.Namespace = parser.parse_args(argv)
    return args


def _arms(text: str) -> list[str]:
    names = text.split(",")
    if set(names) - set(ARMS) or len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(ARMS)}, each once")
    return names


def train_arguments(args: argparse.Namespace, arm: str, folder: Path, comm: str) -> list[str]:
    """What ``grace_ds_quickstart.train`` is told for one arm."""
    # DeepSpeed starts the ranks in the working directory, but absolute paths read better in the log.
    values = ["--data", str((args.out / "data").absolute()), "--out", str(folder)]
    values += ["--steps", str(args.steps), "--seed", str(args.seed)]
    if args.order_seed is not None:
        values += ["--order-seed", str(args.order_seed)]
    return [*values, "--grace", "--comm", comm] if arm == "grace" else values


if __name__ == "__main__":
    sys.exit(main())
