"""ZeRO stages, launchers and numbers of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.multirank.launch import COLLECTING, refreshes, run_jobs, stream

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(240)]

GRACE: dict[str, Any] = COLLECTING
CHECKPOINTING = ("none", "reentrant", "nonreentrant")


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_every_zero_stage_trains_bit_for_bit_under_shadow_and_refreshes(tmp_path: Path, stage: int) -> None:
    base = {"steps": 9, "stage": stage, "batch": 16}
    jobs: dict[str, Any] = {"live": {**base, "grace": GRACE}}
    for kind in CHECKPOINTING:
        for gas in (1, 4):
            some = {**base, "checkpointing": kind, "gas": gas}
            jobs[f"plain_{kind}_{gas}"] = {**some, "via": "deepspeed"}
            jobs[f"shadow_{kind}_{gas}"] = {**some, "grace": {**GRACE, "mode": "shadow"}}
    records, _ = run_jobs(tmp_path, jobs, timeout=200)
    for name in jobs:
        if name.startswith("shadow"):
            for ours, theirs in zip(records[name], records[name.replace("shadow", "plain")], strict=True):
                assert (ours["params"], ours["steps"], ours["losses"]) == (theirs["params"], theirs["steps"], theirs["losses"])
                assert ours["metrics"]["events"]["hook_failures"] == 0
            assert sum(len(r["table"]) for r in records[name]) > 40
    a, b = records["live"]
    assert a["schedules"] == b["schedules"]
    assert a["metrics"]["refreshes"] == refreshes(9)


def test_mpirun_carries_the_same_run_by_mpi(tmp_path: Path) -> None:
    jobs = {"job": {"steps": 10, "grace": GRACE}, "asked": {"steps": 5, "grace": {**GRACE, "comm": "mpi"}}}
    by_mpi, _ = run_jobs(tmp_path / "mpi", jobs, launcher="mpirun", timeout=100)
    by_torch, output = run_jobs(tmp_path / "torch", jobs, timeout=100)
    assert {r["comm"] for r in by_mpi["job"] + by_mpi["asked"]} == {"mpi"}
    assert {r["comm"] for r in by_torch["job"]} == {"torch"}
    assert by_mpi["job"][0]["schedules"] == by_torch["job"][0]["schedules"]
    assert stream(by_mpi["job"]) == stream(by_torch["job"])
    assert "transport: torch" in output
    for rank in by_torch["asked"]:  # no MPI world without mpirun
        assert "TransportError" in rank["error"]
        assert "mpirun" in rank["error"]


def test_another_number_of_ranks_takes_over_the_published_schedules(tmp_path: Path) -> None:
    saved = str(tmp_path / "saved")
    base = {"steps": 12, "stage": 0, "bf16": False, "grace": {**GRACE, "run_dir": str(tmp_path / "run")}}
    # Content alone decides, so nothing depends on where a sample was trained on: the pool's typical samples are trusted.
    pseudo = {**base, "workers": 0, "grace": {**GRACE, "recipe": "content", "pseudo_trusted": True}}
    jobs: dict[str, Any] = {"base": {**base, "save": saved, "save_at": [5, 6]}, "pseudo": pseudo}
    jobs["density"] = {**pseudo, "grace": {**GRACE, "recipe": "density"}}
    two, said = run_jobs(tmp_path / "two", jobs, 2, timeout=100)
    replay = {**GRACE, "replay": str(tmp_path / "run" / "schedules")}
    jobs = {
        "pseudo": pseudo,
        "uniform": {**pseudo, "grace": {**GRACE, "recipe": "uniform"}},
        "plain": {**pseudo, "via": "deepspeed", "grace": None},
        "resumed": {**base, "steps": 10, "load": saved, "load_tag": "global_step6", "grace": GRACE},
        "replayed": {**base, "load": saved, "load_tag": "global_step5", "grace": replay},
    }
    one, _ = run_jobs(tmp_path / "one", jobs, 1, timeout=100)
    # Where nothing is chosen a job of one rank is bit for bit what it is without GRACE.
    for key in ("steps", "losses", "params"):
        assert one["uniform"][0][key] == one["plain"][0][key]
    assert one["replayed"][0]["comm"] == "local"
    assert stream(one["replayed"]) == stream(two["base"])[5:]
    assert "most typical of 192 samples of the pool stand in" in said
    assert one["pseudo"][0]["schedules"] == two["pseudo"][0]["schedules"] == two["pseudo"][1]["schedules"]
    assert stream(one["pseudo"]) == stream(two["pseudo"]) != stream(two["density"])
    # Beyond what was published at the save (the schedule of step 4) another number of ranks may choose differently.
    assert stream(one["resumed"])[:2] == stream(two["base"])[6:8]
