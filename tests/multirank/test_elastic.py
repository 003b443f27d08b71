"""A run that goes on with 1, 4 and again 2 ranks trains on the very samples of the undisturbed one, at ZeRO 1, 2 and 3."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.multirank.harness import run_module
from tests.multirank.launch import COLLECTING, Records, environment, run_jobs, stream
from tests.multirank.universal import SUFFIX

pytestmark = [pytest.mark.multirank, pytest.mark.slow, pytest.mark.timeout(1200)]

LEG = 4  # steps between two changes
LEGS = (2, 1, 4, 2)  # ranks
STAGES = (1, 2, 3)
# What the gradients decide depends on where a sample was trained on, so the recorded schedules are replayed; what content
# decides does not, and the run chooses for itself.
RECIPES: dict[str, dict[str, Any]] = {
    "replay": COLLECTING,
    "content": {**COLLECTING, "recipe": "content", "pseudo_trusted": True},
}
NAMES = [f"{recipe}-{stage}" for recipe in RECIPES for stage in STAGES]


def job(folder: Path, recipe: str, stage: int, leg: int) -> dict[str, Any]:
    """Leg 0 runs to the end of all legs, which makes it the undisturbed run too."""
    name, grace = f"{recipe}-{stage}", RECIPES[recipe]
    spec: dict[str, Any] = {"stage": stage, "bf16": False, "workers": 0, "steps": LEG * (leg + 1 if leg else len(LEGS))}
    spec |= {"save": str(folder / f"leg{leg}" / name), "save_at": [LEG * (leg + 1)]}
    if not leg:
        return {**spec, "grace": {**grace, "run_dir": str(folder / "runs" / name)}}
    if recipe == "replay":
        grace = {**grace, "replay": str(folder / "runs" / name / "schedules")}
    loaded = {"load": str(folder / f"leg{leg - 1}" / name), "load_tag": f"global_step{LEG * leg}{SUFFIX}"}
    return {**spec, **loaded, "grace": grace, "ds": {"checkpoint": {"load_universal": True}}}


@pytest.fixture(scope="module")
def legs(tmp_path_factory: pytest.TempPathFactory) -> list[Records]:
    folder = tmp_path_factory.mktemp("elastic")
    made: list[Records] = []
    for leg, ranks in enumerate(LEGS):
        # By stage, the third at the end: it replaces a function of torch for the whole process.
        jobs = {f"{recipe}-{stage}": job(folder, recipe, stage, leg) for stage in STAGES for recipe in RECIPES}
        made.append(run_jobs(folder / f"launch{leg}", jobs, ranks, timeout=300)[0])
        saved = [str(folder / f"leg{leg}" / name / f"global_step{LEG * (leg + 1)}") for name in jobs]
        if leg < len(LEGS) - 1:
            run_module("tests.multirank.universal", saved, timeout=200, env=environment(folder))
    return made


@pytest.mark.parametrize("name", NAMES)
def test_no_sample_is_lost_or_doubled(legs: list[Records], name: str) -> None:
    whole = stream(legs[0][name])
    assert len(whole) == LEG * len(LEGS)
    parts = whole[:LEG] + [batch for records in legs[1:] for batch in stream(records[name])]
    assert parts == whole
    assert Counter(i for batch in parts for i in batch) == Counter(i for batch in whole for i in batch)


@pytest.mark.parametrize("name", NAMES)
def test_the_engine_goes_on_where_it_was(legs: list[Records], name: str) -> None:
    for leg, records in enumerate(legs[1:], 1):
        for rank in records[name]:
            assert rank["metrics"]["cursor"] == 8 * LEG * (leg + 1)
    whole, parts = legs[0][name][0]["losses"], legs[-1][name][0]["losses"]
    assert parts == pytest.approx(whole[-LEG:], abs=1e-3)  # the sums of the gradients are rounded in another order
