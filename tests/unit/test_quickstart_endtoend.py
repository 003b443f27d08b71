"""The quickstart as a user starts it: the real launcher, two ranks, both arms, twice into the same folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.multirank]


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "grace_ds.quickstart", "--out", str(out), "--pool-size", "640", *arguments]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[str], limit: float) -> str:
    try:
        return process.communicate(timeout=limit)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"not done after {limit} s:\n{process.communicate()[0]}")


@pytest.mark.timeout(300)
def test_both_arms_then_one_over_them(tmp_path):
    first = start(tmp_path, "--steps", "12")
    screen = finish(first, 200)
    assert first.returncode == 0, screen
    assert "320 unique, 192 near-duplicates, 128 junk" in screen.replace("\n", " ")
    summary = json.loads((tmp_path / "summary.json").read_text())
    for arm in ("uniform", "grace"):
        assert 4.0 < summary[arm]["val_loss"] < 7.7  # between a trained model's and an untrained one's, ln 2048 = 7.62
        assert [point["step"] for point in summary[arm]["curve"]] == [12]
    assert summary["grace"]["refreshes"] >= 2 and 0 < summary["grace"]["harvest_overhead"] < 1
    assert summary["grace"]["refresh_overhead"] > 0
    assert summary["uniform"]["val_loss"] != summary["grace"]["val_loss"]

    second = start(tmp_path, "--steps", "4", "--arms", "uniform")
    screen = finish(second, 90)
    assert second.returncode == 0 and "data reused" in screen, screen
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 4 and "grace" not in summary
    assert not [p for p in tmp_path.rglob("*.tmp*")]


def test_ctrl_c_ends_the_ranks(tmp_path):
    process = start(tmp_path, "--steps", "100000", "--arms", "uniform")
    log = tmp_path / "uniform" / "log.txt"
    deadline = time.monotonic() + 80
    while not (log.exists() and "spawned with command" in log.read_text()):
        assert time.monotonic() < deadline and process.poll() is None, finish(process, 5)
        time.sleep(0.2)
    ranks = [int(line.split("process ")[1].split()[0]) for line in log.read_text().splitlines() if "spawned" in line]
    process.send_signal(signal.SIGINT)
    screen = finish(process, 30)
    assert process.returncode == 130 and "interrupted" in screen
    for pid in ranks:
        stat = Path(f"/proc/{pid}/stat")
        assert not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"
