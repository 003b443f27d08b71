"""What else an engine may switch on: the plain job's samples and influences, nothing changed in shadow mode, an exact resume."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from tests.multirank.cells import ALONE, CLOSE, EQUAL, RECIPE, REFUSED, compared, on_record, refusal, samples
from tests.multirank.harness import run_command
from tests.multirank.many_jobs import Records, run_many
from tests.multirank.modes import MODES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SAVED = 6  # of cell_job, which is not imported here: it imports DeepSpeed
PLAIN: dict[str, Any] = {"ranks": 2, "parallel": ["DP"], "ds": {"zero_optimization": {"stage": 2}}}
# DeepSpeed's own optimizer for the CPU is compiled first, for two minutes.
COMPILES = bool(os.environ.get("GRACE_TEST_CPU_ADAM"))
RUN = {name: mode for name, mode in MODES.items() if COMPILES or not mode.compiles}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    if COMPILES:
        build = "from deepspeed.ops.op_builder import CPUAdamBuilder as B; B().load()"
        run_command([sys.executable, "-c", build], timeout=600)
    jobs: dict[str, Any] = {f"plain, {recipe}": {**PLAIN, "recipe": recipe, "save": True} for recipe in RECIPE}
    for name, mode in RUN.items():
        job = {**PLAIN, **mode.job}
        jobs |= {f"{name}, {recipe}": {**job, "recipe": recipe, "save": True} for recipe in RECIPE}
        jobs |= {f"{name}, off": {**job, "recipe": None}, f"{name}, shadow": {**job, "recipe": "grace", "mode": "shadow"}}
    return run_many(tmp_path_factory.mktemp("modes"), jobs, timeout=860)


def outcome(records: Records, name: str, recipe: str) -> str:
    """Of a mode under a recipe, once it is certain that its rows are there and its resumed part repeats the first one."""
    found, plain = records[f"{name}, {recipe}"], records[f"plain, {recipe}"]
    if refused := refusal(found):
        return refused
    for rank in found:
        assert (rank["refresh_failures"], rank["unrecognised"], rank["cursor"]) == (0, 0, plain[0]["cursor"])
        assert (rank["collected_rows"] > 0) == (recipe == "grace")
        again, per_step = rank["again"], len(rank["losses"]) // len(rank["steps"])
        assert again["steps"] == rank["steps"][SAVED:]
        assert again["losses"] == rank["losses"][SAVED * per_step :]
        assert samples(again).items() <= samples(rank).items()
    if recipe == "grace" and not MODES[name].comparable:
        return ALONE
    result = compared(found, plain, recipe)
    # Whether other roundings move a sample is this machine's affair.
    return result if recipe == "content" or MODES[name].exact else CLOSE


@pytest.fixture(scope="module")
def recorded(records: Records) -> dict[str, str]:
    found = {f"{name}, {recipe}": outcome(records, name, recipe) for name in RUN for recipe in RECIPE}
    return on_record("modes", found, [f"{name}, {recipe}" for name in MODES for recipe in RECIPE])


@pytest.mark.parametrize("recipe", RECIPE)
@pytest.mark.parametrize("name", RUN)
def test_a_mode_trains_on_the_plain_jobs_samples_and_resumes(
    records: Records, recorded: dict[str, str], name: str, recipe: str
) -> None:
    """A change that is meant is recorded with GRACE_RECORD_CELLS=1."""
    found = outcome(records, name, recipe)
    assert found == recorded[f"{name}, {recipe}"]
    assert found == EQUAL or found.startswith(REFUSED) or (not MODES[name].exact and found in (CLOSE, ALONE))


@pytest.mark.parametrize("name", RUN)
def test_shadow_mode_changes_nothing(records: Records, name: str) -> None:
    """Bit by bit; what the engine refuses it refuses without GRACE as well."""
    off, shadow = records[f"{name}, off"], records[f"{name}, shadow"]
    assert refusal(off) == refusal(shadow)
    if refusal(off):
        return
    for without, rank in zip(off, shadow, strict=True):
        for key in ("steps", "losses", "params"):
            assert rank[key] == without[key]
        assert rank["collected_rows"] > 0
        if "other" in without:
            assert rank["other"]["losses"] == without["other"]["losses"]


def test_steps_that_overflow_are_counted_and_leave_no_rows(records: Records) -> None:
    for rank in records["fp16 overflows, grace"]:
        skipped = {1 + step for step, applied in enumerate(rank["applied"]) if not applied}
        assert skipped and len(skipped) < len(rank["applied"]) // 2
        assert rank["row of step"] and not skipped & set(rank["row of step"].values())
    for rank in records["fp16, grace"]:
        assert all(rank["applied"])


@pytest.mark.parametrize("recipe", RECIPE)
def test_a_second_engine_with_grace_has_samples_and_rows_of_its_own(records: Records, recipe: str) -> None:
    for rank, plain in zip(records[f"two with GRACE, {recipe}"], records[f"plain, {recipe}"], strict=True):
        assert samples(rank["other"]) == samples(plain)
        assert rank["other"]["steps"] == plain["steps"]
        assert (rank["other"]["unrecognised"], rank["other"]["collected_rows"]) == (0, plain["collected_rows"])
