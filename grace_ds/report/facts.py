"""Derive numbers from a run's records, for both the page and the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from grace_ds.records import Array, IntArray, Role, Schedule
from grace_ds.report.load import Run


@dataclass(frozen=True)
class Generation:
    """One refresh.

    Attributes:
        version, step: of its schedule.
        uniform: whether the schedule is the whole pool in uniform order.
        size: samples of the coreset.
        window: samples that it was chosen from.
        churn: share of the scheduled core that the schedule before did not hold; None if either is uniform or missing.
        age: (core,) number of consecutive schedules with each core sample, 1 for a new one; None for a uniform schedule.
        seconds: by stage.
        level, reason: of the guard; empty without a decision.
        guard: numbers of its decision.
    """

    version: int
    step: int
    uniform: bool
    size: int
    window: int
    churn: float | None
    age: Array | None
    seconds: dict[str, float]
    level: str
    reason: str
    guard: dict[str, float]


@dataclass(frozen=True)
class Cost:
    """Seconds of this run's rank 0.

    Attributes:
        training: up to the last refresh, or to the end if that is known; None if it is not recorded.
        refreshes, collect: of the same time.
        whole: whether the figures are of the whole run.
        failures: number of refreshes given up.
    """

    training: float | None
    refreshes: float
    collect: float
    whole: bool
    failures: int


@dataclass(frozen=True)
class Use:
    """Samples in the schedules: all up to the start of the last one, and the last one as planned.

    Attributes:
        slots: number of positions.
        distinct: number of different samples.
        most: occurrences of the most repeated sample.
    """

    slots: int
    distinct: int
    most: int


@dataclass(frozen=True)
class Facts:
    """All values of a run that page and terminal show, except the figures."""

    generations: list[Generation]
    cost: Cost
    use: Use | None
    shares: list[tuple[str, float, float]]  # source, share of the pool, share of the samples trained on by choice
    delta: float | None  # grace minus uniform, nats per token, at the last step that both have


def facts(run: Run) -> Facts:
    """Derive all facts of a run."""
    return Facts(_generations(run), _cost(run), _use(run), _shares(run), _delta(run))


def core(schedule: Schedule) -> IntArray:
    """Return the sorted ids that are in the schedule by choice."""
    return np.unique(schedule.ids[schedule.roles == Role.CORE])


def _generations(run: Run) -> list[Generation]:
    generations: list[Generation] = []
    ages: dict[int, int] = {}
    last: tuple[int, IntArray] | None = None
    for version, line in run.refreshes.items():
        schedule, uniform = run.schedules.get(version), line.get("objective") == "uniform"
        churn, age = None, None
        if schedule is not None and not uniform:
            ids = core(schedule)
            follows = last is not None and last[0] == version - 1
            if last is not None and follows:
                churn = 1 - float(np.isin(ids, last[1]).mean())
            ages = {int(i): (ages.get(int(i), 0) if follows else 0) + 1 for i in ids}
            age, last = np.array(list(ages.values())), (version, ids)
        else:
            ages, last = {}, None
        guard: dict[str, Any] = line.get("guard") or {}
        numbers = {k: float(v) for k, v in guard.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        generations.append(
            Generation(
                version,
                int(line.get("step", 0)),
                uniform,
                int(line.get("coreset", 0)),
                int(line.get("window", 0)),
                churn,
                age,
                {str(k): float(v) for k, v in line.get("seconds", {}).items()},
                str(guard.get("level", "")),
                str(guard.get("reason", "")),
                numbers,
            )
        )
    return generations


def _cost(run: Run) -> Cost:
    recorded: dict[str, Any] = (run.results.get("grace") or {}).get("grace") or {}
    if recorded:
        training = float(run.results["grace"]["train_seconds"])
        failures = int(recorded.get("refresh_failures", 0))
        return Cost(training, float(recorded["refresh_seconds"]), float(recorded["collect_seconds"]), True, failures)
    before = [line["before"] for line in run.refreshes.values() if line.get("before")]
    if before and before[-1]["train_seconds"] > 0:
        last = before[-1]
        return Cost(last["train_seconds"], last["refresh_seconds"], last["collect_seconds"], False, int(last["failures"]))
    total = sum(sum(line.get("seconds", {}).values()) for line in run.refreshes.values())
    return Cost(None, float(total), 0.0, False, 0)


def _use(run: Run) -> Use | None:
    if not run.schedules:
        return None
    held = sorted(run.schedules.values(), key=lambda s: s.start)
    ends = [s.start for s in held[1:]] + [held[-1].start + len(held[-1])]
    last = held[-1].meta
    if "next_refresh_step" in last and "batch" in last:
        steps = int(last["next_refresh_step"]) - int(last["decided_at_step"])
        ends[-1] = min(ends[-1], held[-1].start + steps * int(last["batch"]))
    ids = np.concatenate([s.ids[: max(0, end - s.start)] for s, end in zip(held, ends, strict=True)])
    if not len(ids):
        return None
    _, counts = np.unique(ids, return_counts=True)
    return Use(len(ids), len(counts), int(counts.max()))


def _shares(run: Run) -> list[tuple[str, float, float]]:
    chosen = [core(s) for s in run.schedules.values() if s.meta.get("objective") != "uniform"]
    if run.sources is None or not chosen:
        return []
    labels, names = run.sources
    ids = np.concatenate(chosen)
    if ids.max() >= len(labels):
        run.notes.append(f"The sources name {len(labels)} samples, the schedules hold id {ids.max()}: they are not shown.")
        return []
    pool, picked = (np.bincount(v, minlength=len(names)) / len(v) for v in (labels, labels[ids]))
    return [(name, float(a), float(b)) for name, a, b in zip(names, pool, picked, strict=True)]


def _delta(run: Run) -> float | None:
    if not {"uniform", "grace"} <= run.curves.keys():
        return None
    ends = dict(run.curves["uniform"]), dict(run.curves["grace"])
    common = ends[0].keys() & ends[1].keys()
    return ends[1][max(common)] - ends[0][max(common)] if common else None
