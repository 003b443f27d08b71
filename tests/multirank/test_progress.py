"""``--progress`` beside real jobs: on a terminal, in a pipe, under the deepspeed launcher, interrupted."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.multirank.harness import run_command
from tests.multirank.launch import COLLECTING, environment
from tests.multirank.test_entries import command_of, living, run_plain, write_config
from tests.terminal import on_terminal

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(240)]

STEPS = 20
GRACE = {**COLLECTING, "total_steps": STEPS, "max_repeats": 100.0}


def watched(folder: Path, *more: str, grace: dict[str, Any] | None = GRACE) -> list[str]:
    folder.mkdir(exist_ok=True)
    command = command_of("cli", folder, write_config(folder / "on.json", grace), "--steps", str(STEPS), *more)
    at = command.index("run") + 1
    return [*command[:at], "--progress", *command[at:]]


def test_a_terminal_shows_the_run_and_a_pipe_has_rare_lines_of_the_same_job(tmp_path: Path) -> None:
    drawn: list[str] = []
    command = watched(tmp_path / "a", "--pause", "0.1")
    seen = on_terminal(command, environment(tmp_path), lambda _, lines: drawn.append("\n".join(lines)))
    assert seen.status == 0 and seen.whole, "\n".join(seen.lines)
    # Each rank's lines, above the view, once; two ranks may write into one line, as without us.
    shown = "\n".join(seen.lines)
    assert [len(re.findall(rf"step {i}(?![\d/])", shown)) for i in range(1, STEPS + 1)] == [2] * STEPS
    assert any("waiting for rank 0" in picture for picture in drawn)
    told = {int(step) for picture in drawn for step in re.findall(rf"step (\d+)/{STEPS}  loss \d", picture)}
    assert len(told) >= 3
    end = "\n".join(seen.lines[-8:])
    assert f"step {STEPS}/{STEPS}  loss" in end and "ended" in end and "no further refresh" in end
    assert "guard grace: the guard is off" in end and "58 of 192 samples" in end

    (tmp_path / "b").mkdir()
    config = write_config(tmp_path / "b" / "on.json", GRACE)
    said = run_plain(tmp_path / "b", config, "--steps", str(STEPS), options=("--progress",))
    lines = [line for line in said.splitlines() if line.startswith("grace: ")]
    assert 2 <= len(lines) <= 4 and "step 0/20" in lines[0] and "step 20/20  loss" in lines[-1]
    assert "\x1b" not in said and "GRACE ──" not in said
    for rank in (0, 1):  # the job itself is the same, to the bit
        a, b = (json.loads((tmp_path / name / f"first-{rank}.json").read_text()) for name in "ab")
        assert (a["steps"], a["losses"]) == (b["steps"], b["losses"])


def test_ctrl_c_leaves_neither_a_process_nor_a_torn_terminal(tmp_path: Path) -> None:
    mark = str(tmp_path)
    asked: list[int] = []

    def interrupt(child: subprocess.Popen[bytes], lines: list[str]) -> None:
        if not asked and any(re.match(r"step [3-9]/", line) for line in lines):
            asked.append(1)
            child.send_signal(signal.SIGINT)

    seen = on_terminal(watched(tmp_path / "a", "--pause", "0.3"), environment(tmp_path), interrupt)
    assert asked and seen.status == 130 and seen.whole
    assert living(mark) == {}
    assert "ended" in "\n".join(seen.lines[-8:])


def test_a_pipe_behind_grace_ds_run_and_a_config_without_grace(tmp_path: Path) -> None:
    said = run_command(watched(tmp_path / "a", grace=None), timeout=100, env=environment(tmp_path))
    assert said.count("grace: off in this job's config") == 1 and "\x1b" not in said
