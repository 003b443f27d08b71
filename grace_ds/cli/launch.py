"""``grace-ds run``: the deepspeed launcher on an unchanged script, and none of its processes left when it is over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from grace_ds.cli.live import Screen, is_screen
from grace_ds.errors import ConfigError
from grace_ds.integrations.preemption import RESUME_ME, VARIABLE
from grace_ds.utils.processes import end_group, signal_group

USAGE = "grace-ds run [--progress] [--preempt-dir DIR] [launcher options] train.py [arguments]"
_GRACE_SECONDS = 10.0  # that interrupted processes have to end by themselves
_PREEMPT, _PROGRESS = "--preempt-dir", "--progress"


def run(words: Sequence[str]) -> int:
    """Starts the launcher with ``--module grace_ds.run`` before the script; returns its exit status.

    Args:
        words: our options, launcher options, the script (the first word that ends in ``.py``), the script's arguments.
    """
    environment: dict[str, str] = {}
    told: list[str] = []
    while words[:1] in ([_PREEMPT], [_PROGRESS]):
        if words[0] == _PROGRESS:
            told, words = [_PROGRESS], words[1:]
            continue
        if len(words) < 2 or words[1].startswith("-"):
            sys.stderr.write(f"grace-ds run: {_PREEMPT} needs the folder of the checkpoint; usage: {USAGE}\n")
            return 2
        environment[VARIABLE] = str(Path(words[1]).absolute())
        words = words[2:]
    at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if at is None:
        sys.stderr.write(f"grace-ds run: no script given; usage: {USAGE}\n")
        return 2
    if not Path(words[at]).is_file():
        sys.stderr.write(f"grace-ds run: there is no script {words[at]!r} in {Path.cwd()}; usage: {USAGE}\n")
        return 2
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", *words[:at], "--module", "grace_ds.run", *told, *words[at:]]
    if not told or not is_screen(sys.stdout):  # into a file rank 0 writes a line now and then
        return supervise(launcher, environment)
    try:
        screen = Screen()
    except ConfigError as error:
        sys.stderr.write(f"grace-ds run: {error}\n")
        return 2
    with screen:
        return supervise(launcher, {**environment, **screen.environment}, screen.streams)


def supervise(command: Sequence[str], environment: Mapping[str, str], streams: Mapping[str, Any] | None = None) -> int:
    """Runs a command in a process group of its own; SIGINT and SIGTERM go to the whole group, and nothing of it stays behind.

    The deepspeed launcher alone, when only it is interrupted, ends and leaves its ranks running.

    With a folder for preemption in ``environment``, SIGTERM and SIGUSR1 reach the ranks as SIGUSR1, which the launcher's
    processes ignore: of a SIGTERM they would end the ranks one after another, in the middle of their checkpoint.
    """
    child: subprocess.Popen[bytes] | None = None
    caught: list[int] = []
    polite = {signal.SIGTERM: signal.SIGUSR1, signal.SIGUSR1: signal.SIGUSR1} if VARIABLE in environment else {}

    def forward(signum: int, frame: FrameType | None) -> None:
        caught.append(signum)
        if child is not None:
            signal_group(child.pid, polite.get(signal.Signals(signum), signum))

    before: dict[int, Any] = {int(number): signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    if polite:
        # Ignored signals stay ignored in the children; only the ranks, who install a handler, hear this one.
        before[int(signal.SIGUSR1)] = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        child = subprocess.Popen(command, start_new_session=True, env={**os.environ, **environment}, **(streams or {}))
        if polite:
            signal.signal(signal.SIGUSR1, forward)
        if caught:  # between the handler and the start
            forward(caught[-1], None)
        status = child.wait()
    finally:
        if child is not None:
            end_group(child.pid, 0, _GRACE_SECONDS if caught else 0.0)  # what was caught has been passed on
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught and not (status == RESUME_ME and caught[0] in polite):
        return 128 + caught[0]
    return status if status >= 0 else 128 - status
