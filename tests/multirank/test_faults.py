"""One rank that hangs, fails or collects nonsense inside a refresh: training goes on, and all ranks agree on what is left."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.multirank.launch import COLLECTING, Records, refreshes, run_jobs, stream
from tests.multirank.toy import Corpus, write_trusted

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(300)]

LIMIT, HANG = 2.0, 3.0
LAYERS = 4  # two in each block
GRACE: dict[str, Any] = {
    **COLLECTING,
    "collect": {"layers": ["blocks.2.*", "blocks.3.*"]},
    "refresh": {**COLLECTING["refresh"], "timeout_seconds": LIMIT},
}
BASE: dict[str, Any] = {"steps": 9, "bf16": False, "workers": 0, "grace": GRACE}

# Each stage has a collective after it, in which the other rank waits.  The number says which call belongs to step 2.
HANGS = {
    "pending": ("grace_ds.gradients.collector", "GradientCollector.pending", 1),
    "gather": ("grace_ds.refresh.line", "activation", 1),
    "table": ("grace_ds.refresh.line", "owner_of", 1),
    "features": ("grace_ds.integrations.setup", "follow_window", 0),
    "embed": ("grace_ds.refresh.line", "learn", 1),
    "graph": ("grace_ds.refresh.line", "follow", 1),
    "propagate": ("grace_ds.refresh.signals", "propagate", 1),
    "select": ("grace_ds.refresh.line", "choose", 1),
    "broadcast": ("grace_ds.refresh.line", "broadcast_schedule", 1),
    "agree": ("grace_ds.comm.framing", "FramedComm.agree", 2),
}
# Likewise of the trusted basis, which is fitted at step 2 for the first time.
PROBES = {
    "moments": ("grace_ds.gradients.kfac", "MomentAccumulator.pack", 0),
    "basis": ("grace_ds.gradients.basis", "BasisAccumulator.pack", 0),
    "unit": ("grace_ds.gradients.influence_probe", "InfluenceProbe._unit", 0),
}
# Calls of _to before the second batch of each probe: a batch takes three, for itself and its two entries, a probe two batches.
READS = {"moments": 3, "basis": 9, "unit": 15}
# Not finite in one layer's gradient of a sample, as the hooks see it; and in a row on its way to its owner.
SKETCH = {"module": "grace_ds.gradients.capture", "name": "MicroBatchCapture._accumulate", "rank": 1, "argument": 3}
ROW = {"module": "grace_ds.gradients.collector", "name": "GradientCollector.pending", "rank": 1, "after": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def launched(folder: Path) -> tuple[Records, str]:
    trusted = write_trusted(folder / "trusted.jsonl", Corpus(64, salt=3).tokens)
    jobs: dict[str, Any] = {"base": BASE}
    for stage, (module, name, after) in HANGS.items():
        grace = {**GRACE, "window": 150} if stage == "features" else GRACE  # a window that moves has new features to read
        fault = {"module": module, "name": name, "rank": 1, "after": after, "hang": HANG}
        jobs[f"hang_{stage}"] = {**BASE, "grace": grace, "fault": fault}
    for stage, (module, name, after) in PROBES.items():
        fault = {"module": module, "name": name, "rank": 1, "after": after, "hang": HANG}
        jobs[f"hang_{stage}"] = {**BASE, "steps": 4, "grace": {**GRACE, "trusted": str(trusted)}, "fault": fault}
    commit = {"module": "grace_ds.comm.agreement", "name": "Agreement.commit", "rank": 1, "after": 1, "hang": HANG}
    jobs["hang_commit"] = {**BASE, "fault": commit}
    jobs["hang_scale"] = {
        **BASE,
        "fault": {
            "module": "grace_ds.gradients.collector",
            "name": "GradientCollector._freeze",
            "rank": 1,
            "after": 0,
            "hang": HANG,
        },
    }
    for step in (0, 3):
        jobs[f"finish{step}"] = {
            **BASE,
            "steps": 8,
            "fault": {"module": "grace_ds.gradients.hooks", "name": "Sketcher.finish", "rank": 1, "after": step},
        }
    # ZeRO-3 gathers weights in the probes: a rank that left them half-way would leave the other in the job's own collective.
    zero3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    for stage, after in READS.items():
        probe = {"module": "grace_ds.gradients.passes", "name": "_to", "rank": 1, "after": after}
        jobs[f"read_{stage}"] = {**BASE, "steps": 5, "ds": zero3, "grace": {**GRACE, "trusted": str(trusted)}, "fault": probe}
    for value in ("nan", "inf"):
        jobs[f"first_{value}"] = {**BASE, "steps": 8, "fault": {**SKETCH, "poison": value, "after": 0}}
        jobs[f"sample_{value}"] = {**BASE, "steps": 8, "fault": {**SKETCH, "poison": value, "after": 3 * LAYERS}}
        for column in ("sketch", "norm"):
            jobs[f"{column}_{value}"] = {**BASE, "steps": 4, "fault": {**ROW, "poison": value, "column": column}}
    # Two worlds side by side, for one of them mostly waits.
    hangs = {name: spec for name, spec in jobs.items() if name.startswith("hang_")}
    rest = {name: spec for name, spec in jobs.items() if name not in hangs}
    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(lambda part: run_jobs(folder / part[0], part[1], timeout=260), [("hangs", hangs), ("rest", rest)]))
    return {**halves[0][0], **halves[1][0]}, halves[0][1] + halves[1][1]


@pytest.fixture(scope="module")
def records(launched: tuple[Records, str]) -> Records:
    return launched[0]


def agree(records: list[dict[str, Any]], steps: int) -> None:
    a, b = records
    assert len(stream([a, b])) == steps
    assert a["params"] == b["params"]
    assert a["schedules"] == b["schedules"]


@pytest.mark.parametrize("stage", [*HANGS, *PROBES])
def test_a_rank_that_hangs_in_a_stage_freezes_grace_and_not_the_job(records: Records, stage: str) -> None:
    agree(records[f"hang_{stage}"], 9 if stage in HANGS else 4)
    assert stream(records[f"hang_{stage}"])[:2] == stream(records["base"])[:2] or stage not in HANGS or stage == "features"
    for rank, waits in zip(records[f"hang_{stage}"], (0.0, HANG), strict=True):
        m = rank["metrics"]
        assert m["frozen"]
        assert (m["refreshes"], m["refresh_failures"]) == (1, 1)
        assert m["events"]["refresh_failures"] == 1
        assert m["refresh_seconds"] < waits + LIMIT + 6.0  # one limit, not one for each collective that was left
        assert len(rank["schedules"]) == 1


def test_the_log_of_every_rank_says_so(launched: tuple[Records, str]) -> None:
    frozen = sum(rank["metrics"]["frozen"] for job in launched[0].values() for rank in job)
    assert frozen == 2 * (len(HANGS) + len(PROBES) + 1)
    assert launched[1].count("GRACE is frozen: training goes on") == frozen


def test_a_rank_that_is_late_after_the_agreement_holds_the_schedule_too(records: Records) -> None:
    agree(records["hang_commit"], 9)
    assert stream(records["hang_commit"]) == stream(records["base"])
    for rank in records["hang_commit"]:
        assert not rank["metrics"]["frozen"]
        assert (rank["metrics"]["refreshes"], rank["metrics"]["refresh_failures"]) == (refreshes(9), 0)


def test_a_rank_that_hangs_while_the_scale_is_agreed_on_freezes_grace_and_not_the_job(records: Records) -> None:
    agree(records["hang_scale"], 9)
    for rank in records["hang_scale"]:
        assert rank["metrics"]["frozen"]
        assert rank["metrics"]["refreshes"] == 1


@pytest.mark.parametrize("step", [0, 3])
def test_a_micro_batch_that_cannot_be_finished_costs_only_its_own_rows(records: Records, step: int) -> None:
    job = records[f"finish{step}"]
    agree(job, 8)
    lost = set(job[1]["steps"][step]) if step else set()
    rows = stream(job)
    assert committed(job) == {i: k + 1 for k in range(1, 8) for i in rows[k] if k != step or i not in lost}
    for rank in job:
        assert not rank["metrics"]["frozen"]
        assert rank["metrics"]["events"]["hook_failures"] == 1


@pytest.mark.parametrize("stage", list(READS))
def test_a_fault_in_one_ranks_data_is_agreed_on_before_each_probe(records: Records, stage: str) -> None:
    agree(records[f"read_{stage}"], 5)
    for rank in records[f"read_{stage}"]:
        assert not rank["metrics"]["frozen"]
        assert (rank["metrics"]["refreshes"], rank["metrics"]["refresh_failures"]) == (2, 1)
        assert list(rank["reference"]) == ["1"]  # the refresh after it has fitted a basis


def latest(records: list[dict[str, Any]], first: int, last: int, without: tuple[int, int] | None = None) -> dict[int, int]:
    """Sample → the last step of these that trained on it, but for the step and sample ``without``."""
    steps = stream(records)
    return {i: k + 1 for k in range(first, last) for i in steps[k] if (k, i) != without}


def committed(records: list[dict[str, Any]]) -> dict[int, int]:
    """Sample → step of its row, over all ranks."""
    return {int(i): v for r in records for i, v in r["table"].items()}


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_gradient_that_is_not_finite_costs_only_its_own_row(records: Records, value: str) -> None:
    job = records[f"sample_{value}"]
    agree(job, 8)
    assert committed(job) == latest(job, 1, 8, without=(3, job[1]["steps"][3][0]))
    for rank in job:
        assert rank["metrics"]["events"]["rows_dropped"] == 8 + 1  # those of the first step set the scale
        assert rank["metrics"]["events"]["hook_failures"] == 0


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_nor_does_it_spoil_the_scale_of_the_layers(records: Records, value: str) -> None:
    job = records[f"first_{value}"]
    agree(job, 8)
    assert committed(job) == latest(job, 1, 8)
    assert job[0]["metrics"]["events"]["rows_dropped"] == 8
    for layer, scale in records["base"][0]["scale"].items():  # of one sample more
        assert 0.8 < job[0]["scale"][layer] / scale < 1.25
    assert job[0]["scale"] == job[1]["scale"]


@pytest.mark.parametrize("column", ["sketch", "norm"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_row_that_is_not_finite_is_dropped_and_counted_on_all_ranks(records: Records, column: str, value: str) -> None:
    job = records[f"{column}_{value}"]
    agree(job, 4)
    assert committed(job) == latest(job, 1, 4, without=(2, job[1]["steps"][2][0]))
    for rank in job:
        assert rank["metrics"]["refresh_failures"] == 0
        assert rank["metrics"]["events"]["nonfinite_dropped"] == 1
