"""Resuming: between the two phases of a refresh, across epochs, at more ranks, after a replay; each from a real checkpoint."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from grace_ds.data.schedule import load_book
from tests.multirank.launch import COLLECTING, Records, run_jobs, stream
from tests.multirank.toy import Corpus, write_trusted

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(280)]

GRACE: dict[str, Any] = COLLECTING
EVERY_STEP: dict[str, Any] = {**GRACE, "refresh": {**GRACE["refresh"], "interval_steps": 1}}
EPOCH = 24  # steps of 8 in the corpus of 192
LONG = {"steps": EPOCH + 8, "bf16": False}
SHORT = {"steps": 12, "stage": 0, "bf16": False, "grace": GRACE}
PENDING = [5, 8]
LATE = [EPOCH - 5, EPOCH - 1, EPOCH]
# Of the run that the guard steps down in: right before, while it is, and once it looks again.
DOWN = [7, 10, 17]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def one(folder: Path) -> Records:
    """A run on one rank that saves."""
    run_dir = str(folder / "run1")
    base = {**SHORT, "save": str(folder / "one"), "save_at": [5, 6], "grace": {**GRACE, "run_dir": run_dir}}
    return run_jobs(folder / "launch1", {"base": base}, 1, timeout=60)[0]


@pytest.fixture(scope="module")
def two(folder: Path, one: Records) -> Records:
    """What two ranks make of it, and runs of their own."""
    saved, replay = str(folder / "two"), str(folder / "run1" / "schedules")
    trusted = write_trusted(folder / "trusted.jsonl", Corpus(128, salt=3).tokens[::2])
    long = {**LONG, "grace": {**GRACE, "trusted": str(trusted)}}
    run_dir = {**GRACE, "run_dir": str(folder / "run2")}
    jobs: dict[str, Any] = {
        "taken_over": {**SHORT, "load": str(folder / "one"), "load_tag": "global_step6"},
        "replayed": {**SHORT, "load": str(folder / "one"), "load_tag": "global_step5", "grace": {**GRACE, "replay": replay}},
        "long": {**long, "save": saved, "save_at": PENDING + LATE},
        "eager": {**LONG, "grace": EVERY_STEP, "steps": 12, "save": str(folder / "eager"), "save_at": [5]},
        "eager_slow": {**LONG, "grace": EVERY_STEP, "steps": 12, "load": str(folder / "eager"), "workers": 0},
        "recorded": {**SHORT, "grace": run_dir, "save": str(folder / "recorded"), "save_at": [6]},
        "recorded_on": {**SHORT, "grace": {**run_dir, "budget": 0.2}, "steps": 14, "load": str(folder / "recorded")},
        "replaying": {
            **SHORT,
            "grace": {**GRACE, "replay": replay},
            "steps": 6,
            "save": str(folder / "replaying"),
            "save_at": [6],
        },
        "replay_over": {**SHORT, "load": str(folder / "replaying")},
    }
    # Half of the slots are audits, so that there is enough to compare with after so few steps; the harm is made up.
    judged = {**long["grace"], "guard": {"clean_share": 1.0}, "selection": {"audit": 0.5}}
    down = {**LONG, "steps": 22, "workers": 0, "harm": True, "grace": judged}
    run_dir = {**judged, "run_dir": str(folder / "down-run")}
    jobs["down"] = {**down, "grace": run_dir, "save": str(folder / "down"), "save_at": DOWN}
    jobs |= {f"down{k}": {**down, "load": str(folder / "down"), "load_tag": f"global_step{k}"} for k in DOWN}
    jobs |= {f"from{k}": {**long, "load": saved, "load_tag": f"global_step{k}"} for k in PENDING + LATE}
    return run_jobs(folder / "launch2", jobs, 2, timeout=200)[0]


def state(saved: Path, step: int) -> Path:
    return saved / f"global_step{step}" / "grace_ds"


@pytest.mark.parametrize("step", PENDING)
def test_between_the_phases_of_a_refresh_nothing_repeats_and_nothing_is_skipped(two: Records, folder: Path, step: int) -> None:
    manifest = json.loads((state(folder / "two", step) / "manifest.json").read_text())
    schedules = load_book(state(folder / "two", step)).schedules
    assert manifest["cursor"] == 8 * step
    assert len(schedules) >= 2
    assert schedules[0].start <= manifest["cursor"] < schedules[1].start  # one in use, others agreed on for later
    assert stream(two[f"from{step}"]) == stream(two["long"])[step:]
    assert two[f"from{step}"][0]["params"] == two["long"][0]["params"]
    assert two[f"from{step}"][0]["reference"] == two["long"][0]["reference"] != {}  # of the trusted set


@pytest.mark.parametrize("step", LATE)
def test_across_the_end_of_the_epoch_too(two: Records, step: int) -> None:
    # Near its end the loader runs out of samples to prefetch; a resumed one begins an epoch of its own.
    assert stream(two[f"from{step}"]) == stream(two["long"])[step:]
    assert two[f"from{step}"][0]["params"] == two["long"][0]["params"]


@pytest.mark.parametrize("step", DOWN)
def test_a_guard_that_has_stepped_down_is_taken_up_as_it_was(two: Records, folder: Path, step: int) -> None:
    lines = [json.loads(line) for line in (folder / "down-run" / "refreshes.jsonl").read_text().splitlines()]
    found = [(line["step"], line["objective"], line["guard"]["level"]) for line in lines]
    # Two schedules by content, until there are influences; then the core does harm, and twice as long the next time.
    assert found == [
        (0, "sample", "grace"),
        (2, "sample", "grace"),
        (4, "sample", "grace"),
        (8, "sample", "content"),
        (12, "sample", "content"),
        (16, "sample", "grace"),
        (20, "sample", "content"),
    ]
    assert [line["guard"]["look"] - line["version"] for line in lines if "high" in line["guard"]] == [2, 4]
    for resumed, base in zip(two[f"down{step}"], two["down"], strict=True):
        for key in ("params", "schedules", "levels", "table", "reference"):
            assert resumed[key] == base[key], key
    assert stream(two[f"down{step}"]) == stream(two["down"])[step:]


def test_two_ranks_take_over_the_schedules_that_one_has_published(one: Records, two: Records, folder: Path) -> None:
    published = {s.version for s in load_book(state(folder / "one", 6)).schedules}
    ours = two["taken_over"][0]["schedules"]
    assert ours == two["taken_over"][1]["schedules"]
    until = min(start for version, start, _ in ours if version not in published) // 8  # from there on two may choose otherwise
    assert until >= 10
    assert stream(two["taken_over"])[: until - 6] == stream(one["base"])[6:until]


def test_and_under_replay_the_whole_run(one: Records, two: Records) -> None:
    assert stream(two["replayed"]) == stream(one["base"])[5:]


def test_a_loader_that_prefetches_less_after_the_resume_keeps_the_pending_schedule(two: Records, folder: Path) -> None:
    pending = load_book(state(folder / "eager", 5)).schedules[-1]
    assert pending.start > 8 * 7  # beyond the next refreshes' own reach
    for rank in two["eager_slow"]:
        assert rank["metrics"]["refresh_failures"] == 0
    first = pending.start // 8 - 5
    assert stream(two["eager_slow"])[:first] == stream(two["eager"])[5 : 5 + first]
    assert len(stream(two["eager_slow"])) == 7


def test_a_resumed_run_keeps_the_record_of_the_steps_before(two: Records, folder: Path) -> None:
    from grace_ds.cli.trace import trace

    for step in (0, 5):
        told = json.loads(trace(str(folder / "run2"), step, as_json=True))
        assert sorted(s["id"] for s in told["samples"]) == stream(two["recorded"])[step]
    for step in (6, 13):
        told = json.loads(trace(str(folder / "run2"), step, as_json=True))
        assert sorted(s["id"] for s in told["samples"]) == stream(two["recorded_on"])[step - 6]
    lines = [json.loads(line) for line in (folder / "run2" / "refreshes.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 8, 12, 8, 12]
    schedules = load_book(folder / "run2" / "schedules").schedules
    assert len({s.run for s in schedules}) == 1 and schedules[0].run  # one run, and not without a name
    aside = [path.name for path in (folder / "run2" / "schedules").glob("*.abandoned")]
    assert f"schedule-{lines[-1]['version']:06d}.abandoned" in aside  # of the steps that were gone through again


def test_a_checkpoint_of_a_replay_goes_on_without_it(two: Records) -> None:
    assert len(stream(two["replay_over"])) == 6
    assert two["replay_over"][0]["metrics"]["refreshes"] >= 2


def trace_command(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "grace_ds.cli.main", "trace", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_trace_reads_a_checkpoint(two: Records, folder: Path) -> None:
    where = folder / "two" / "global_step8"
    for place in (where, where / "grace_ds"):
        told = json.loads(trace_command(place, "--step", 9, "--json").stdout)
        assert (told["step"], told["batch"]) == (9, 8)
        assert sorted(s["id"] for s in told["samples"]) == stream(two["long"])[9]
        assert [s["position"] for s in told["samples"]] == list(range(72, 80))
        assert {s["role"] for s in told["samples"]} <= {"core", "explore", "audit"}
    table = trace_command(where, "--step", 9).stdout
    rows = [line.split() for line in table.splitlines() if re.match(r" +\d+ +\d+  ", line)]
    assert [int(row[1]) for row in rows] == [s["id"] for s in told["samples"]]
    assert "a run that goes on from it trains on these samples" in table


def test_trace_says_what_is_wrong(two: Records, folder: Path, tmp_path: Path) -> None:
    where = state(folder / "two", 8)
    first = load_book(where).schedules[0].start // 8
    for words, expected in (
        (
            (where, "--step", first - 1),
            f"step {first - 1} lies before the first schedule kept in {where}; the first .* is {first}",
        ),
        ((where, "--step", -1), "--step: '-1' is not a whole number"),
        ((tmp_path, "--step", 0), f"no schedule-.* in {tmp_path}; give"),
        ((tmp_path / "nowhere", "--step", 0), "nowhere"),
        ((where,), "--step"),
    ):
        done = trace_command(*words)
        assert done.returncode != 0
        assert done.stdout == ""
        assert re.search(expected, done.stderr), done.stderr
        assert "Traceback" not in done.stderr
