"""The batch script on a real Slurm of two nodes: each way of launching, and a job that goes back to the queue."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from grace_ds.data.schedule import load_book
from tests.cluster.slurm import Slurm, missing
from tests.multirank.launch import COLLECTING, environment, free_port, stream
from tests.multirank.test_entries import living, write_config

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300), pytest.mark.skipif(bool(missing()), reason=missing() or "-")]

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "slurm" / "train.sbatch"
JOB = str(ROOT / "tests" / "multirank" / "plain_job.py")
WAYS = ("srun", "deepspeed", "pmix")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def variables(folder: Path, way: str) -> dict[str, str]:
    venv = str(Path(sys.executable).parent.parent)
    # Both nodes are this machine, whose names nobody resolves.
    ours = {"GRACE_LAUNCH": way, "GRACE_VENV": venv, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return {**environment(folder), "OMP_NUM_THREADS": "1", **ours}


def config_of(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return write_config(folder / "on.json", {**COLLECTING, "run_dir": str(folder / "run")})


@pytest.fixture(scope="module")
def made(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a whole run of each way."""
    folders = {}
    for way in WAYS:
        folder = folders[way] = tmp_path_factory.mktemp(way)
        arguments = [JOB, "--deepspeed_config", str(config_of(folder)), "--out", str(folder), "--steps", "12"]
        job = slurm.submit([], SCRIPT, arguments, variables(folder, way), folder)
        ended = slurm.end(job, 120)
        assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), (folder / "out").read_text()
    return folders


def ids_of(folder: Path) -> list[list[int]]:
    return stream([json.loads((folder / f"first-{r}.json").read_text()) for r in range(2)])


def test_every_way_of_launching_trains_on_the_same_schedules(made: dict[str, Path]) -> None:
    books = [[s.digest() for s in load_book(folder / "run" / "schedules").schedules] for folder in made.values()]
    assert len(books[0]) >= 4 and books == [books[0]] * len(WAYS)
    assert len({json.dumps(ids_of(folder)) for folder in made.values()}) == 1


def test_rows_travel_by_mpi_where_there_is_an_mpi_world_and_by_torch_elsewhere(made: dict[str, Path]) -> None:
    for way, transport in (("srun", "torch"), ("deepspeed", "torch"), ("pmix", "mpi")):
        assert f"transport: {transport}, 2 data-parallel rank(s)" in (made[way] / "out").read_text(), way


def test_tasks_that_would_train_alone_are_refused_with_the_cure(slurm: Slurm, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    alone = tmp_path / "alone.sh"
    words = [sys.executable, "-m", "grace_ds.run", JOB, "--deepspeed_config", str(config), "--out", str(tmp_path)]
    # As a first try under Slurm often is: every task a world of its own.
    alone.write_text(
        f"#!/bin/bash\nsrun bash -c 'export RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_PORT=$((MASTER_PORT + SLURM_PROCID)); "
        f"exec {' '.join(words)}'\n"
    )
    job = slurm.submit(["--nodes=2", "--ntasks-per-node=1"], alone, [], variables(tmp_path, "srun"), tmp_path)
    assert slurm.end(job, 120)["JobState"] == "FAILED"
    said = (tmp_path / "out").read_text()
    assert said.count("srun has started 2 tasks (SLURM_STEP_NUM_TASKS), torch.distributed has 1 rank(s)") == 2, said
    assert "launch/slurm/train.sbatch" in said


@pytest.mark.parametrize("way", WAYS)
def test_a_job_told_to_go_is_saved_requeued_and_goes_on(slurm: Slurm, made: dict[str, Path], tmp_path: Path, way: str) -> None:
    saved, out = tmp_path / "saved", tmp_path / "out"
    arguments = [JOB, "--deepspeed_config", str(config_of(tmp_path)), "--out", str(tmp_path), "--steps", "12", "--pause", "0.5"]
    arguments += ["--resume", str(saved)]
    job = slurm.submit([], SCRIPT, arguments, {**variables(tmp_path, way), "GRACE_PREEMPT_DIR": str(saved)}, tmp_path)
    slurm.until(lambda: out.exists() and "step 5" in out.read_text(), 120, "step 5")
    slurm.run("scancel", "--batch", "--signal=USR1", str(job))  # what --signal=B:USR1 does before the time limit
    slurm.until(lambda: slurm.state(job)["JobState"] in ("PENDING", "FAILED", "COMPLETED"), 90, "its return to the queue")
    assert slurm.state(job)["JobState"] == "PENDING", out.read_text()
    step = int((saved / "latest").read_text().removeprefix("global_step"))
    assert 5 <= step < 12 and "back to the queue" in out.read_text()
    time.sleep(3)  # a node refuses a job that it was told to kill in the same second
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")  # else it waits for two minutes
    ended = slurm.end(job, 120)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), out.read_text()
    assert ids_of(tmp_path) == ids_of(made[way])[step:]


@pytest.mark.parametrize("preempt", [True, False], ids=["preempt dir", "none"])
def test_a_cancelled_job_ends_within_the_kill_wait_and_its_last_checkpoint_goes_on(
    slurm: Slurm, tmp_path: Path, preempt: bool
) -> None:
    saved, out = tmp_path / "saved", tmp_path / "out"
    grace = {**COLLECTING, "run_dir": str(tmp_path / "run")}
    config = json.loads(write_config(tmp_path / "ds.json", grace).read_text())
    spec = {"config": config, "folder": str(tmp_path), "limit": 60, "save": str(saved)}
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text(json.dumps({**spec, "steps": 10**6}))
    second.write_text(json.dumps({**spec, "steps": 4, "load": str(saved)}))
    env = variables(tmp_path, "srun") | ({"GRACE_PREEMPT_DIR": str(saved)} if preempt else {})
    job = slurm.submit([], SCRIPT, [str(ROOT / "tests" / "cluster" / "fault_job.py"), str(first)], env, tmp_path)
    slurm.until(lambda: out.exists() and "step 10\n" in out.read_text(), 120, "step 10")
    slurm.run("scancel", str(job))
    assert slurm.end(job, 40)["JobState"] == "CANCELLED", out.read_text()
    slurm.until(lambda: not living(str(tmp_path)), 20, "the end of its processes")
    assert "back to the queue" not in out.read_text()
    at = int((saved / "latest").read_text().removeprefix("global_step"))
    assert at >= 8 and (preempt or at % 4 == 0)
    env |= {"MASTER_PORT": str(free_port())}
    job = slurm.submit([], SCRIPT, [str(ROOT / "tests" / "cluster" / "fault_job.py"), str(second)], env, tmp_path)
    assert slurm.end(job, 120)["JobState"] == "COMPLETED", out.read_text()
    told = [json.loads((tmp_path / f"done-{r}.json").read_text()) for r in range(2)]
    assert [t["first"] for t in told] == [at, at] and len(stream(told)) == 4
