"""GRACE beside other people's methods and libraries: the same model, rows, steps and seeds, each one's selection paid for.

What runs is the selection benchmark (``python -m benchmarks selection``) with further arms. ``dattri``: dattri-llm takes rows
out of the gradient inside of each step. ``bergson``: bergson's gradient scores of the whole pool, once. ``dsir_library``: DSIR
by its authors' library. ``offline``: near-duplicates out by datasketch, then a fastText classifier of trusted against pool
text. ``bm25``: likeness to the trusted set by bm25s. ``token_frequency``: the filter by priors of tokens (arXiv 2509.18577),
which has no package.

The rule by which it is decided, written down before any run. An arm's gain is counted net of what its selection cost: a run of
n steps whose training took t CPU seconds and whose selection took s could have been uniform training of n (t + s) / t steps,
its own seconds being the measure, so that what else the machine did at the time cancels. Its net gain is the loss of uniform
training of that many steps, with a schedule of that length and the same seed, minus the arm's loss. Uniform is run at several
lengths and read between them by a straight line in the logarithm of the steps; beyond the longest its loss there stands for it,
which flatters the arm, so a peer that is so dear is compared too kindly. The margin over a peer is the mean over seeds of
GRACE's net gain minus the peer's, in standard errors of that difference. The best peer of a pool is the one of the highest mean
net gain on the rows that are reported, which favours the peers. ``peers_margin_crawl`` is the margin over the best peer of that
pool, ``peers_margin_generated`` the least over the pools of machine-written code; the goal of both is 2. Settings of the peers
are their libraries' or papers' own; where there was a choice, it was made on the rows for choosing of ``crawl`` and
``generated-50``.

The peers' libraries: ``pip install 'grace_ds[peers]'``. Without some of them: ``--without-missing``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.quickstart import standard_error
from benchmarks.record import Claim, Record, SampleRecords
from benchmarks.selection import matrix
from benchmarks.selection.arms.libraries import PEERS, installed, missing
from benchmarks.selection.claims import is_generated
from benchmarks.selection.report import PoolRuns

OTHERS = (*PEERS, "rs2", "uniform")  # what the margin is over
UNIFORM_STEPS = (600, 1000)
GOAL = 2.0
NOT_RUN = (
    "not run: DataFlex, which trains another model (SmolLM2-135M with LoRA) in an environment of its own (torchaudio <= 2.6)",
    "not run: a KenLM filter; kenlm 0.3.0 builds from its source, but cannot train a model (no lmplz): fastText instead",
)
NOTES = (
    "equal steps: uniform's steps in the CPU seconds that the arm took, its selection counted in; "
    ">: uniform's longest run is shorter",
    "net gain: loss of uniform training of that many steps minus the arm's, nats/token; ahead: the net gain of the arm that the "
    "claims are about minus this one's, mean ± standard error of the difference over seeds",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    matrix.add_arguments(parser, pool="peers")
    parser.set_defaults(orders=0, uniform_steps=UNIFORM_STEPS)
    parser.add_argument("--without-missing", action="store_true", help="leave out the arms whose library is not installed")


def run(args: argparse.Namespace, console: Console) -> Record:
    arms = matrix.chosen_arms(args)
    absent = missing(arms)
    if args.without_missing:
        args.arms = [arm for arm in arms if arm not in absent]
    pools, record = matrix.measured(args, console)
    record.name = "peers"
    for runs in pools:
        record.rows[f"{runs.pool}, net of CPU"] = net_rows(runs, args.arm)
    record.claims = claims(pools, args.arm)
    record.notes += [*NOTES, *NOT_RUN]
    record.notes += [f"not run: {arm}, {' and '.join(names)} not installed" for arm, names in absent.items()]
    record.notes += [f"{arm}: {installed(arm)}" for arm in args.arms or arms if installed(arm)]
    return record


@dataclass(frozen=True)
class Net:
    """An arm's run against uniform training of equal CPU seconds.

    Attributes:
        steps: of that uniform training.
        beyond: whether these are more than the longest uniform run has; its loss stands for theirs.
        gain: uniform's loss minus the arm's, nats per token.
    """

    steps: float
    beyond: bool
    gain: float


def net(run: dict[str, Any], uniform: Sequence[dict[str, Any]], metric: str) -> Net:
    """An arm's run against the uniform runs of its seed, by the loss called ``metric``.

    Args:
        uniform: one for each length, at least one.
    """
    own = int(run["settings"]["steps"])
    steps = own * float(run["cpu_total"]) / (float(run["cpu_total"]) - float(run["cpu_selection"]))
    ordered = sorted(uniform, key=lambda r: int(r["settings"]["steps"]))
    lengths = [int(r["settings"]["steps"]) for r in ordered]
    loss = float(np.interp(np.log(steps), np.log(lengths), [float(r[metric]) for r in ordered]))
    return Net(steps, steps > lengths[-1], loss - float(run[metric]))


def nets(runs: PoolRuns, arm: str) -> dict[int, Net]:
    """The arm's runs by seed; a seed without a uniform run has none."""
    found: dict[int, Net] = {}
    for run in runs.of(arm):
        seed = int(run["settings"]["seed"])
        uniform = [
            r
            for r in runs.runs
            if (r["settings"]["arm"], r["settings"]["seed"], r["settings"]["order_seed"]) == ("uniform", seed, seed)
        ]
        if uniform:
            found[seed] = net(run, uniform, runs.metric)
    return found


def ahead(runs: PoolRuns, arm: str, other: str) -> list[float]:
    """The net gain of ``arm`` minus that of ``other``, seed by seed, nats per token."""
    mine, theirs = nets(runs, arm), nets(runs, other)
    return [mine[seed].gain - theirs[seed].gain for seed in sorted(mine) if seed in theirs]


def in_errors(apart: Sequence[float]) -> float | None:
    """The mean in standard errors of itself; None for fewer than two seeds, which have none."""
    error = standard_error(list(apart))
    return float(np.mean(apart)) / error if error else None


def best_peer(runs: PoolRuns) -> str | None:
    """The one of the highest mean net gain; None where none ran."""
    gains = {arm: np.mean([found.gain for found in nets(runs, arm).values()]) for arm in OTHERS if nets(runs, arm)}
    return max(gains, key=lambda arm: float(gains[arm]), default=None)


def net_rows(runs: PoolRuns, arm: str) -> SampleRecords:
    """One line for each arm of the pool, the best net gain first; ``ahead`` is what ``arm`` has beyond it."""
    rows: SampleRecords = []
    for other in runs.arms:
        found, apart = list(nets(runs, other).values()), ahead(runs, arm, other) if other != arm else []
        if not found:
            continue
        bound = ">" if any(n.beyond for n in found) else ""
        rows.append(
            {
                "arm": other,
                "seeds": len(found),
                "choosing, CPU s": float(np.mean([r["cpu_selection"] for r in runs.of(other)])),
                "equal steps": f"{bound}{np.mean([n.steps for n in found]):.0f}",
                "net gain": float(np.mean([n.gain for n in found])),
                "± s.e.": standard_error([n.gain for n in found]),
                "ahead": float(np.mean(apart)) if apart else None,
                "± s.e. of it": standard_error(apart) if apart else None,
                "in s.e.": in_errors(apart),
            }
        )
    return sorted(rows, key=lambda row: -float(row["net gain"]))


def claims(pools: Sequence[PoolRuns], arm: str) -> list[Claim]:
    """The margins of ``arm`` over the best peers of the pools that were run on at least two seeds."""
    margins: dict[str, tuple[str, float]] = {}
    for runs in pools:
        peer = best_peer(runs)
        margin = None if peer is None else in_errors(ahead(runs, arm, peer))
        if peer is not None and margin is not None:
            margins[runs.pool] = peer, margin
    found: list[Claim] = []
    generated = {pool: told for pool, told in margins.items() if is_generated(pool)}
    unit = f"standard errors of the difference, {arm}'s net gain minus the best peer's"
    if generated:
        over = ", ".join(f"{peer} on {pool}" for pool, (peer, _) in generated.items())
        found.append(
            Claim("peers_margin_generated", min(m for _, m in generated.values()), f"{unit}, least of {over}", GOAL, True)
        )
    for pool, (peer, margin) in margins.items():
        if pool not in generated:
            found.append(Claim(f"peers_margin_{pool}", margin, f"{unit}, {peer}", GOAL if pool == "crawl" else None, True))
    return found
