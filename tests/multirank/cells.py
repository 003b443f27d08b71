"""Settings of a job that are tried together: the axes, the cells that cover every pair of their values, and what is on record.

Nothing heavy is imported here: the tests that run the cells and the one that compares the documentation read the same lists.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

RECORD = Path(__file__).with_name("cells.json")

# What came of a job: the samples, order and roles of the one-rank job; or other samples, with influences of the same ranking; or
# no job to compare with; or a refusal, "refused: " and a key of REASONS.
EQUAL, CLOSE, ALONE, REFUSED = "equal", "close", "alone", "refused: "

ZERO = ("0", "1", "2", "3", "1 + offload")
# Ranks of each kind; a product of two runs on four.
PARALLEL = ("DP", "TP", "PP", "SP", "DP × TP", "DP × PP", "DP × SP", "TP × PP", "TP × SP", "PP × SP")
RECIPE = ("content", "grace")
RECOMPUTED = ("plain", "checkpointing")


@dataclass(frozen=True)
class Cell:
    """One job: a value of each axis.

    Attributes:
        zero: ZeRO stage, of :data:`ZERO`.
        parallel: what is laid over two ranks each, of :data:`PARALLEL`.
        recipe: of the block.
        recomputed: whether activations are recomputed, of :data:`RECOMPUTED`.
    """

    zero: str
    parallel: str
    recipe: str
    recomputed: str

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is laid over two ranks each."""
        return tuple(self.parallel.split(" × "))

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return int(2 ** len(self.kinds))

    @property
    def name(self) -> str:
        """As a test's parameter."""
        return f"ZeRO {self.zero}, {self.parallel}, {self.recipe}, {self.recomputed}"


@dataclass(frozen=True)
class Reason:
    """Why a job is not run.

    Attributes:
        by: who refuses it: GRACE, or the engine, with GRACE or without.
        words: that the error holds.
        text: the reason, for the page.
    """

    by: str
    words: str
    text: str


REASONS = {
    "two kinds": Reason(
        "GRACE", "one of them at a time", "GRACE refuses `recipe: grace`: two kinds of model parallelism in one model"
    ),
    "same ranks": Reason(
        "GRACE", "over the same ranks", "GRACE refuses it: DeepSpeed lays tensor- and sequence-parallel ranks over one another"
    ),
    "stages": Reason(
        "engine",
        "ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism",
        "DeepSpeed refuses ZeRO 2 and 3 with a pipeline",
    ),
    "no peers": Reason(
        "engine", "has no attribute 'seq_parallel_group'", "DeepSpeed's PipelineEngine has no sequence parallelism"
    ),
    "no operator": Reason(
        "engine",
        "This op had not been implemented on CPU backend",
        "DeepSpeed has the operators for it on GPUs only: not tried here",
    ),
}


def refusal(records: list[dict[str, Any]]) -> str:
    """The outcome of a job that no rank runs, for one known reason; empty if all ranks run it.

    Raises:
        AssertionError: some rank ran it and another did not, or the error is none of :data:`REASONS`.
    """
    errors = [(r["by"], r["error"]) for r in records if "error" in r]
    if not errors:
        return ""
    for key, reason in REASONS.items():
        if len(errors) == len(records) and all(by == reason.by and reason.words in error for by, error in errors):
            return REFUSED + key
    raise AssertionError(f"{len(errors)} of {len(records)} ranks: {errors}")


def samples(record: dict[str, Any]) -> dict[int, Any]:
    """What the schedules of a record hold, by version: start, ids in order, roles."""
    return {version: (s["start"], s["ids"], s["roles"]) for version, s in record["schedules"].items()}


def ranked_alike(records: list[dict[str, Any]], others: list[dict[str, Any]]) -> float:
    """Rank correlation of the influences of the samples that two jobs have both measured; NaN if there are too few."""
    (a, b) = ({i: x for r in job for i, x in r["influence"].items() if x == x} for job in (records, others))
    both = sorted(a.keys() & b.keys())
    if len(both) < 10:
        return float("nan")
    ranks = [np.argsort(np.argsort([of[i] for i in both])) for of in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def compared(records: list[dict[str, Any]], others: list[dict[str, Any]], recipe: str | None) -> str:
    """The outcome of a job that ran, beside one that should have chosen alike."""
    assert all(samples(r) == samples(records[0]) for r in records), "ranks hold different schedules"
    alike = ranked_alike(records, others) if recipe == "grace" else 1.0
    assert alike >= 0.99, f"the influences' ranks correlate by {alike} only"
    return EQUAL if samples(records[0]) == samples(others[0]) else CLOSE


def on_record(part: str, found: dict[str, str], known: Iterable[str]) -> dict[str, str]:
    """The recorded outcomes of ``part``; if GRACE_RECORD_CELLS is set, those ``found`` now are written down first.

    Args:
        known: names that the record may hold: what was not run now keeps its outcome.
    """
    record: dict[str, dict[str, str]] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if os.environ.get("GRACE_RECORD_CELLS"):
        merged = {**record.get(part, {}), **found}
        record[part] = {name: merged[name] for name in known if name in merged}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    return record.get(part, {})


def pairs(cell: Cell) -> set[tuple[str, str, str, str]]:
    """Every two of its values, each with its axis."""
    return {(*a, *b) for a, b in itertools.combinations(asdict(cell).items(), 2)}


def covering(cells: Iterable[Cell]) -> list[Cell]:
    """A few of the cells in which every pair of values is found that is found in any; the same list each time.

    Always the next cell with the most pairs that are not yet covered; of several, the one that uses the least used values.
    """
    left = list(cells)
    open_pairs = set[tuple[str, str, str, str]]().union(*map(pairs, left))
    used: dict[tuple[str, str], int] = {}
    chosen = []
    while open_pairs:
        best = max(left, key=lambda c: (len(pairs(c) & open_pairs), -sum(used.get(v, 0) for v in asdict(c).items())))
        chosen.append(best)
        left.remove(best)
        open_pairs -= pairs(best)
        for value in asdict(best).items():
            used[value] = used.get(value, 0) + 1
    return chosen


def every() -> Iterator[Cell]:
    """All cells that DeepSpeed has."""
    for values in itertools.product(ZERO, PARALLEL, RECIPE, RECOMPUTED):
        if not impossible(cell := Cell(*values)):
            yield cell


def impossible(cell: Cell) -> str:
    """Why DeepSpeed has no such job; empty if it has."""
    if cell.parallel in ("TP × SP", "PP × SP"):
        return cell.parallel
    return "a pipeline with ZeRO 2 or 3" if "PP" in cell.kinds and cell.zero in ("2", "3") else ""


def chosen() -> list[Cell]:
    """The cells that are run.

    The covering ones; each of them with the recipe that asks for less, too, so that every layout is run with every stage also
    where the other recipe is refused; and one for every two values that DeepSpeed does not join.
    """
    pairwise = covering(every())
    fewer_asks = [replace(cell, recipe=RECIPE[0]) for cell in pairwise]
    never = [Cell(zero, parallel, RECIPE[0], RECOMPUTED[0]) for zero in ZERO for parallel in PARALLEL]
    never = [c for c in never if impossible(c) and (impossible(c) != c.parallel or c.zero == ZERO[0])]
    return list(dict.fromkeys(pairwise + fewer_asks + never))
