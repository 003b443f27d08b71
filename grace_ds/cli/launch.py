"""Run the deepspeed launcher on an unchanged script, and leave none of its processes behind: ``grace-ds run``."""

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
_GRACE_SECONDS = 10.0  # seconds that interrupted processes have to end by themselves
_PREEMPT, _PROGRESS = "--preempt-dir", "--progress"


def run(words: Sequence[str]) -> int:
    """Start the launcher with ``--module grace_ds.run`` before the script; return its exit status.

    Args:
        words: options of ``grace-ds run``, launcher options, the script (the first word that ends in ``.py``), its arguments.
    """
    environment: dict[str, str] = {}
    progress_option: list[str] = []
    while words[:1] in ([_PREEMPT], [_PROGRESS]):
        if words[0] == _PROGRESS:
            progress_option, words = [_PROGRESS], words[1:]
            continue
        if len(words) < 2 or words[1].startswith("-"):
            sys.stderr.write(f"grace-ds run: {_PREEMPT} needs the folder of the checkpoint; usage: {USAGE}\n")
            return 2
        environment[VARIABLE] = str(Path(words[1]).absolute())
        words = words[2:]
    script_index = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if script_index is None:
        sys.stderr.write(f"grace-ds run: no script given; usage: {USAGE}\n")
        return 2
    if not Path(words[script_index]).is_file():
        sys.stderr.write(f"grace-ds run: there is no script {words[script_index]!r} in {Path.cwd()}; usage: {USAGE}\n")
        return 2
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        *words[:script_index],
        "--module",
        "grace_ds.run",
        *progress_option,
        *words[script_index:],
    ]
    if not progress_option or not is_screen(sys.stdout):  # without a terminal, rank 0 prints a line from time to time
        return supervise(launcher, environment)
    try:
        screen = Screen()
    except ConfigError as error:
        sys.stderr.write(f"grace-ds run: {error}\n")
        return 2
    with screen:
        return supervise(launcher, {**environment, **screen.environment}, screen.streams)


def supervise(command: Sequence[str], environment: Mapping[str, str], streams: Mapping[str, Any] | None = None) -> int:
    """Run a command in its own process group; pass SIGINT and SIGTERM to the whole group, and leave no process of it behind.

    The deepspeed launcher ends without its ranks if only the launcher is interrupted.

    With a folder for preemption in ``environment``, SIGTERM and SIGUSR1 reach the ranks as SIGUSR1, which the launcher's
    processes ignore.  At a SIGTERM they would end the ranks one after another, in the middle of their checkpoint.
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
        # Ignored signals stay ignored in the children; only the ranks install a handler and receive this one.
        before[int(signal.SIGUSR1)] = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        child = subprocess.Popen(command, start_new_session=True, env={**os.environ, **environment}, **(streams or {}))
        if polite:
            signal.signal(signal.SIGUSR1, forward)
        if caught:  # a signal that arrived between installing the handler and the start
            forward(caught[-1], None)
        status = child.wait()
    finally:
        if child is not None:
            end_group(child.pid, 0, _GRACE_SECONDS if caught else 0.0)  # caught signals have been passed on
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught and not (status == RESUME_ME and caught[0] in polite):
        return 128 + caught[0]
    return status if status >= 0 else 128 - status
