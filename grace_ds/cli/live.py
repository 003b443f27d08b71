"""Show a few lines about the run below the job's own output on a terminal: ``grace-ds run --progress``.

The job writes into a pseudo-terminal of this process, so that it finds the terminal that it would have had.  Whole lines are
passed on above the view, in their colours.  One thread reads and draws, and only that thread writes to the screen.
"""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import json
import os
import pty
import select
import shutil
import socket
import sys
import tempfile
import termios
import threading
import time
from pathlib import Path
from typing import IO, Any

from grace_ds.errors import ConfigError
from grace_ds.monitor import progress

PICTURES = 0.25  # seconds between two pictures
SILENCE = 10.0  # seconds without a message after which the view says so


def is_screen(stream: IO[str]) -> bool:
    """Return whether ``stream`` is a terminal that can be drawn on."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


class Screen:
    """The view, within its ``with`` block; afterwards the terminal is always as it was before.

    Attributes:
        streams: arguments of :class:`subprocess.Popen`, for the job.
        environment: additional variables for the job.

    Raises:
        ConfigError: rich is not installed.
    """

    def __init__(self) -> None:
        try:
            from rich.console import Console
            from rich.live import Live
        except ImportError as error:
            raise ConfigError("--progress needs rich; pip install 'grace_ds[report]'") from error
        self.console = Console(file=sys.stdout, highlight=False)
        self.facts: progress.Facts = {}
        self._last_message, self._partial, self._ended = time.monotonic(), "", False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = threading.Event()
        self._live = Live(
            get_renderable=self._view, console=self.console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )

    def __enter__(self) -> Screen:
        self._folder = Path(tempfile.mkdtemp(prefix="grace-ds-"))  # short: a socket's path has a limit
        self._master, self._slave = pty.openpty()
        _as_written(self._slave)
        self._resize()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self._folder / "progress"))
        self.streams: dict[str, Any] = {"stdout": self._slave}
        if sys.stderr.isatty():
            self.streams["stderr"] = self._slave
        self.environment = {progress.VARIABLE: str(self._folder / "progress")}
        self._thread = threading.Thread(target=self._run, name="grace_ds progress")
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self._socket.close()
        for end in (self._master, self._slave):
            os.close(end)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _run(self) -> None:
        try:
            with self._live:
                while self._turn():
                    pass
                self._ended = True
                if self._partial:
                    self._print(self._partial)
                    self._partial = ""
                self._live.refresh()
        except Exception as error:  # the job's output must continue, and its pseudo-terminal must be drained
            self._pass_on(f"grace-ds: the view is given up ({type(error).__name__}: {error})\n")

    def _pass_on(self, text: str) -> None:
        """Copy the job's output to the screen until it ends."""
        stopping = False
        while text or not stopping:
            with contextlib.suppress(OSError):  # a screen that is gone
                sys.stdout.write(text)
                sys.stdout.flush()
            stopping = self._stop.is_set()
            text = self._read(PICTURES)

    def _turn(self) -> bool:
        """Read the available output and draw; return False when the job is over and all of its output has been read."""
        stopping = self._stop.is_set()
        data = self._read(0.0 if stopping else PICTURES)
        if data:
            *whole, rest = (self._partial + data).split("\n")
            self._partial = rest if len(rest) < 65536 else ""  # drop a progress bar that never ends its line
            if whole:
                self._print("\n".join(map(_overwritten, whole)))
        self._resize()
        self._live.refresh()
        return bool(data) or not stopping

    def _read(self, seconds: float) -> str:
        """Return the job's next output; receive facts on the way."""
        sources: list[Any] = [self._master, self._socket]
        ready = select.select(sources, [], [], seconds)[0]
        if self._socket in ready:
            self.facts, self._last_message = json.loads(self._socket.recv(65536)), time.monotonic()
        return self._decoder.decode(os.read(self._master, 65536)) if self._master in ready else ""

    def _print(self, text: str) -> None:
        from rich.text import Text

        self.console.print(Text.from_ansi(text), soft_wrap=True)

    def _resize(self) -> None:
        """Give the job's terminal the size of the real one."""
        with contextlib.suppress(OSError):
            size = fcntl.ioctl(sys.stdout.fileno(), termios.TIOCGWINSZ, bytes(8))
            if size != fcntl.ioctl(self._slave, termios.TIOCGWINSZ, bytes(8)):
                fcntl.ioctl(self._slave, termios.TIOCSWINSZ, size)

    def _view(self) -> Any:
        from rich.console import Group
        from rich.rule import Rule
        from rich.text import Text

        partial = _overwritten(self._partial).rstrip()
        above = [Text.from_ansi(partial)] if partial else []  # such as the job's progress bar, which has not ended its line
        below = [Text(text) for text in self._lines()]
        for line in above + below:
            line.no_wrap, line.overflow = True, "ellipsis"
        return Group(*above, Rule("GRACE", style="dim"), *below)

    def _lines(self) -> list[str]:
        facts = self.facts
        if not facts:
            return ["ended before GRACE was attached" if self._ended else "waiting for rank 0 to attach GRACE"]
        if facts.get("off"):
            return [progress.line(facts).removeprefix("grace: ")]
        quiet = time.monotonic() - self._last_message
        state = "  ended" if self._ended else f"  last word {quiet:.0f} s ago" if quiet > SILENCE else ""
        lines = [progress.where_it_is(facts) + state, progress.schedule(facts), progress.cost(facts), progress.guard(facts)]
        return [part for part in lines if part]


def _overwritten(line: str) -> str:
    """Return what a terminal shows of a line: the text after its last carriage return, as progress bars use it."""
    return line.rstrip("\r").rpartition("\r")[2]


def _as_written(end: int) -> None:
    """Make a pseudo-terminal pass on output unchanged, without inserted carriage returns."""
    attributes = termios.tcgetattr(end)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(end, termios.TCSANOW, attributes)
