"""Launches: whatever a child does, the caller gets its last lines in time and nothing of it stays behind."""

from __future__ import annotations

import io
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from grace_ds.quickstart.launch import Arm, ArmFailed, deepspeed_command, environment, free_port, run_arm

# A launcher that starts a rank which ignores SIGTERM and tells its pid, and that waits for it.
STUBBORN = """
import subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
p = subprocess.Popen([sys.executable, "-c", child])
open(sys.argv[1], "w").write(str(p.pid))
p.wait()
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
