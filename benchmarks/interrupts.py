"""Ctrl-C and SIGTERM put off while a process is started and noted, so that none is left behind unnoted."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def put_off() -> Iterator[None]:
    """Handles SIGINT and SIGTERM that come within the block at its end.  In the main thread only.

    A signal between a child's start and the note of it would raise where nobody knows of the child yet.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)
