"""Layouts, ZeRO stages, recipes and recomputation together: the samples of the one-rank job, or a refusal that is on record."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from tests.multirank.cells import (
    EQUAL,
    PARALLEL,
    RECIPE,
    RECOMPUTED,
    REFUSED,
    ZERO,
    Cell,
    chosen,
    compared,
    impossible,
    on_record,
    refusal,
)
from tests.multirank.many_jobs import Records, run_many

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CELLS = chosen()


def job_of(cell: Cell) -> dict[str, Any]:
    section: dict[str, Any] = {"stage": int(cell.zero[0])}
    if "offload" in cell.zero:
        section["offload_optimizer"] = {"device": "cpu"}
    return {
        "ranks": cell.ranks,
        "parallel": list(cell.kinds),
        "recipe": cell.recipe,
        "recomputed": "plain" if cell.recomputed == "plain" else "nonreentrant",
        "ds": {"zero_optimization": section},
    }


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    one = {recipe: {"ranks": 1, "recipe": recipe} for recipe in RECIPE}
    return run_many(tmp_path_factory.mktemp("cells"), one | {cell.name: job_of(cell) for cell in CELLS}, timeout=860)


def outcome(records: Records, cell: Cell) -> str:
    """Of a cell, once it is certain that what was trained on is what the schedule says."""
    found, (one,) = records[cell.name], records[cell.recipe]
    if refused := refusal(found):
        return refused
    for rank in found:
        assert (rank["refresh_failures"], rank["unrecognised"], rank["cursor"]) == (0, 0, one["cursor"])
    if cell.recipe == "grace":
        assert sum(rank["collected_rows"] for rank in found) > 0
    result = compared(found, [one], cell.recipe)
    if result == EQUAL:
        assert trained(found) == trained([one])
    return result


def trained(ranks: list[dict[str, Any]]) -> list[list[int]]:
    """The ids of each step, sorted: what ranks of one model have seen alike counts once, what a stage does not see not at all."""
    steps = zip(*(rank["steps"] for rank in ranks), strict=True)
    return [sorted(itertools.chain(*{tuple(ids) for ids in step})) for step in steps]


@pytest.fixture(scope="module")
def recorded(records: Records) -> dict[str, str]:
    return on_record("matrix", {cell.name: outcome(records, cell) for cell in CELLS}, [cell.name for cell in CELLS])


def test_every_two_values_that_can_be_joined_are_joined_in_a_cell() -> None:
    axes = {"zero": ZERO, "parallel": PARALLEL, "recipe": RECIPE, "recomputed": RECOMPUTED}
    for (a, left), (b, right) in itertools.combinations(axes.items(), 2):
        for x, y in itertools.product(left, right):
            able = [c for c in CELLS if getattr(c, a) == x and getattr(c, b) == y and not impossible(c)]
            never = {a, b} == {"zero", "parallel"} and impossible(Cell(x, y, *RECIPE[:1], *RECOMPUTED[:1]))
            assert able or never or y in ("TP × SP", "PP × SP") or x in ("TP × SP", "PP × SP"), (x, y)
    assert len(CELLS) < 0.4 * len(ZERO) * len(PARALLEL) * len(RECIPE) * len(RECOMPUTED)


@pytest.mark.parametrize("recipe", RECIPE)
def test_one_rank_trains_on_its_schedules(records: Records, recipe: str) -> None:
    (one,) = records[recipe]
    schedules, batch = one["schedules"], len(one["steps"][0])
    slots = np.concatenate(
        [s["ids"][: schedules[v + 1]["start"] - s["start"]] if v + 1 in schedules else s["ids"] for v, s in schedules.items()]
    )
    assert np.concatenate(one["steps"]).tolist() == slots[: len(one["steps"]) * batch].tolist()
    assert len(schedules) > 2 and (sum(x == x for x in one["influence"].values()) > 10) == (recipe == "grace")


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_cell_trains_as_one_rank_does_or_is_refused(records: Records, recorded: dict[str, str], cell: Cell) -> None:
    """A change that is meant is recorded with GRACE_RECORD_CELLS=1."""
    found = outcome(records, cell)
    assert found == recorded[cell.name]
    assert cell.recipe == "grace" or found == EQUAL or found.startswith(REFUSED)
