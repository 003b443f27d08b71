"""Run the command ``grace-ds``: run a script with GRACE, read a schedule back, check a machine, or plan a job's sizes."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from grace_ds import __version__
from grace_ds.cli.commandline import Parser, amount, count, in_one_line, nearest, positive, screen_width, wants_debug
from grace_ds.cli.launch import OWN_OPTIONS, USAGE, run
from grace_ds.errors import GraceError

_OWN_OPTIONS = (*OWN_OPTIONS, "--debug")  # options of ``grace-ds run`` itself, not of the launcher


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    top = Parser(
        prog="grace-ds",
        description="Train on a small, always fresh part of a corpus: GRACE coreset selection for DeepSpeed jobs.",
        example="""\
            # would a job start here?
            grace-ds doctor
            # train
            grace-ds run train.py --deepspeed_config ds.json
            # what was chosen, and why
            grace-ds report RUN_DIR
            # which samples stood in that batch
            grace-ds trace RUN_DIR --step 1200
            """,
    )
    top.add_argument("--version", action="version", version=f"grace_ds {__version__}", help="show the version and exit")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    runner = commands.add_parser(
        "run",
        help="run an unchanged training script with GRACE",
        usage=USAGE,
        example="""\
            grace-ds run train.py --deepspeed_config ds.json
            grace-ds run --num_gpus 8 train.py --deepspeed_config ds.json
            grace-ds run --progress train.py --deepspeed_config ds.json
            grace-ds run --grace grace.yaml train.py
            grace-ds run torchrun --nproc-per-node 8 train.py
            grace-ds run accelerate launch --config_file ds.yaml train.py
            grace-ds run trl sft --config sft.yaml --deepspeed ds.json
            """,
        description="Whether GRACE is on is decided by the block in the script's own DeepSpeed config, or by --grace FILE. "
        "Starts the deepspeed launcher on the script, or a command as it is, with deepspeed.initialize replaced by "
        "grace_ds.initialize, and attaches to a transformers.Trainer when it begins to train. A job that gives DeepSpeed no "
        "training data keeps its own DataLoader, which then gives the coreset's batches. "
        "Options before the script go to the launcher, those after it to the script.",
    )
    runner.add_argument(
        "--grace", metavar="FILE", help="YAML or JSON file with the grace block, for a config that is a dict in code"
    )
    runner.add_argument(
        "--progress",
        action="store_true",
        help="show below the job's output how the run stands; a line a minute where no terminal is",
    )
    runner.add_argument("--preempt-dir", metavar="DIR", help="checkpoint there and leave when told to go (SIGTERM, SIGUSR1)")
    tracer = commands.add_parser(
        "trace",
        help="which samples stood in a global batch, and why",
        description="Reads the schedules that a run kept in its run_dir (or that a checkpoint holds) and prints the "
        "samples of one optimizer step: position in the run, id (index in the dataset), role (core: chosen; explore: from "
        "outside of the coreset; audit: drawn uniformly), weight, version of the schedule; with the reason and the start of the "
        "text where the run has kept them. To be looked at after a spike of the loss.",
        example="""\
            grace-ds trace runs/first --step 1200
            grace-ds trace runs/first --step 1200 --json
            grace-ds trace runs/first --step 1200 --data corpus.jsonl
            """,
    )
    tracer.add_argument(
        "where",
        metavar="RUN_DIR",
        help="a run_dir, a quickstart's --out folder, a 'schedules' folder, or the grace_ds folder of a checkpoint",
    )
    tracer.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="the dataset, for the text of every sample: .jsonl with text or input_ids, or .npy (n, tokens)",
    )
    tracer.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json, to show token ids as text")
    tracer.add_argument("--step", type=count, required=True, metavar="S", help="optimizer step, counted from 0")
    tracer.add_argument("--json", action="store_true", help="print JSON instead of a table")
    checker = commands.add_parser(
        "doctor",
        help="what would stop a job on this machine",
        description="Looks at versions, launcher, GPU libraries, stale locks, the port, limits, shared storage, and the files "
        "that a config names. Start it as the job is started, to see what its ranks see. It leaves nothing behind. Exit status "
        "1 where something would stop a job.",
        example="""\
            grace-ds doctor
            grace-ds doctor --shared /shared/checkpoints
            grace-ds doctor --config ds.json
            grace-ds doctor --config ds.json --parameters 1.3B --samples 1e7 --ranks 16
            """,
    )
    checker.add_argument("--shared", type=Path, metavar="DIR", help="folder that checkpoints will lie in")
    checker.add_argument("--config", type=Path, metavar="FILE", help="DeepSpeed config of the job, to check it and its files")
    checker.add_argument(
        "--parameters",
        type=amount,
        default=0,
        metavar="N",
        help="number of the model's parameters, such as 1.3B or 1.3e9 (with --config): compares its memory too",
    )
    checker.add_argument(
        "--samples", type=amount, default=0, metavar="N", help="number of samples of the dataset (with --config)"
    )
    checker.add_argument("--ranks", type=positive, default=1, metavar="N", help="data-parallel ranks of the job (with --config)")
    checker.add_argument("--here", type=positive, metavar="N", help="ranks on this machine (default: all)")
    checker.add_argument("--json", action="store_true", help="print JSON instead of lines")
    reference = commands.add_parser(
        "config",
        help="every key of the configuration, its default and what it means",
        description="Prints the keys of the grace block, as a dotlist names them: refresh.interval_steps is the key "
        "interval_steps in the section refresh.",
        example="grace-ds config\ngrace-ds config | grep refresh",
    )
    reference.add_argument("--markdown", action="store_true", help="print docs/config.md instead of lines")
    _add_plan(commands)
    _add_report(commands)
    _add_features(commands)
    return top


def _add_features(commands: argparse._SubParsersAction[Parser]) -> None:
    maker = commands.add_parser(
        "features",
        help="compute the content features of a corpus once, on any cluster, for jobs to read",
        description="Reads a corpus and writes scores, 6-grams and vectors of all its samples into a folder that a job names "
        "with features.precomputed. The job then reads no tokens, and chooses the same samples as it would without. CORPUS is "
        "the prefix of a Megatron .bin and .idx, a .jsonl with input_ids or text, a .npy of token ids (n, length), a folder of "
        "datasets' save_to_disk, or module:function that returns the job's dataset. What the folder holds already is not "
        "computed again, so that a command that was stopped goes on.",
        example="""\
            grace-ds features corpus_text_document --length 2048 --config ds.json --out features
            grace-ds features corpus.jsonl --tokenizer tokenizer.json --batch 256 --out features
            grace-ds features my_job.data:train_set --config ds.json --out features
            grace-ds features corpus.npy --config ds.json --scheduler tls://head:8786 --tls ca.pem cert.pem key.pem --out features
            """,
    )
    maker.add_argument("corpus", metavar="CORPUS", help="what the job trains on, in the order of its ids")
    maker.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the features, seen by all workers")
    job = maker.add_argument_group("the job")
    job.add_argument("--config", type=Path, metavar="FILE", help="its DeepSpeed config, with the grace block")
    job.add_argument(
        "--batch", type=count, default=0, metavar="B", help="samples of an optimizer step (default: train_batch_size)"
    )
    job.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the grace block, such as seed=7")
    corpus = maker.add_argument_group("the corpus")
    corpus.add_argument(
        "--length", type=positive, metavar="T", help="tokens of an item of a .bin (default: one sequence an item)"
    )
    corpus.add_argument("--overlap", type=count, default=1, metavar="N", help="with --length: tokens shared with the next item")
    corpus.add_argument("--dtype", metavar="TYPE", help="of a .bin, where its files alone are ambiguous")
    corpus.add_argument("--tokenizer", metavar="FILE", help="for text: tokenizer.json, or a folder of a saved tokenizer")
    cluster = maker.add_argument_group("the cluster")
    cluster.add_argument("--scheduler", metavar="ADDRESS", help="of a Dask cluster that runs (default: workers on this machine)")
    cluster.add_argument("--tls", nargs=3, default=[], metavar=("CA", "CERT", "KEY"), help="PEM files, for a tls:// address")
    cluster.add_argument("--workers", type=count, default=0, metavar="N", help="on this machine (default: one for each core)")
    cluster.add_argument("--chunk", type=positive, default=65536, metavar="N", help="samples of a task")
    maker.add_argument("--json", action="store_true", help="print JSON instead of lines")


def _features(args: argparse.Namespace) -> str:
    from grace_ds.cli.features import Where, features
    from grace_ds.data.corpus import Corpus

    corpus = Corpus(_absolute(args.corpus), args.length, args.overlap, args.dtype, args.tokenizer and _absolute(args.tokenizer))
    where = Where(args.scheduler, args.tls, args.workers)
    return features(corpus, args.out, args.config, args.set, args.batch, args.chunk, where, args.json)


def _absolute(place: str) -> str:
    """Return a path that holds in other processes too; what is no path is left as it is."""
    beside = any(Path(place + suffix).exists() for suffix in ("", ".bin", ".idx"))
    return str(Path(place).absolute()) if beside else place


def _add_plan(commands: argparse._SubParsersAction[Parser]) -> None:
    planner = commands.add_parser(
        "plan",
        help="what GRACE will cost each rank, and how many steps it must save",
        description="From the sizes of a job: the window, memory, traffic and seconds of a refresh, what collecting adds, the "
        "break-even, and a table of what-ifs. With --calibrate the rates behind it are measured here; without they are "
        "assumed. It says which figure is which.",
        example="""\
            grace-ds plan --samples 1e8 --ranks 64
            grace-ds plan --samples 100M --ranks 64 --parameters 7B --tflops 400
            grace-ds plan --samples 3e8 --ranks 64 --batch 2048 --steps 1e5
            grace-ds plan --samples 1e6 --ranks 8 --calibrate --json
            grace-ds plan --samples 1e6 --ranks 8 --set graph.tier=exact
            grace-ds plan --samples 1e9 --ranks 64 --simulate --set window=1000000000
            """,
    )
    job = planner.add_argument_group("the job")
    job.add_argument("--samples", type=positive, required=True, metavar="N", help="of the corpus, such as 1e8 or 100M")
    job.add_argument("--ranks", type=positive, required=True, metavar="P", help="data-parallel ranks")
    job.add_argument("--dim", type=positive, metavar="D", help="features.dim (default: of the config)")
    job.add_argument("--batch", type=positive, default=256, metavar="B", help="samples of an optimizer step (default: 256)")
    job.add_argument("--interval", type=positive, metavar="R", help="refresh.interval_steps (default: of the config)")
    job.add_argument("--budget", type=amount, help="share of the window in a coreset (default: of the config)")
    job.add_argument("--tokens", type=positive, default=1024, metavar="T", help="of a sample (default: 1024)")
    job.add_argument("--steps", type=count, metavar="S", help="of the run: repeats, and steps to be saved")
    job.add_argument(
        "--parameters", type=amount, default=0.0, metavar="N", help="of the model, such as 7B or 7e9; its shape is assumed"
    )
    job.add_argument("--layers", type=count, default=0, metavar="L", help="blocks of the model, with --hidden")
    job.add_argument("--hidden", type=count, default=0, metavar="H", help="width of the model, with --layers")
    job.add_argument(
        "--vocab", type=count, default=0, metavar="V", help="of the model's head, with --layers (default: not counted)"
    )
    job.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the config, such as recipe=grace graph.tier=exact"
    )
    speed = planner.add_argument_group("its speed")
    speed.add_argument("--step-seconds", type=amount, default=0.0, metavar="S", help="of an optimizer step of the job as it is")
    speed.add_argument("--tflops", type=amount, default=0.0, metavar="F", help="that a rank reaches in training, in Tflop/s")
    speed.add_argument("--item-seconds", type=amount, default=0.0, metavar="S", help="of dataset[i] (default: 2e-5, assumed)")
    speed.add_argument("--gflops", type=amount, default=0.0, help="of a rank's CPU, in Gflop/s (default: measured here)")
    speed.add_argument("--gbits", type=amount, default=0.0, help="between two ranks, in Gbit/s (default: 10, or measured)")
    speed.add_argument(
        "--calibrate",
        action="store_true",
        help="measure this machine, some seconds; under torchrun --no-python the transport between its ranks too",
    )
    planner.add_argument(
        "--simulate",
        action="store_true",
        help="run refreshes of all ranks in this process, on a few samples each, and count what they send and hold; minutes",
    )
    planner.add_argument("--json", action="store_true", help="print JSON instead of lines")


def _add_report(commands: argparse._SubParsersAction[Parser]) -> None:
    reporter = commands.add_parser(
        "report",
        help="what a run chose and why, and what it cost: one HTML page",
        description="Reads a run_dir (or a quickstart's --out folder) and writes one page that needs no network: losses, seconds "
        "by stage, the guard's decisions, and the samples most and least likely to be chosen, with their text and the reasons.",
        example="""\
            grace-ds report runs/quickstart
            grace-ds report runs/first --terminal
            grace-ds report runs/first --html first.html --tokenizer tokenizer.json
            """,
    )
    reporter.add_argument("where", metavar="RUN_DIR", help="a run_dir, or the --out folder of a quickstart")
    reporter.add_argument("--html", type=Path, metavar="FILE", help="the page (default: RUN_DIR/report.html, unless --terminal)")
    reporter.add_argument("--terminal", action="store_true", help="print a summary here")
    reporter.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json, to show token ids as text")
    reporter.add_argument("--sources", type=Path, metavar="FILE", help=".npy of one label for each sample of the dataset")
    reporter.add_argument("--losses", type=Path, metavar="FILE", help='JSON: {"uniform": [[step, loss], …], "grace": …}')


def _report(args: argparse.Namespace) -> str:
    from grace_ds.report.load import Options, load_run
    from grace_ds.report.page import page
    from grace_ds.report.terminal import terminal
    from grace_ds.utils.files import write_atomic

    run = load_run(args.where, Options(args.tokenizer, args.sources, args.losses))
    summary = terminal(run, colour=sys.stdout.isatty()) if args.terminal else ""
    target = args.html or (None if args.terminal else run.folder / "report.html")
    if target is None:
        return summary
    html = page(run)
    try:
        if args.html is None:  # beside the run's own files, where a link may lie that others have made
            write_atomic(target, html.encode(), root=run.folder)
        else:
            target.write_text(html, "utf-8")
    except OSError as error:
        raise GraceError(f"the page cannot be written to {target} ({error.strerror}); name another place with --html") from error
    return summary + f"written: {target}\n"


def _plan(args: argparse.Namespace) -> str:
    from grace_ds.cli.plan import Sizes
    from grace_ds.cli.plan_model import Model
    from grace_ds.cli.plan_rates import Rates
    from grace_ds.cli.plan_summary import render
    from grace_ds.config.load import load_config

    given = {"features.dim": args.dim, "refresh.interval_steps": args.interval, "budget": args.budget, "total_steps": args.steps}
    options = [f"{key}={value}" for key, value in given.items() if value is not None]
    config = load_config({}, dotlist=[*args.set, *options])
    dim, interval = config.features.dim, config.refresh.interval_steps
    model = Model.of(args.parameters, args.layers, args.hidden, args.vocab)
    job = (args.samples, dim, args.ranks, args.batch, interval, config.budget, args.tokens, config.total_steps)
    sizes = Sizes(*job, args.gflops, args.gbits, model, args.step_seconds, args.tflops, args.item_seconds, Rates())
    prints = True
    if args.calibrate:
        from grace_ds.cli.calibrate import calibrate, world

        comm, prints = world()
        rates = calibrate(config, dim, args.tokens, model.hidden if model is not None else 0, comm)
        comm.close()
        sizes = dataclasses.replace(sizes, rates=rates)
    if args.simulate and prints:
        from grace_ds.cli import simulate_summary

        return simulate_summary.render(sizes, config, args.json)
    return render(sizes, config, args.json, screen_width(None)) if prints else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status.  Errors are one line unless ``--debug``."""
    words = list(sys.argv[1:] if argv is None else argv)
    return in_one_line("grace-ds", lambda: _command(words), wants_debug(words))


def _command(words: list[str]) -> int:
    if not [word for word in words if word != "--debug"]:
        words = ["--help"]
    command = next((i for i, word in enumerate(words) if not word.startswith("-")), len(words))
    if words[command : command + 1] == ["run"] and words[command + 1 : command + 2] not in (["-h"], ["--help"]):
        # argparse would take the launcher's options for its own.
        return run(_own_options_first(words[command + 1 :]))
    args = parser().parse_args(words)
    if args.command == "doctor":
        return _doctor(args)
    commands = {"config": _config, "features": _features, "plan": _plan, "report": _report, "trace": _trace}
    sys.stdout.write(commands[args.command](args))
    sys.stdout.flush()  # detect a closed pipe here, where it can be distinguished from an error
    return 0


def _own_options_first(words: Sequence[str]) -> list[str]:
    """Return the words of ``run`` with its own options before the launcher's, or before the command that is to be run.

    ``--debug`` is handled already and left out.

    Raises:
        GraceError: an option before the script is almost one of ``grace-ds run``.
    """
    script = next((i for i, word in enumerate(words) if word.endswith(".py")), len(words))
    own: list[str] = []
    launchers: list[str] = []
    before = iter(words[:script])
    for word in before:
        if not launchers and not word.startswith("-"):  # a command: the rest is its own
            return [*filter(None, own), word, *before, *words[script:]]
        name, equals, value = word.partition("=")
        if name not in _OWN_OPTIONS:
            if name.startswith("--") and (near := nearest(name, _OWN_OPTIONS)):
                raise GraceError(f"run: there is no option {name}{near}")
            launchers.append(word)
        elif name in ("--grace", "--preempt-dir"):
            own += [name, value if equals else next(before, "")]
        elif name != "--debug":
            own.append(word)
    return [*filter(None, own), *launchers, *words[script:]]


def _doctor(args: argparse.Namespace) -> int:
    from grace_ds.cli.doctor import Job, doctor

    job = None
    if args.config is not None:
        job = Job(args.config, args.parameters, args.samples, args.ranks, args.here if args.here is not None else args.ranks)
    report, status = doctor(os.environ, args.shared, args.json, job, screen_width(None))
    sys.stdout.write(report)
    return status


def _config(args: argparse.Namespace) -> str:
    from grace_ds.config.reference import listed, markdown

    return markdown() if args.markdown else listed()


def _trace(args: argparse.Namespace) -> str:
    from grace_ds.cli.trace import Shown, trace

    return trace(args.where, args.step, Shown(args.data, args.tokenizer), as_json=args.json, width=screen_width())


if __name__ == "__main__":
    raise SystemExit(main())
