"""Run an unchanged script or command, and leave none of its processes behind: ``grace-ds run``."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from grace_ds import _startup
from grace_ds.cli.live import Screen, is_screen
from grace_ds.config.block_file import GIVEN
from grace_ds.errors import ConfigError
from grace_ds.integrations.preemption import RESUME_ME, VARIABLE
from grace_ds.monitor.progress import LINES
from grace_ds.monitor.progress import VARIABLE as PROGRESS
from grace_ds.utils.processes import end_group, signal_group

USAGE = "grace-ds run [options] [launcher options] train.py [arguments], or grace-ds run [options] COMMAND ..."
_STARTUP = Path(_startup.__file__).parent
_GRACE_SECONDS = 10.0  # seconds that interrupted processes have to end by themselves
OWN_OPTIONS = _PREEMPT, _PROGRESS, _GRACE = "--preempt-dir", "--progress", "--grace"
_WANTED = {_PREEMPT: "the folder of the checkpoint", _GRACE: "the file with the grace block, YAML or JSON"}


def run(words: Sequence[str]) -> int:
    """Start a job and return its exit status.

    A script runs under the deepspeed launcher, with ``--module grace_ds.run`` before it.  Any other command (``torchrun``,
    ``accelerate launch``, ``trl sft``) runs as it is, with each Python process that it starts prepared by
    ``grace_ds/_startup/sitecustomize.py``.

    Args:
        words: options of ``grace-ds run``, then a command and its arguments, or launcher options, the script (the first word that
            ends in ``.py``) and its arguments.
    """
    environment: dict[str, str] = {}
    options: list[str] = []  # for grace_ds.run
    progress = False
    while words and words[0] in (_PREEMPT, _PROGRESS, _GRACE):
        option, words = words[0], words[1:]
        if option == _PROGRESS:
            progress, options = True, [*options, option]
            continue
        if not words or words[0].startswith("-"):
            sys.stderr.write(f"grace-ds run: {option} needs {_WANTED[option]}; usage: {USAGE}\n")
            return 2
        value, words = str(Path(words[0]).absolute()), words[1:]
        if option == _PREEMPT:
            environment[VARIABLE] = value
        elif Path(value).is_file():
            environment[GIVEN], options = value, [*options, option, value]
        else:
            sys.stderr.write(f"grace-ds run: there is no file {value} with a grace block; name another with {_GRACE}\n")
            return 2
    scripted = not words or words[0].startswith("-") or words[0].endswith(".py")
    command = _launcher(words, options) if scripted else _program(words)
    if isinstance(command, str):
        sys.stderr.write(f"grace-ds run: {command}; usage: {USAGE}\n")
        return 2
    if not scripted:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_STARTUP), os.environ.get("PYTHONPATH")]))
        environment |= {PROGRESS: LINES} if progress else {}
    if not progress or not is_screen(sys.stdout):  # without a terminal, rank 0 prints a line from time to time
        return supervise(command, environment)
    try:
        screen = Screen()
    except ConfigError as error:
        sys.stderr.write(f"grace-ds run: {error}\n")
        return 2
    with screen:
        return supervise(command, {**environment, **screen.environment}, screen.streams)


def _program(words: Sequence[str]) -> list[str] | str:
    """Return a command and its arguments as they are to be started; or what is wrong with them."""
    found = shutil.which(words[0])
    return [found, *words[1:]] if found else f"no script given, and there is no command {words[0]!r}"


def _launcher(words: Sequence[str], options: Sequence[str]) -> list[str] | str:
    """Return the deepspeed launcher's command line for a script; or what is wrong with the words."""
    script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if script is None:
        return "no script given"
    if not Path(words[script]).is_file():
        return f"there is no script {words[script]!r} in {Path.cwd()}"
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
    return [*launcher, *words[:script], "--module", "grace_ds.run", *options, *words[script:]]


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
