"""Arms × pools × seeds at equal optimizer steps: what is run, from the command line to the record."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from benchmarks.record import Record
from benchmarks.selection.arms import ARMS
from benchmarks.selection.arms.ceiling import CEILINGS
from benchmarks.selection.arms.libraries import PEERS, require
from benchmarks.selection.claims import claims
from benchmarks.selection.corpora import STDLIB, CorpusSpec
from benchmarks.selection.pools import GROUPS, SPECS, prepare_pool
from benchmarks.selection.report import PoolRuns, tables
from benchmarks.selection.runs import RunSpec, run_all, take_from
from benchmarks.selection.sizes import SHAPES
from benchmarks.selection.store import Stored
from grace_ds.errors import GraceError

ORDER = 1000  # added to the seed for the order of a further uniform run
UNIFORM_STEPS = (400, 600, 800, 1000, 1300, 1600)
PARTS = ("content", "grace", "no_gradients", "no_graph", "no_sketches")  # the whole, and what it is without each part
DEFAULT_ARMS = {
    "crawl": tuple(arm for arm in ARMS if arm not in (*CEILINGS, *PEERS)),
    "natural": ("uniform", "rs2", "dedup_filter", "dsir", *PARTS, "unguarded", "pseudo"),
    "dose": ("uniform", "oracle", "content", "grace", "unguarded"),
    "heldout": ("uniform", "oracle", "dedup_filter", "dsir", "density", *PARTS, "pseudo"),
    "dev": ("uniform", "oracle", "dedup_filter", "dsir", "density", "content", "grace", "pseudo", "unguarded"),
    **dict.fromkeys(("generated", "generated-heldout"), ("uniform", "oracle", "dedup_filter", "density", *PARTS)),
    "answers": ("uniform", "oracle", "dedup_filter", "density", "content", "grace"),
    "peers": (
        "uniform",
        "oracle",
        "rs2",
        "content",
        "grace",
        "offline",
        "bm25",
        "dsir_library",
        "token_frequency",
        "bergson",
        "dattri",
    ),
}
# By uniform's loss on the dev rows after 400 steps.  Small: 2e-3 and 3e-3 are worse, 8e-3 and 12e-3 no better and more chancy;
# 4m: 4.374 at 1e-3, 4.231 at 2e-3, 4.241 at 3e-3.
PEAK_LR = {"small": 5e-3, "4m": 2e-3}
LARGE_ARMS = ("uniform", "rs2", "dedup_filter", "content", "grace", "oracle")


def add_arguments(parser: argparse.ArgumentParser, pool: str | None = None) -> None:
    """The options of a comparison; with ``pool`` the group is given and no option."""
    add = parser.add_argument
    if pool is None:
        add("--pool", required=True, choices=sorted(GROUPS), help="which pools: one, or a group of them")
    else:
        parser.set_defaults(pool=pool)
    add("--only", nargs="+", choices=sorted(SPECS), metavar="POOL", help=f"of the group, these alone: {', '.join(sorted(SPECS))}")
    arms = f"of {', '.join(sorted(ARMS))} (default: depends on the pool; uniform always runs)"
    add("--arms", nargs="+", choices=sorted(ARMS), metavar="ARM", help=arms)
    add("--arm", choices=sorted(ARMS), default="grace", metavar="ARM", help="whom the claims are about")
    add("--seeds", type=int, default=3, metavar="N", help="number of seeds: 0, 1, …")
    add("--orders", type=int, default=1, help="further orders of uniform for each seed, for the spread that luck makes")
    add("--steps", type=int, default=400, help="optimizer steps of every arm")
    add(
        "--uniform-steps",
        type=_counts,
        help="N,N,... lengths of further uniform runs; default: on crawl 400,...,1600; for peers 600,1000",
    )
    add("--batch", type=int, default=32, help="samples of a step")
    rates = ", ".join(f"{rate:g} for {model}" for model, rate in PEAK_LR.items())
    add("--lr", type=float, help=f"peak; default: what suits uniform on the dev rows, {rates}")
    add("--budget", type=float, default=0.2, help="share of the pool that a subset holds")
    add("--model", choices=sorted(SHAPES), default="small", help="size of the model")
    add("--pool-size", type=int, default=20_000, metavar="N", help="rows of the pool")
    add("--eval-every", type=int, default=50, metavar="N", help="steps between two evaluations")
    add("--final", action="store_true", help="by the test rows: for the final tables, after everything is fixed")
    add("--tried", nargs="+", default=[], metavar="N|ARM=N", help="configurations tried of every arm, or of one")
    add("--corpus", type=Path, help="folder of the second corpus: gsm8k/train.jsonl, tinyshakespeare/input.txt")
    divided = "another one than 0 divides the documents anew, without the final test ones; several: one run in each, its own seed"
    add("--division", type=int, nargs="+", default=[0], metavar="N", help=divided)
    add("--allow-missing-kinds", action="store_true", help="leave out junk kinds whose text is not on this machine")
    add("--jobs", type=int, default=2, help="processes at once, each on one thread")
    add("--limit", type=float, default=3600.0, help="seconds of one run, at most")
    add("--known", type=Path, nargs="+", default=[], metavar="FILE", help="earlier --final records; their runs are taken again")
    add("--out", type=Path, default=Path("runs/benchmarks/selection"), help="where pools and runs are kept")


def run(args: argparse.Namespace, console: Console) -> Record:
    pools, record = measured(args, console)
    record.claims = claims(pools, args.arm, args.model)
    return record


def measured(args: argparse.Namespace, console: Console) -> tuple[list[PoolRuns], Record]:
    """Builds the pools, does the runs that are not there yet; the runs of each pool, and the record without claims.

    Raises:
        DataError: an arm's library is not installed.
        SystemExit: a pool cannot be built, or a run failed.
    """
    tried = read_tried(args.tried)
    require(chosen_arms(args))
    say = functools.partial(console.print, highlight=False, markup=False)
    specs: dict[str, list[RunSpec]] = {}
    for name in pool_names(args):
        specs[name] = []
        for division in args.division:
            pool = prepare(args, name, division)
            say(f"pool {name}: {pool.manifest['rows']['train']} rows, {pool.manifest['kinds']}, {pool.folder}")
            specs[name] += run_specs(args, name, pool, seeds_of(args, division))
    everything = [spec for one in specs.values() for spec in one]
    if args.known:
        say(f"{take_from(args.known, everything, args.out / 'runs')} runs taken from {' '.join(map(str, args.known))}")
    done = run_all(everything, args.out / "runs", jobs=args.jobs, limit_seconds=args.limit, say=say)
    results = dict(zip(everything, done, strict=True))
    metric = "test" if args.final else "dev"
    pools = [PoolRuns(name, [results[spec] for spec in one], metric, args.steps) for name, one in specs.items()]
    record = tables(pools, tried, args.final)
    if len(args.division) > 1:
        divisions = ", ".join(map(str, args.division))
        record.notes.append(f"a seed is a division of the documents ({divisions}), with rows for testing of its own")
    record.notes.append(f"model {args.model}: {done[0]['parameters']:,} parameters, float32, one thread")
    return pools, record


def pool_names(args: argparse.Namespace) -> list[str]:
    """The pools asked for.

    Raises:
        SystemExit: --only names none of the group, or the second corpus is not given.
    """
    names = [name for name in GROUPS[args.pool] if args.only is None or name in args.only]
    if not names:
        raise SystemExit(f"--only {' '.join(args.only)}: none of them is in {args.pool} ({', '.join(GROUPS[args.pool])})")
    needy = [name for name in names if SPECS[name].corpus != STDLIB]
    if args.corpus is None and needy:
        others = " ".join(name for name in names if name not in needy)
        instead = f"; or leave it out with --only {others}" if others else ""
        raise SystemExit(f"pool {' '.join(needy)} needs --corpus DIR{instead}")
    return names


def seeds_of(args: argparse.Namespace, division: int) -> range:
    """The seeds to run in a division: in several of them each is a seed."""
    return range(args.seeds) if len(args.division) == 1 else range(division, division + 1)


def prepare(args: argparse.Namespace, name: str, division: int) -> Stored:
    """The pool called ``name`` of a division."""
    spec = replace(SPECS[name], size=args.pool_size)
    root = None if spec.corpus == STDLIB else args.corpus
    try:
        clean = CorpusSpec(division=division)
        return prepare_pool(spec, args.out / "pools", corpus=clean, root=root, allow_missing=args.allow_missing_kinds)
    except GraceError as error:
        raise SystemExit(str(error)) from None


def run_specs(args: argparse.Namespace, name: str, pool: Stored, seeds: Iterable[int]) -> list[RunSpec]:
    """All runs of a pool: every arm, uniform in further orders, uniform at further lengths."""
    lengths = args.uniform_steps
    if lengths is None:
        lengths = UNIFORM_STEPS if args.pool == "crawl" else ()

    def spec(arm: str, seed: int, order: int, steps: int) -> RunSpec:
        return RunSpec(
            pool=name,
            pool_folder=str(pool.folder.resolve()),
            pool_digest=pool.manifest["digest"],
            arm=arm,
            seed=seed,
            order_seed=order,
            steps=steps,
            batch=args.batch,
            lr=args.lr or PEAK_LR[args.model],
            model=args.model,
            budget=args.budget,
            eval_every=args.eval_every,
        ).stamped()

    found: list[RunSpec] = []
    for seed in seeds:  # a whole seed first: there is something to look at early
        found += [spec(arm, seed, seed, args.steps) for arm in chosen_arms(args)]
        found += [spec("uniform", seed, seed + ORDER * (i + 1), args.steps) for i in range(args.orders)]
        found += [spec("uniform", seed, seed, steps) for steps in lengths if steps != args.steps]
    return found


def chosen_arms(args: argparse.Namespace) -> list[str]:
    """Uniform, then the arms asked for."""
    arms: Sequence[str] = args.arms or (LARGE_ARMS if args.model == "4m" else DEFAULT_ARMS[args.pool])
    return list(dict.fromkeys(("uniform", *arms)))


def read_tried(given: Sequence[str]) -> dict[str, int]:
    """Configurations tried, by arm; a bare number holds for all arms that are not named.

    Raises:
        SystemExit: an entry is neither N nor ARM=N.
    """
    tried: dict[str, int] = {}
    for entry in sorted(given, key=lambda entry: "=" in entry):
        arm, _, count = entry.rpartition("=")
        if not count.isdigit() or (arm and arm not in ARMS):
            raise SystemExit(f"--tried {entry}: give a number, or ARM=NUMBER with one of {', '.join(ARMS)}")
        tried |= dict.fromkeys([arm] if arm else ARMS, int(count))
    return tried


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        counts = ()
    if not counts or counts[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of step counts such as 400,600,800")
    return counts
