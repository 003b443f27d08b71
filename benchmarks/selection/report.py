"""From runs to tables: each arm against uniform of the same seed, in shares of the oracle's gain and in uniform's own steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.quickstart import standard_error
from benchmarks.record import Record, SampleRecords
from benchmarks.selection.equal_loss import Ratios, joint_bound, ratios
from benchmarks.selection.pools import HELDOUT

Runs = Sequence[dict[str, Any]]
NOTES = [
    "delta: loss minus uniform's of the same seed after the last step, nats/token; mean ± standard error over the seeds",
    "share: of the oracle's mean gain over uniform",
    "steps ×: uniform's steps to the same loss / the arm's steps, mean over the seeds; from uniform runs of several lengths, "
    "each with its own schedule; >: a lower bound, the longest is above it; <: an upper bound, the shortest is below; ?: mixed",
    "net ×: the same in CPU seconds, net F ×: in FLOPs, the arm's selection counted in",
    "choosing: share of the arm's CPU seconds that went into selection",
    "luck: r.m.s. difference of uniform in another order, same weights",
    "tried: configurations of the arm that were tried before this one was fixed",
]


@dataclass
class PoolRuns:
    """The runs of one pool.

    Args:
        pool: its name.
        runs: results of jobs.
        metric: ``dev`` or ``test``.
        steps: of the comparison.
    """

    pool: str
    runs: Runs
    metric: str
    steps: int

    def of(self, arm: str) -> list[dict[str, Any]]:
        """The arm's runs of the compared length, by seed, in the main order."""
        found = [
            r
            for r in self.runs
            if r["settings"]["arm"] == arm
            and r["settings"]["steps"] == self.steps
            and r["settings"]["order_seed"] == r["settings"]["seed"]
        ]
        return sorted(found, key=lambda r: int(r["settings"]["seed"]))

    @property
    def arms(self) -> list[str]:
        """In the order of the runs."""
        return list(dict.fromkeys(r["settings"]["arm"] for r in self.runs))

    def deltas(self, arm: str) -> list[float]:
        """Loss minus uniform's, seed by seed."""
        uniform = {r["settings"]["seed"]: r[self.metric] for r in self.of("uniform")}
        return [float(r[self.metric] - uniform[r["settings"]["seed"]]) for r in self.of(arm) if r["settings"]["seed"] in uniform]

    def share(self, arm: str) -> float | None:
        """Of the oracle's mean gain; None without an oracle, or where that gains nothing."""
        oracle, mine = self.deltas("oracle"), self.deltas(arm)
        if not oracle or not mine or np.mean(oracle) >= 0:
            return None
        return float(np.mean(mine) / np.mean(oracle)) + 0.0  # no -0

    def ratios(self, arm: str) -> list[Ratios]:
        """Against uniform training of equal loss, seed by seed; empty where uniform ran at one length only."""
        found: list[Ratios] = []
        for run in self.of(arm):
            seed = run["settings"]["seed"]
            uniform = [
                r
                for r in self.runs
                if (r["settings"]["arm"], r["settings"]["seed"], r["settings"]["order_seed"]) == ("uniform", seed, seed)
            ]
            if len(uniform) > 1:
                found.append(ratios(run, uniform, self.metric))
        return found

    def luck(self) -> float | None:
        """R.m.s. difference between uniform runs that differ in the order alone."""
        main = {r["settings"]["seed"]: r[self.metric] for r in self.of("uniform")}
        others = [
            r[self.metric] - main[r["settings"]["seed"]]
            for r in self.runs
            if r["settings"]["arm"] == "uniform"
            and r["settings"]["steps"] == self.steps
            and r["settings"]["order_seed"] != r["settings"]["seed"]
            and r["settings"]["seed"] in main
        ]
        return float(np.sqrt(np.mean(np.square(others)))) if others else None

    def choosing(self, arm: str) -> float:
        """Share of the arm's CPU seconds that went into selection, mean over the seeds."""
        return float(np.mean([r["cpu_selection"] / r["cpu_total"] for r in self.of(arm)]))


def arm_row(runs: PoolRuns, arm: str, tried: int | None) -> dict[str, Any]:
    """One line of a pool's table."""
    mine, deltas, against = runs.of(arm), runs.deltas(arm), runs.ratios(arm)
    bound = joint_bound([r.bound for r in against])

    def times(values: list[float]) -> str | None:
        return f"{bound}{np.mean(values):.3f}" if values else None

    return {
        "arm": arm,
        "seeds": len(mine),
        runs.metric: float(np.mean([r[runs.metric] for r in mine])),
        "delta": float(np.mean(deltas)) if deltas else None,
        "± s.e.": standard_error(deltas) if deltas else None,
        "worst": max(deltas, default=None),
        "share": runs.share(arm),
        "steps ×": times([r.steps for r in against]),
        "net ×": times([r.cpu for r in against]),
        "net F ×": times([r.flops for r in against]),
        "CPU s": float(np.mean([r["cpu_total"] for r in mine])),
        "choosing": runs.choosing(arm),
        "repeats": float(np.mean([r["repeats"] for r in mine])),
        "tried": tried,
    }


def run_row(run: Mapping[str, Any], final: bool) -> dict[str, Any]:
    """What is kept of a run: without the test loss before the final tables, without kinds on the held-out pools ever.

    The folder of its pool is left out: it says where, not what.
    """
    settings = {key: value for key, value in run["settings"].items() if key != "pool_folder"}
    hidden = {"settings", "test"} if not final else {"settings"}
    if settings["pool"] in HELDOUT:
        hidden.add("kinds")
    row = {**settings, **{key: value for key, value in run.items() if key not in hidden}}
    row["curve"] = [{k: v for k, v in point.items() if final or k != "test"} for point in run["curve"]]
    row["told"] = {key: value for key, value in run["told"].items() if key != "block"}
    return row


def ratio_rows(runs: PoolRuns) -> SampleRecords:
    """The ratios of each run, with their bounds."""
    return [
        {"pool": runs.pool, "arm": arm, "seed": run["settings"]["seed"], **vars(found)}
        for arm in runs.arms
        for run, found in zip(runs.of(arm), runs.ratios(arm), strict=False)
    ]


def uniform_row(runs: PoolRuns) -> dict[str, Any]:
    """What uniform does at each length, and how much its order matters."""
    losses: dict[int, list[float]] = {}
    for r in runs.runs:
        s = r["settings"]
        if s["arm"] == "uniform" and s["order_seed"] == s["seed"]:
            losses.setdefault(int(s["steps"]), []).append(float(r[runs.metric]))
    row = {"pool": runs.pool, "luck": runs.luck()}
    return {**row, **{f"{steps} steps": float(np.mean(losses[steps])) for steps in sorted(losses)}}


def tables(pools: Sequence[PoolRuns], tried: Mapping[str, int], final: bool) -> Record:
    """The record without its claims."""
    record = Record("selection", notes=list(NOTES))
    record.notes.append(
        "losses on the test rows: final" if final else "losses on the dev rows, to choose by; the test rows are for --final"
    )
    for runs in pools:
        record.rows[f"{runs.pool}, {runs.steps} steps"] = [arm_row(runs, arm, tried.get(arm)) for arm in runs.arms]
        record.rows[f"{runs.pool}, uniform"] = [uniform_row(runs)]
    for name, rows in (
        ("ratios", [row for runs in pools for row in ratio_rows(runs)]),
        ("runs", [run_row(r, final) for runs in pools for r in runs.runs]),
    ):
        record.rows[name] = rows
        record.hidden.append(name)
    return record
