"""The ways into a job: attach with an own loader, unchanged scripts under ``grace_ds.run``, the monitors, checkpointing."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from grace_ds.data.schedule import load_book
from tests.multirank.harness import RanksFailed, run_command, run_module
from tests.multirank.launch import COLLECTING, Records, environment, free_port, refreshes, run_jobs, stream
from tests.processes import living, wait_until

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(200)]

GRACE: dict[str, Any] = COLLECTING
BASE: dict[str, Any] = {"steps": 10, "bf16": False, "grace": GRACE}
SHADOW: dict[str, Any] = {**BASE, "grace": {**GRACE, "mode": "shadow"}}
# A schedule that outlasts what two workers read ahead: one that runs out is gone through again.
UNIFORM: dict[str, Any] = {
    **BASE,
    "grace": {**GRACE, "recipe": "uniform", "refresh": {**GRACE["refresh"], "slack_steps": 8}},
}
PLAIN: dict[str, Any] = {**BASE, "via": "deepspeed", "grace": None}
FAULT = {"module": "grace_ds.refresh.line", "name": "activation", "rank": 1, "after": 1}
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("entries")


@pytest.fixture(scope="module")
def records(folder: Path) -> Records:
    csv_monitor = {"enabled": True, "output_path": str(folder / "csv"), "job_name": "job"}
    tensorboard = {"enabled": True, "output_path": str(folder / "tb"), "job_name": "job"}
    jobs: dict[str, Any] = {
        "initialize": {**BASE, "workers": 0},
        "plain": {**PLAIN, "steps": 9},
        "kept": {**BASE, "steps": 9, "grace": {**GRACE, "run_dir": str(folder / "run")}},
        "monitored": {**BASE, "steps": 14, "fault": FAULT, "ds": {"csv_monitor": csv_monitor, "tensorboard": tensorboard}},
    }
    for workers in (0, 2):
        own = {"own": {"workers": workers}}
        seeded = {"own": {"workers": workers, "seed": 5}}
        jobs[f"attach{workers}"] = {**BASE, **own, "via": "attach", "config_file": str(folder / "attach")}
        jobs[f"clone{workers}"] = {**BASE, **own, "via": "attach", "clone": True, "ahead": True}
        jobs[f"own{workers}"] = {**PLAIN, **seeded, "steps": 28}
        jobs[f"own_shadow{workers}"] = {**SHADOW, **seeded, "via": "attach", "steps": 28}
        jobs[f"own_uniform{workers}"] = {**UNIFORM, **seeded, "via": "attach", "steps": 28}
    jobs["file"] = {**BASE, "workers": 0, "config_file": str(folder / "file")}
    jobs["untold"] = {**UNIFORM, "own": {"workers": 0, "seed": None}, "via": "attach"}
    jobs["off"] = {**BASE, "own": {"workers": 0}, "via": "attach", "grace": {"enabled": False}}
    jobs["none"] = {**BASE, "own": {"workers": 0}, "via": "attach", "grace": None}
    for stage in (2, 3):
        more = {"stage": stage, "checkpointing": "deepspeed", "gas": 2, "batch": 16}
        jobs[f"recompute{stage}"] = {**PLAIN, **more}
        jobs[f"recompute_shadow{stage}"] = {**SHADOW, **more}
    return run_jobs(folder, jobs, timeout=150)[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_attach_feeds_the_same_schedule_as_initialize(records: Records, workers: int) -> None:
    ours, theirs = records[f"attach{workers}"], records["initialize"]
    assert stream(ours)[:2] == stream(theirs)[:2]
    if not workers:  # a prefetching loader takes a new schedule up later
        assert stream(ours) == stream(theirs)
        assert [r["params"] for r in ours] == [r["params"] for r in theirs]


def test_a_config_file_with_comments_is_read_as_deepspeed_reads_it(records: Records) -> None:
    assert stream(records["file"]) == stream(records["initialize"])


def test_attach_without_an_enabled_block_is_an_error_on_every_rank(records: Records) -> None:
    for rank in records["off"]:
        assert "ConfigError" in rank["error"]
        assert "enabled: true" in rank["error"]
    for rank in records["none"]:
        assert "data_efficiency.data_sampling.grace" in rank["error"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["attach", "clone"])
def test_with_an_own_loader_what_is_committed_is_what_was_trained_on(records: Records, kind: str, workers: int) -> None:
    steps = stream(records[f"{kind}{workers}"])
    last = {i: k + 1 for k in range(1, 8) for i in steps[k]}  # the first sets the scale, the last refresh comes after the 8th
    assert {int(i): v for r in records[f"{kind}{workers}"] for i, v in r["table"].items()} == last


@pytest.mark.parametrize("workers", [0, 2])
def test_shadow_leaves_the_jobs_own_sampler_and_batches_alone(records: Records, workers: int) -> None:
    for ours, theirs in zip(records[f"own_shadow{workers}"], records[f"own{workers}"], strict=True):
        for key in ("steps", "losses", "params"):
            assert ours[key] == theirs[key]
        assert ours["metrics"]["refreshes"] == refreshes(28)
    trained = {i for step in stream(records[f"own{workers}"])[1:] for i in step}
    assert {int(i) for r in records[f"own_shadow{workers}"] for i in r["table"]} == trained


@pytest.mark.parametrize("workers", [0, 2])
def test_where_nothing_is_chosen_the_order_of_the_jobs_own_sampler_goes_on(records: Records, workers: int) -> None:
    ours, theirs = stream(records[f"own_uniform{workers}"]), stream(records[f"own{workers}"])
    assert len(ours) == len(theirs) == 28
    assert ours[:24] == theirs[:24]
    assert ours[24:] != theirs[24:]  # 24 steps are an epoch: this job does not set the next, we do


def test_a_sampler_whose_order_cannot_be_told_is_refused_on_every_rank(records: Records) -> None:
    for rank in records["untold"]:
        assert "the order of a RandomSampler cannot be told" in rank["error"]


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_own_activation_checkpointing_is_bit_identical_and_harvested(records: Records, stage: int) -> None:
    for ours, theirs in zip(records[f"recompute_shadow{stage}"], records[f"recompute{stage}"], strict=True):
        for key in ("steps", "losses", "params"):
            assert ours[key] == theirs[key]
        assert ours["metrics"]["events"]["hook_failures"] == 0
    trained = {i for step in stream(records[f"recompute{stage}"])[1:8] for i in step}
    assert {int(i) for r in records[f"recompute_shadow{stage}"] for i in r["table"]} == trained


def test_csv_monitor_has_an_event_of_every_refresh_and_counts_the_failure(records: Records, folder: Path) -> None:
    rows = {}
    for path in (folder / "csv" / "job").glob("Grace_*.csv"):
        lines = list(csv.reader(path.open()))
        rows[path.stem.removeprefix("Grace_")] = [(int(at), float(value)) for at, value in lines[1:]]
    assert rows["refresh_failures"] == [
        (0, 0.0),
        (16, 1.0),
        (32, 1.0),
        (64, 1.0),
        (96, 1.0),
    ]  # samples trained on, failures so far
    assert [value for _, value in rows["version"]] == [0.0, 0.0, 1.0, 2.0, 3.0]
    assert {"coreset_size", "refresh_seconds", "collect_seconds", "churn", "stage_seconds_gather", "anchors"} <= set(rows)
    assert all(math.isfinite(v) and v >= 0 for values in rows.values() for _, v in values)
    seen = sum(len(r["table"]) for r in records["monitored"])
    assert rows["anchors"][-1][1] == seen  # of all ranks, not of the one that writes


def test_tensorboard_has_the_same_events(records: Records, folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tb" / "job"))
    events.Reload()
    tags = {t for t in events.Tags()["scalars"] if t.startswith("Grace/")}
    files = {p.stem for p in (folder / "csv" / "job").glob("Grace_*.csv")}
    assert {t.replace("/", "_") for t in tags} == files
    assert [(e.step, e.value) for e in events.Scalars("Grace/refresh_failures")] == [(0, 0), (16, 1), (32, 1), (64, 1), (96, 1)]


def test_the_events_of_a_refresh_count_all_ranks(records: Records) -> None:
    a, b = (r["metrics"]["events"] for r in records["initialize"])
    for key in ("anchors", "received", "rows_dropped"):
        assert a[key] == b[key]
    assert a["anchors"] == sum(len(r["table"]) for r in records["initialize"])
    assert a["rows_dropped"] == 8  # the first step's, which only set the scale


# -- unchanged scripts -------------------------------------------------------------------------------------------------


WAYS = {"cli": ("grace-ds run", ""), "module": ("deepspeed", "--module grace_ds.run")}


def write_config(path: Path, grace: dict[str, Any] | None) -> Path:
    config: dict[str, Any] = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "steps_per_print": 10**9,
    }
    if grace is not None:
        config["data_efficiency"] = {"enabled": True, "data_sampling": {"enabled": True, "grace": grace}}
    path.write_text(json.dumps(config))
    return path


def run_plain(folder: Path, config: Path, *more: str, options: tuple[str, ...] = ()) -> str:
    """The unchanged script under ``grace_ds.run`` on two ranks, which no launcher has started; its output."""
    script = ["tests/multirank/plain_job.py", "--deepspeed_config", config, "--out", folder, *more]
    return run_module("grace_ds.run", [*options, *script], 2, timeout=100, env=environment(folder))


def command_of(way: str, folder: Path, config: Path, *more: str) -> list[str]:
    (program, *first), last = (words.split() for words in WAYS[way])
    options = [*first, "--num_accelerators", "2", "--master_port", str(free_port()), *last]
    script = ["tests/multirank/plain_job.py", "--deepspeed_config", str(config), "--out", str(folder), *more]
    return [str(BIN / program), *options, *script]


@pytest.mark.parametrize("way", list(WAYS))
def test_an_unchanged_script_trains_on_the_schedules_of_initialize(
    records: Records, folder: Path, tmp_path: Path, way: str
) -> None:
    config = write_config(tmp_path / "on.json", {**GRACE, "run_dir": str(tmp_path / "run")})
    off = write_config(tmp_path / "off.json", None)
    said = run_command(command_of(way, tmp_path, config, "--second", str(off)), timeout=90, env=environment(tmp_path))
    assert said.count("transport: torch") == 1  # a script without logging of its own: rank 0 says what was chosen
    on, without = ([json.loads((tmp_path / f"{name}-{r}.json").read_text()) for r in range(2)] for name in ("first", "second"))
    assert all(r["touched"] for r in on)
    assert [r["local_rank"] for r in on] == [0, 1]
    assert stream(on) == stream(records["kept"])
    theirs, ours = (load_book(at / "run" / "schedules").schedules for at in (folder, tmp_path))
    assert [s.version for s in ours] == [0, 1, 2, 3]
    assert [s.digest() for s in ours] == [s.digest() for s in theirs]
    for untouched, plain in zip(without, records["plain"], strict=True):  # a config without a block
        assert not untouched["touched"]
        assert (untouched["steps"], untouched["losses"]) == (plain["steps"], plain["losses"])


def test_a_script_that_does_not_exist_is_named(tmp_path: Path) -> None:
    for command in (
        [BIN / "grace-ds", "run", "nowhere.py"],
        [BIN / "python", "-m", "grace_ds.run", "--local_rank=0", "nowhere.py"],
    ):
        with pytest.raises(RanksFailed, match=r"nowhere\.py") as caught:
            run_command(command, timeout=30, env=environment(tmp_path))
        assert "Traceback" not in str(caught.value)
        assert "usage" in str(caught.value)


def test_an_interrupt_of_grace_ds_run_leaves_no_process_behind(tmp_path: Path) -> None:
    config, mark = write_config(tmp_path / "on.json", GRACE), str(tmp_path)
    command = command_of("cli", tmp_path, config, "--steps", "1000", "--pause", "0.1")
    env = {**os.environ, **environment(tmp_path), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, env=env, stdout=(tmp_path / "out").open("w"), stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: "step 3" in (tmp_path / "out").read_text(), 60)
        assert len(living(mark)) > 4, (tmp_path / "out").read_text()  # the launcher, its ranks and their workers
        child.send_signal(signal.SIGINT)  # to this process alone: its children are its own affair
        assert child.wait(30) == 130
        assert living(mark) == {}
    finally:
        for pid in living(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        child.wait()
