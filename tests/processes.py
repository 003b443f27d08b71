"""What tests of real processes share: who is alive, and waiting with a limit."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path


def living(mark: str) -> dict[int, str]:
    """Process id and command line of every process that has ``mark`` in its environment."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (process / "environ").read_bytes():
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
    return found


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)
