"""A child and all that it has started, as one process group: signalled together, and none of it left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def signal_group(group: int, number: int) -> bool:
    """Sends a signal to every process of a group; returns whether there was one."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def end_group(group: int, polite: int, patience: float) -> None:
    """Ends a whole process group: by the signal ``polite`` (0: none is sent), and after ``patience`` seconds for certain."""
    # A signal is only on its way when killpg returns; the second wait is for that.
    for number, seconds in ((polite, patience), (signal.SIGKILL, 2.0)):
        if not signal_group(group, number):
            return
        deadline = time.monotonic() + seconds
        while _runs(group) and time.monotonic() < deadline:
            time.sleep(0.05)


def _runs(group: int) -> bool:
    """Whether anything of the group still runs; a zombie that its adopter has not waited for does not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rsplit(")", 1)[1].split()[:3]
        except OSError:
            continue  # it ended while we looked
        if int(its_group) == group and state != "Z":
            return True
    return False
