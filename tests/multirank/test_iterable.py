"""An iterable dataset as training data: chosen from a window held in memory, resumed by position, on one rank and on two."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from grace_ds.data.schedule import ScheduleBook, load_book
from tests.multirank.harness import ROOT
from tests.multirank.launch import COLLECTING, Records, environment, free_port, run_jobs, stream

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(400)]

PASS, STEPS, BATCH = 150, 26, 8
PLACES = list(range(1, 21))
JOB: dict[str, Any] = {"stream": True, "samples": PASS, "stage": 0, "bf16": False, "steps": STEPS}
# Until the second refresh after the place, whose window was placed by a run that had not placed the one before.
ON = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("iterable")


def jobs_of(folder: Path, ranks: int) -> dict[str, Any]:
    grace = {**COLLECTING, "run_dir": str(folder / f"run{ranks}")}
    saved = str(folder / f"saved{ranks}")
    jobs: dict[str, Any] = {"whole": {**JOB, "grace": grace, "save": saved, "save_at": PLACES}}
    for k in PLACES:
        jobs[f"from{k}"] = {**JOB, "grace": COLLECTING, "load": saved, "load_tag": f"global_step{k}", "steps": min(k + ON, STEPS)}
    return jobs


@pytest.fixture(scope="module")
def records(folder: Path) -> dict[int, Records]:
    one = run_jobs(folder / "one", jobs_of(folder, 1), 1, timeout=180)[0]
    jobs = jobs_of(folder, 2)
    jobs["over"] = {**jobs["from9"], "load": str(folder / "saved1")}
    jobs["other"] = {**jobs["from9"], "samples": PASS - 1}
    jobs["shadow"] = {**JOB, "grace": {**COLLECTING, "mode": "shadow"}, "steps": 1}
    jobs["workers"] = {**JOB, "grace": COLLECTING, "steps": 1, "workers": 2}
    return {1: one, 2: run_jobs(folder / "two", jobs, 2, timeout=240)[0]}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("place", PLACES)
def test_resumed_at_any_place_the_same_samples_follow(records: dict[int, Records], ranks: int, place: int) -> None:
    whole, resumed = stream(records[ranks]["whole"]), stream(records[ranks][f"from{place}"])
    assert resumed == whole[place : place + ON]
    for rank in records[ranks][f"from{place}"]:
        assert (rank["metrics"]["refresh_failures"], rank["metrics"]["order_mismatches"]) == (0, 0)


def test_every_sample_of_the_stream_is_seen_by_a_schedule_and_none_is_trained_on_that_is_not(
    records: dict[int, Records], folder: Path
) -> None:
    trained = [i for step in stream(records[1]["whole"]) for i in step]
    book = ScheduleBook(load_book(folder / "run1" / "schedules").schedules)
    # The items tell their position in the stream, over the passes: it is the id, and it is the schedule's.
    assert sorted(book.slots(0, STEPS * BATCH).ids.tolist()) == sorted(trained)
    stands = [schedule.meta["stream"] for schedule in book.schedules]
    assert stands[0]["passed"] == stands[0]["low"] == 0
    for before, after in itertools.pairwise(stands):
        assert before["passed"] <= after["passed"] <= before["high"]  # nothing is passed that no schedule could choose
    assert stands[-1]["passed"] > 2 * PASS and stands[-1]["ends"][:2] == [PASS, 2 * PASS]  # into the third pass
    assert max(Counter(trained).values()) == 1
    for schedule, stand in zip(book.schedules, stands, strict=True):
        assert schedule.ids.min() >= stand["passed"]


def test_two_ranks_read_what_one_reads(records: dict[int, Records]) -> None:
    assert stream(records[2]["whole"]) == stream(records[1]["whole"])


def test_two_ranks_take_over_where_one_stood(records: dict[int, Records]) -> None:
    assert stream(records[2]["over"]) == stream(records[1]["whole"])[9 : 9 + ON]


def test_another_stream_is_refused(records: dict[int, Records]) -> None:
    for rank in records[2]["other"]:
        assert rank["error"].startswith("CheckpointError") and "the stream gives other samples at its positions" in rank["error"]


def test_what_needs_an_index_is_refused(records: dict[int, Records]) -> None:
    for rank in records[2]["shadow"]:
        assert rank["error"].startswith("ConfigError: mode: shadow needs a dataset that can be read by index")
    for rank in records[2]["workers"]:
        assert rank["error"].startswith("ConfigError: 2 data workers over an iterable dataset")


def lines(folder: Path, rank: int) -> list[tuple[int, list[int]]]:
    path = folder / f"ids-{rank}.jsonl"
    text = path.read_text() if path.exists() else ""
    return [(step, ids) for step, ids in map(json.loads, text.splitlines())]


def launch(folder: Path, until: int | None) -> None:
    """Runs the job on two ranks; kills it once rank 0 has made so many steps, or lets it end."""
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--master_port", str(free_port())]
    command += [str(ROOT / "tests" / "multirank" / "stream_job.py"), str(folder), str(STEPS), "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment(folder)}
    with (folder / "output").open("a") as out:
        job = subprocess.Popen(command, stdout=out, stderr=out, env=env, start_new_session=True, cwd=ROOT)
        deadline = time.monotonic() + 120
        try:
            while job.poll() is None and time.monotonic() < deadline:
                if until is not None and any(step >= until for step, _ in lines(folder, 0)):
                    return
                time.sleep(0.005)
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    assert until is None and job.returncode == 0, (folder / "output").read_text()[-4000:]


def test_killed_three_times_it_trains_on_what_an_undisturbed_run_does(records: dict[int, Records], folder: Path) -> None:
    killed = folder / "killed"
    killed.mkdir()
    for until in (5, 12, 19):
        launch(killed, until)
    launch(killed, None)
    whole = records[2]["whole"]
    for rank in range(2):
        made = lines(killed, rank)
        assert len(made) > STEPS  # some steps were made twice, as their weights were lost
        for step, ids in made:
            assert ids == whole[rank]["steps"][step - 1]
        assert {step for step, _ in made} == set(range(1, STEPS + 1))
