"""A command on a pseudo-terminal, and what somebody who looks at it sees: pyte is the terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROWS, COLUMNS = 24, 100


@dataclass(frozen=True)
class Seen:
    """What a terminal was like when the command had ended.

    Attributes:
        status: exit status.
        lines: everything that has scrolled off, then the screen.
        raw: every byte.
        whole: the cursor is shown, and the line discipline as it was.
    """

    status: int
    lines: list[str]
    raw: bytes
    whole: bool


Act = Callable[[subprocess.Popen[bytes], list[str]], None]


def on_terminal(command: Sequence[str | Path], env: dict[str, str], act: Act | None = None, timeout: float = 120.0) -> Seen:
    """Runs ``command``; ``act`` is called with the child and the screen's lines whenever these have changed."""
    pyte = pytest.importorskip("pyte", reason="pip install 'grace_ds[test]'")
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    before = termios.tcgetattr(slave)
    screen = pyte.HistoryScreen(COLUMNS, ROWS, history=100_000, ratio=0.5)
    stream, raw = pyte.ByteStream(screen), b""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", **env}
    child = subprocess.Popen([str(c) for c in command], cwd=ROOT, env=env, stdin=slave, stdout=slave, stderr=slave)
    deadline = time.monotonic() + timeout
    try:
        while (ready := select.select([master], [], [], 0.1)[0]) or child.poll() is None:
            assert time.monotonic() < deadline, "\n".join(screen.display)
            if ready:
                data = os.read(master, 65536)
                raw += data
                stream.feed(data)
                if act is not None:
                    act(child, list(screen.display))
        whole = not screen.cursor.hidden and termios.tcgetattr(slave) == before
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        child.wait()
        os.close(master)
        os.close(slave)
    gone = ["".join(row[i].data for i in range(COLUMNS)) for row in screen.history.top]
    return Seen(child.returncode, [line.rstrip() for line in [*gone, *screen.display]], raw, whole)
