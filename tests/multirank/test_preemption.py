"""A job that is told to go: it saves on all ranks together, says so by its exit status, and goes on where it was."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from grace_ds.errors import ConfigError
from grace_ds.integrations.preemption import RESUME_ME, VARIABLE, PreemptionWatch
from tests.multirank.harness import run_module
from tests.multirank.launch import COLLECTING, environment, stream
from tests.multirank.test_entries import command_of, living, run_plain, wait_until, write_config

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(240)]

STEPS = 24  # of the undisturbed run


def preempted(way: str, folder: Path, config: Path, tell: Any) -> tuple[int, str]:
    """Starts a long job, lets ``tell`` end it after its fifth step; its exit status and output, once nothing of it runs."""
    out, saved = folder / "out", folder / "saved"
    command = command_of(way, folder, config, "--steps", "1000", "--pause", "0.05")
    env = {**os.environ, **environment(folder), "OMP_NUM_THREADS": "1"}
    if way == "cli":
        command[2:2] = ["--preempt-dir", str(saved)]
    else:
        env[VARIABLE] = str(saved)
    child = subprocess.Popen(command, env=env, stdout=out.open("w"), stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: "step 5" in out.read_text() or child.poll() is not None, 90)
        tell(child, living(str(folder)))
        status = child.wait(60)
        wait_until(lambda: not living(str(folder)), 10)
        return status, out.read_text()
    finally:
        for pid in living(str(folder)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        child.wait()


def terminate(child: subprocess.Popen[Any], processes: dict[int, str]) -> None:
    """As a scheduler ends a job: SIGTERM to what it has started."""
    child.send_signal(signal.SIGTERM)


def warn_one_rank(child: subprocess.Popen[Any], processes: dict[int, str]) -> None:
    """SIGUSR1 to one rank alone: the others must be told by it."""
    # The oldest of those that carry its arguments: the others are its data workers.
    os.kill(min(pid for pid, words in processes.items() if "--local_rank=1" in words), signal.SIGUSR1)


def ids_of(folder: Path) -> list[list[int]]:
    return stream([json.loads((folder / f"first-{r}.json").read_text()) for r in range(2)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """The ids of each step of a run that nobody ends."""
    folder = tmp_path_factory.mktemp("whole")
    run_plain(folder, write_config(folder / "on.json", COLLECTING), "--steps", str(STEPS))
    return ids_of(folder)


@pytest.mark.parametrize(("way", "tell"), [("cli", terminate), ("module", warn_one_rank)], ids=["launcher", "one rank"])
def test_a_preempted_job_saves_together_and_goes_on_as_if_nothing_had_been(
    whole: list[list[int]], tmp_path: Path, way: str, tell: Any
) -> None:
    config = write_config(tmp_path / "on.json", COLLECTING)
    status, said = preempted(way, tmp_path, config, tell)
    assert status == RESUME_ME, said
    step = int((tmp_path / "saved" / "latest").read_text().removeprefix("global_step"))
    assert 5 <= step <= STEPS - 4
    assert f"SIGUSR1: saving step {step}" in said and f"step {step} is saved" in said
    assert f"step {step + 1}\n" not in said
    (tmp_path / "rest").mkdir()
    run_plain(tmp_path / "rest", config, "--steps", str(STEPS), "--resume", str(tmp_path / "saved"))
    rest = ids_of(tmp_path / "rest")
    assert len(rest) == STEPS - step
    assert rest == whole[step:]


def test_a_job_without_a_grace_block_is_preempted_alike(tmp_path: Path) -> None:
    status, said = preempted("cli", tmp_path, write_config(tmp_path / "off.json", None), terminate)
    assert status == RESUME_ME, said
    assert (tmp_path / "saved" / "latest").exists()


# How training is over (tests/multirank/over_job.py), and the exit status: a handler of the script's own ends it with 7.
OVER = {
    "destroy": -signal.SIGTERM,
    "destroy usr1": -signal.SIGUSR1,
    "destroy python": 7,
    "slow pending destroy": -signal.SIGTERM,
    "slow pending destroy python": 7,
    "slow gone": -signal.SIGTERM,
    "slow group": -signal.SIGTERM,
    "wait": -signal.SIGTERM,  # the engine is there and takes no step any more
    "wait python": 7,
    "step": RESUME_ME,  # it does after all
}


@pytest.fixture(scope="module")
def over(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit status and output of each way."""
    folder = tmp_path_factory.mktemp("over")
    run_module("tests.multirank.over_job", [folder, *OVER], timeout=150, env=environment(folder))
    codes = json.loads((folder / "codes.json").read_text())
    return {way: (codes[way], (folder / way).read_text()) for way in OVER}


@pytest.mark.parametrize("way", list(OVER))
def test_a_signal_after_the_end_of_training_does_what_it_would_have_done(over: dict[str, tuple[int, str]], way: str) -> None:
    status, said = over[way]
    assert "steps 3" in said and "still here" not in said
    assert status == OVER[way], said
    assert ("former: SIGTERM" in said) == ("python" in way)
    assert ("no optimizer step has begun since" in said) == way.startswith("wait")
    assert ("SIGTERM: saving step 4" in said) == (way == "step")


def test_a_signal_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match="'SIGNOTHING' is not known"):
        PreemptionWatch(None, "nowhere", signals=["SIGNOTHING"])


def test_the_folder_is_asked_for(tmp_path: Path) -> None:
    from grace_ds.cli.launch import run

    assert run(["--preempt-dir"]) == 2
    assert run(["--preempt-dir", "--num_accelerators", "2", "train.py"]) == 2
