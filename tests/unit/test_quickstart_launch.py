"""Launches: whatever a child does, the caller gets its last lines in time and nothing of it stays behind."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import socket
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import pytest
from grace_ds_quickstart import __main__ as quickstart
from grace_ds_quickstart import launch
from grace_ds_quickstart.launch import (
    Arm,
    ArmFailed,
    choose_launcher,
    deepspeed_command,
    environment,
    free_port,
    mpi_environment,
    openmpi_command,
    run_arm,
)
from grace_ds_quickstart.train import ds_config, join_mpi_world
from rich.console import Console

from grace_ds.errors import ConfigError
from tests.processes import living, wait_until

# A launcher that starts a rank which ignores SIGTERM and tells its pid, and that waits for it.
STUBBORN = """
import subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
p = subprocess.Popen([sys.executable, "-c", child])
open(sys.argv[1], "w").write(str(p.pid))
p.wait()
"""

# A rank under mpirun that ignores SIGTERM and says in the working directory that it is there.
RANK = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "RANK")
rank, *others = (os.environ.get(name) for name in names)
pathlib.Path(sys.argv[1], f"rank{rank}").write_text(" ".join(map(str, others)))
print("rank", rank, "is there", flush=True)
"""


def run(tmp_path: Path, code: str, *args: str, steps=20, limit=60.0) -> tuple[float, str]:
    screen = io.StringIO()
    console = Console(file=screen, width=200, force_terminal=False)
    arm = Arm("uniform", [sys.executable, "-c", code, *args], tmp_path / "arm" / "log.txt", steps, limit)
    return run_arm(arm, os.environ, console), screen.getvalue()


def alive(pid: int) -> bool:
    try:
        # A killed orphan stays a zombie until somebody waits for it: it runs no more.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def mpi():
    """The folder of mpirun."""
    try:
        binaries = choose_launcher("openmpi").binaries
    except ConfigError as error:
        pytest.skip(str(error))
    assert binaries is not None
    return binaries


def run_under_mpi(tmp_path: Path, binaries: Path, then: str, limit=60.0, mark="") -> str:
    """The log of two ranks of ``RANK`` followed by ``then``, started as the quickstart starts its own."""
    (tmp_path / "rank_of_a_test.py").write_text(RANK + then)
    command = openmpi_command("rank_of_a_test", [str(tmp_path)], 2, tmp_path / "arm" / "hostfile")
    env = mpi_environment(environment(tmp_path / "ext", {**os.environ, "RANK": "7"}), binaries)
    name, _, value = mark.partition("=")
    path = os.pathsep.join([str(tmp_path), env.get("PYTHONPATH", "")])
    arm = Arm("grace", command, tmp_path / "arm" / "log.txt", 20, limit)
    run_arm(arm, env | {"PYTHONPATH": path} | ({name: value} if name else {}), Console(file=io.StringIO(), width=200))
    return (tmp_path / "arm" / "log.txt").read_text()


def both_there(tmp_path: Path) -> bool:
    return all((tmp_path / f"rank{rank}").exists() for rank in range(2))


def test_a_line_each_tenth_and_the_whole_output_in_the_log(tmp_path):
    code = """
for step in range(1, 21):
    print(f"step {step}/20 loss {9 - step / 10:.2f}")
    if step == 10: print("step 10/20 val_loss 8.1234")
print("[launch.py:1] grace is the name of a folder")
print("noise of the launch")
print("GRACE: transport torch")
"""
    seconds, screen = run(tmp_path, code)
    lines = [line.strip() for line in screen.splitlines() if "/20  loss" in line]
    assert [line.split("/")[0] for line in lines] == [str(step) for step in range(2, 21, 2)]
    assert "val_loss 8.1234" not in lines[4] and "val_loss 8.1234" in lines[5]
    assert "eta 0 s" in lines[-1]
    shown = screen[screen.rindex("eta") :]
    assert "GRACE: transport torch" in shown and "noise" not in shown and "folder" not in shown
    assert (tmp_path / "arm/log.txt").read_text().count("\n") == 24
    assert 0 < seconds < 30


def test_a_failing_arm_gives_its_status_and_last_lines(tmp_path):
    code = "import sys\nfor i in range(99): print('line', i, flush=True)\nprint('the reason', file=sys.stderr)\nsys.exit(3)"
    with pytest.raises(ArmFailed, match="exit status 3") as caught:
        run(tmp_path, code)
    assert caught.value.tail[-1] == "the reason" and "line 98" in caught.value.tail
    assert "line 5" not in caught.value.tail


def test_the_limit_ends_even_a_rank_that_ignores_sigterm(tmp_path):
    pid_file = tmp_path / "pid"
    start = time.monotonic()
    with pytest.raises(ArmFailed, match="not done after 1 s"):
        run(tmp_path, STUBBORN, str(pid_file), limit=1.0)
    assert time.monotonic() - start < 20
    assert not alive(int(pid_file.read_text()))


def test_an_interrupt_leaves_no_process_behind(tmp_path):
    # A run in the background of a shell inherits an ignored SIGINT; pytest would never see ours.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pid_file = tmp_path / "pid"

    def interrupt() -> None:
        while not pid_file.exists() or not pid_file.read_text():
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), 2)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, STUBBORN, str(pid_file))
    assert not alive(int(pid_file.read_text()))


def test_command_uses_this_environments_launcher_and_a_port_that_is_free():
    command = deepspeed_command("some.module", ["--x", "1"], ranks=3)
    assert Path(command[0]).parent == Path(sys.prefix) / "bin"
    assert command[command.index("--num_accelerators") + 1] == "3"
    assert command[-4:] == ["--module", "some.module", "--x", "1"]
    with socket.socket() as s:
        s.bind(("127.0.0.1", free_port()))


def test_environment_keeps_the_users_choice_and_shields_the_extensions_cache(tmp_path):
    env = environment(tmp_path / "ext", {"DS_ACCELERATOR": "cuda", "HOME": "/root"})
    assert env["DS_ACCELERATOR"] == "cuda" and env["HOME"] == "/root" and env["OMP_NUM_THREADS"] == "1"
    assert env["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "ext")
    assert environment(tmp_path, {})["DS_ACCELERATOR"] == "cpu"


# -- over MPI ----------------------------------------------------------------------------------------------------------


def test_ranks_under_mpi_are_told_where_to_meet_and_no_stale_rank(tmp_path, mpi):
    log = run_under_mpi(tmp_path, mpi, "from mpi4py import MPI\nprint('world of', MPI.COMM_WORLD.Get_size(), flush=True)")
    size, first, address, port, stale = (tmp_path / "rank0").read_text().split()
    assert (size, first, address, stale) == ("2", "0", "127.0.0.1", "None") and port.isdigit()
    assert (tmp_path / "rank1").read_text().split() == ["2", "1", address, port, "None"]
    assert log.count("world of 2") == 2


def test_a_rank_that_fails_under_mpi_fails_the_arm_with_its_reason(tmp_path, mpi):
    with pytest.raises(ArmFailed) as caught:
        run_under_mpi(tmp_path, mpi, "if rank == '1': raise ValueError('the reason')\ntime.sleep(600)")
    assert any("ValueError: the reason" in line for line in caught.value.causes)


@pytest.mark.slow
def test_the_limit_ends_ranks_under_mpi_that_ignore_sigterm(tmp_path, mpi):
    mark = f"GRACE_DS_TEST={os.getpid()}_limit"
    with pytest.raises(ArmFailed, match=r"not done after 20 s \(--timeout\)"):
        run_under_mpi(tmp_path, mpi, "time.sleep(600)", limit=20.0, mark=mark)
    assert both_there(tmp_path) and not living(mark)


def test_ranks_whose_mpirun_was_killed_do_not_stay(tmp_path, mpi):
    mark = f"GRACE_DS_TEST={os.getpid()}_killed"

    def kill_launchers() -> None:
        wait_until(lambda: both_there(tmp_path), 50)
        for process, command in living(mark).items():
            if "launcher_args" in command or "prterun" in command:
                os.kill(process, signal.SIGKILL)

    threading.Thread(target=kill_launchers, daemon=True).start()
    with pytest.raises(ArmFailed):
        run_under_mpi(tmp_path, mpi, "time.sleep(600)", mark=mark)
    assert not living(mark)


def test_an_interrupt_leaves_no_rank_under_mpi_behind(tmp_path, mpi):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    mark = f"GRACE_DS_TEST={os.getpid()}_interrupt"

    def interrupt() -> None:
        wait_until(lambda: both_there(tmp_path), 50)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)  # somebody in a hurry
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_under_mpi(tmp_path, mpi, "time.sleep(600)", mark=mark)
    assert not living(mark)


# -- which launcher ----------------------------------------------------------------------------------------------------


def executable(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine whose environment and PATH are two empty folders, and that has mpi4py."""
    monkeypatch.setattr(launch.sysconfig, "get_path", lambda name: str(tmp_path / "environment"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: object())
    return tmp_path


def test_auto_takes_mpi_where_it_is_and_this_environments_first(machine):
    for folder in ("path", "environment"):
        for name in ("mpirun", "ompi_info"):
            executable(machine / folder / name)
        chosen = choose_launcher("auto")
        assert (chosen.name, chosen.comm, chosen.binaries) == ("openmpi", "mpi", machine / folder)
        assert "over MPI" in chosen.why and str(machine / folder / "mpirun") in chosen.why
    asked = choose_launcher("deepspeed")
    assert (asked.name, asked.comm, asked.binaries) == ("deepspeed", "torch", None)


@pytest.mark.parametrize(
    ("there", "mpi4py", "missing"),
    [
        ((), True, "mpirun is not installed"),
        (("mpirun",), True, "mpirun is not Open MPI's"),
        (("mpirun", "ompi_info"), False, "mpi4py is not installed"),
    ],
)
def test_what_is_missing_of_mpi_is_an_error_if_it_was_asked_for_and_said_if_not(
    machine, monkeypatch, capsys, there, mpi4py, missing
):
    for name in there:
        executable(machine / "path" / name)
    if not mpi4py:
        monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    chosen = choose_launcher("auto")
    assert (chosen.name, chosen.comm) == ("deepspeed", "torch")
    assert missing in chosen.why and "pip install 'grace_ds[mpi]'" in chosen.why and "torch.distributed" in chosen.why
    assert quickstart.main(["--launcher", "openmpi", "--out", str(machine / "out")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and missing in said and "pip install 'grace_ds[mpi]'" in said and "--launcher deepspeed" in said


def test_an_arm_that_ends_well_without_a_result_has_failed(tmp_path):
    (tmp_path / "log.txt").write_text("the last line\n")
    with pytest.raises(ArmFailed, match="ended without a result") as caught:
        quickstart.read_result(Arm("grace", [], tmp_path / "log.txt", 1, 1.0), tmp_path)
    assert caught.value.causes == ["the last line"]


@pytest.mark.parametrize(
    ("given", "joined"),
    [
        ({"MASTER_ADDR": "a", "MASTER_PORT": "1"}, True),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "1", "RANK": "0"}, False),
        ({"MASTER_ADDR": "a"}, False),
    ],
)
def test_torch_gets_the_ranks_of_mpi_where_no_launcher_of_its_own_gave_any(monkeypatch, given, joined):
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    fake = {**mpi, **given}
    monkeypatch.setattr(os, "environ", fake)
    join_mpi_world()
    assert {name: fake.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} == (
        {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}
        if joined
        else {"RANK": given.get("RANK"), "WORLD_SIZE": None, "LOCAL_RANK": None}
    )


def test_the_grace_block_asks_for_the_launchers_transport(tmp_path):
    args = quickstart.parse(["--out", str(tmp_path)])
    folder = tmp_path / "grace"
    given = quickstart.train_arguments(args, "grace", folder, "mpi")
    assert given[given.index("--comm") + 1] == "mpi" and "--grace" in given
    job = Namespace(batch=32, zero=2, lr=1e-3, steps=20, grace=True, order_seed=0, data=tmp_path, out=folder)
    assert ds_config(job, 600, "mpi")["data_efficiency"]["data_sampling"]["grace"]["comm"] == "mpi"


def test_the_script_names_every_option_of_the_help():
    script = (Path(__file__).parents[2] / "launch/quickstart.sh").read_text()
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as told:
        quickstart.parse(["--help"])
    options = set(re.findall(r"--[a-z][a-z-]+", told.getvalue())) - {"--help"}
    assert {"--launcher", "--pool-size", "--order-seed"} < options
    assert options <= set(re.findall(r"--[a-z][a-z-]+", script))
