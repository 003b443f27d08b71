"""Checkpoints that cannot be written or read: every rank says which file and what to do, and older ones still load."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grace_ds.integrations.checkpoint_state import SCHEMA
from tests.multirank.launch import COLLECTING, Records, run_jobs, stream

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(400)]

GRACE: dict[str, Any] = COLLECTING
BASE: dict[str, Any] = {"steps": 9, "bf16": False, "grace": GRACE}
STEP = 6
OURS = f"global_step{STEP}/grace_ds"
MODEL = f"global_step{STEP}/mp_rank_00_model_states.pt"

# What is wrong with which file (a pattern that only one rank reads where it ends in rows-*), and what the error must say.
DAMAGES = {
    "rows of rank 1 torn": ("tear", f"{OURS}/rows-b2*", ("rows-b2", "torn", "load another checkpoint")),
    "rows of rank 0 missing": ("remove", f"{OURS}/rows-b0*", ("rows-b0", "No such file", "load another checkpoint")),
    "schedule torn": ("tear", f"{OURS}/schedule-000001*", ("schedule-000001", "torn", "use an older one")),
    "visit counts missing": ("remove", f"{OURS}/visits*", ("visits.safetensors", "missing", "use an older checkpoint")),
    "manifest torn": ("tear", f"{OURS}/manifest.json", ("manifest.json", "torn", "use an older one")),
    "manifest missing": ("remove", f"{OURS}/manifest.json", ("manifest.json", "missing", "use an older checkpoint")),
    "newer schema": ("future", MODEL, (OURS, f"schema {SCHEMA + 1}", "install a newer grace_ds")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of 4 MB; None where this user may not mount one."""
    at = folder / "small"
    at.mkdir()
    mounted = (
        os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", at], check=False).returncode == 0
    )
    try:
        yield at if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", at], check=True, timeout=30)


@pytest.fixture(scope="module")
def records(folder: Path, small_disk: Path | None) -> Records:
    saved, blocked, without = str(folder / "saved"), folder / "blocked", folder / "without"
    for taken in (blocked, without):
        (taken / f"global_step{STEP}").mkdir(parents=True)
        (taken / OURS).write_text("a file where our folder would be")
    strict = {**GRACE, "checkpoint": {"on_failed_save": "error"}}
    jobs: dict[str, Any] = {
        "base": {**BASE, "save": saved, "save_at": [STEP]},
        "whole": {**BASE, "load": saved},
        "other_size": {**BASE, "load": saved, "samples": 160},
        "blocked": {**BASE, "grace": strict, "save": str(blocked), "save_at": [4, STEP]},
        "without": {**BASE, "save": str(without), "save_at": [4, STEP]},
        "without_on": {**BASE, "load": str(without)},
        "blocked_on": {**BASE, "load": str(blocked)},
        "blocked_run_dir": {**BASE, "grace": {**GRACE, "run_dir": str(blocked / OURS)}},
    }
    for name, (how, pattern, _) in DAMAGES.items():
        broken = {"source": saved, "how": how, "name": pattern}
        jobs[name] = {**BASE, "load": str(folder / name.replace(" ", "-")), "damage": broken}
        on = {**GRACE, "checkpoint": {"on_damaged_state": "rebuild"}}
        jobs[f"{name} on"] = {**jobs[name], "load": str(folder / name.replace(" ", "-")) + "-on", "grace": on}
    if small_disk is not None:
        fill = {"folder": str(small_disk), "leave": 8192}
        jobs["full"] = {**BASE, "grace": strict, "save": str(small_disk / "saved"), "save_at": [4, STEP], "fill": fill}
        jobs["full_on"] = {**BASE, "load": str(small_disk / "saved")}
        jobs["full_run_dir"] = {**BASE, "grace": {**GRACE, "run_dir": str(small_disk / "run")}}
    return run_jobs(folder / "launch", jobs, timeout=300)[0]


@pytest.mark.parametrize("name", list(DAMAGES))
def test_a_damaged_checkpoint_is_refused_by_every_rank_with_file_and_cure(records: Records, name: str) -> None:
    for rank in records[name]:
        assert rank["error"].startswith("CheckpointError: " if name == "newer schema" else "DamagedState: ")
        for words in DAMAGES[name][2]:
            assert words in rank["error"]


def test_what_only_one_rank_has_seen_the_others_tell_with_its_number(records: Records) -> None:
    assert "on rank 1" in records["rows of rank 1 torn"][0]["error"]
    assert "on rank" not in records["rows of rank 1 torn"][1]["error"]
    assert "on rank 0" in records["rows of rank 0 missing"][1]["error"]


@pytest.mark.parametrize("name", list(DAMAGES))
def test_on_damaged_state_rebuild_starts_a_coreset_at_its_step_but_never_with_another_schema(records: Records, name: str) -> None:
    for rank in records[f"{name} on"]:
        if name == "newer schema":
            assert "install a newer grace_ds" in rank["error"]
            continue
        assert rank["metrics"]["step"] == BASE["steps"] and len(rank["steps"]) == BASE["steps"] - STEP
        assert rank["schedules"] and rank["schedules"] == records[f"{name} on"][0]["schedules"]
        assert min(start for _, start, _ in rank["schedules"]) >= 8 * STEP  # nothing of before is left


def test_a_checkpoint_of_another_dataset_is_refused(records: Records) -> None:
    for rank in records["other_size"]:
        assert rank["error"].startswith("CheckpointError: ")
        for words in (OURS, "192 samples", "160", "use the same data"):
            assert words in rank["error"]


def test_the_same_checkpoint_undamaged_loads(records: Records) -> None:
    assert stream(records["whole"]) == stream(records["base"])[STEP:]


def check_failed_save(records: Records, name: str, *reason: str) -> None:
    for rank in records[name]:
        (error,) = rank["failed_saves"]
        assert error.startswith("CheckpointError: ")
        for words in (OURS, "free space or mend the path", *reason):
            assert words in error
    # The job that goes on all the same is as it would have been, and the checkpoint before is the one that loads.
    assert stream(records[name]) == stream(records["base"])
    assert records[name][0]["params"] == records["base"][0]["params"]
    assert stream(records[f"{name}_on"]) == stream(records["base"])[4:]


def test_where_our_state_cannot_be_written_the_engines_checkpoint_is_saved_all_the_same(records: Records) -> None:
    assert [rank["failed_saves"] for rank in records["without"]] == [[], []]
    assert stream(records["without"]) == stream(records["base"])
    for rank in records["without_on"]:  # the later one is taken up, and a coreset started there
        assert rank["metrics"]["step"] == BASE["steps"] and len(rank["steps"]) == BASE["steps"] - STEP
        assert rank["schedules"] == records["without_on"][0]["schedules"]


def test_a_save_that_cannot_be_written_is_an_error_on_every_rank_and_the_one_before_loads(records: Records) -> None:
    check_failed_save(records, "blocked")


def test_so_is_a_save_on_a_full_disk(records: Records, small_disk: Path | None) -> None:
    if small_disk is None:
        pytest.skip("mounting a small file system needs root")
    check_failed_save(records, "full", "No space left")


@pytest.mark.parametrize("name", ["blocked_run_dir", "full_run_dir"])
def test_a_run_dir_that_takes_nothing_does_not_stop_training(records: Records, small_disk: Path | None, name: str) -> None:
    if small_disk is None and name == "full_run_dir":
        pytest.skip("mounting a small file system needs root")
    assert stream(records[name]) == stream(records["base"])
    for rank in records[name]:
        assert rank["metrics"]["refresh_failures"] == 0
