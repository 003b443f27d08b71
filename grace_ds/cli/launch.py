"""``grace-ds run``: the deepspeed launcher on an unchanged script, and none of its processes left when it is over."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from grace_ds.processes import end_group, signal_group

USAGE = "grace-ds run [launcher options] train.py [arguments]"
_GRACE_SECONDS = 10.0  # that interrupted processes have to end by themselves


def run(words: Sequence[str]) -> int:
    """Starts the launcher with ``--module grace_ds.run`` before the script; returns its exit status.

    Args:
        words: launcher options, the script (the first word that ends in ``.py``), the script's arguments.
    """
    at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if at is None:
        sys.stderr.write(f"grace-ds run: no script given; usage: {USAGE}\n")
        return 2
    if not Path(words[at]).is_file():
        sys.stderr.write(f"grace-ds run: there is no script {words[at]!r} in {Path.cwd()}; usage: {USAGE}\n")
        return 2
    return supervise([sys.executable, "-m", "deepspeed.launcher.runner", *words[:at], "--module", "grace_ds.run", *words[at:]])


def supervise(command: Sequence[str]) -> int:
    """Runs a command in a process group of its own; SIGINT and SIGTERM go to the whole group, and nothing of it stays behind.

    The deepspeed launcher alone, when only it is interrupted, ends and leaves its ranks running.
    """
    child: subprocess.Popen[bytes] | None = None
    caught: list[int] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        caught.append(signum)
        if child is not None:
            signal_group(child.pid, signum)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        child = subprocess.Popen(command, start_new_session=True)
        if caught:  # between the handler and the start
            signal_group(child.pid, caught[-1])
        status = child.wait()
    finally:
        if child is not None:
            end_group(child.pid, 0, _GRACE_SECONDS if caught else 0.0)  # what was caught has been passed on
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        return 128 + caught[0]
    return status if status >= 0 else 128 - status
