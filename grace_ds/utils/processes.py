"""Signal and end a child and all processes that it has started, as one process group."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def signal_group(group: int, number: int) -> bool:
    """Send a signal to every process of a group; return whether there was one."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def end_group(group: int, polite: int, patience: float) -> None:
    """End a whole process group: first by the signal ``polite`` (0: none), after ``patience`` seconds by SIGKILL."""
    # A signal may not have arrived yet when killpg returns; the second wait is for that.
    for number, seconds in ((polite, patience), (signal.SIGKILL, 2.0)):
        if not signal_group(group, number):
            return
        deadline = time.monotonic() + seconds
        while _runs(group) and time.monotonic() < deadline:
            time.sleep(0.05)


def _runs(group: int) -> bool:
    """Return whether any process of the group still runs; a zombie that its parent has not waited for does not count."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rsplit(")", 1)[1].split()[:3]
        except OSError:
            continue  # the process has just ended
        if int(its_group) == group and state != "Z":
            return True
    return False
