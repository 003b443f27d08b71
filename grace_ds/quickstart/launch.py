"""Running one arm through the real ``deepspeed`` launcher: progress, a hard limit, no child left behind."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from grace_ds.errors import GraceError
from grace_ds.processes import end_group

STEP = re.compile(r"^step (\d+)/(\d+) (.*)")
# Of a launch's many lines, those that tell what GRACE chose.
SHOWN = re.compile(r"\bgrace\b|transport: |sketching |alignment with |implied repeats", re.IGNORECASE)
NOISE = re.compile(r"launch\.py|runner\.py")
CAUSE = re.compile(r"^(?:\[rank\d+\]:\s*)?(?:grace_ds: |[\w.]*(?:Error|Exception|Failed|Lost|Timeout)\b.*:)")
TAIL = 30


class ArmFailed(GraceError):
    """An arm did not end well.

    Attributes:
        tail: the last lines of all its ranks.
    """

    @property
    def causes(self) -> list[str]:
        """Of the tail what names an error, without the tracebacks around it; all of it where nothing does."""
        return list(dict.fromkeys(line for line in self.tail if CAUSE.search(line))) or self.tail

    def __init__(self, message: str, tail: list[str]) -> None:
        super().__init__(message)
        self.tail = tail


@dataclass(frozen=True)
class Arm:
    """One launch: what to run, how it is called on the screen, and where its whole output is kept."""

    name: str
    command: list[str]
    log: Path
    steps: int
    limit_seconds: float


def deepspeed_command(module: str, arguments: list[str], ranks: int) -> list[str]:
    """``deepspeed --num_accelerators ranks --module module arguments``, on a free port of this machine."""
    # The launcher beside this interpreter, not whichever comes first on PATH: it must be in the same environment.
    script = Path(sysconfig.get_path("scripts")) / "deepspeed"
    launcher = [str(script)] if script.exists() else [sys.executable, "-m", "deepspeed.launcher.runner"]
    # An empty hostfile path would be looked up in /job/hostfile, which exists on some clusters: this job is local.
    local = ["--hostfile", os.devnull, "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    return [*launcher, *local, "--module", module, *arguments]


def free_port() -> int:
    """A TCP port of this machine that nobody listens on at the moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(extensions: Path, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a launch: CPU ranks that share the cores fairly, and compile nothing into a shared cache."""
    env = dict(os.environ if base is None else base)
    env.setdefault("DS_ACCELERATOR", "cpu")
    env.setdefault("OMP_NUM_THREADS", "1")
    env.setdefault("TORCH_EXTENSIONS_DIR", str(extensions))
    env["PYTHONUNBUFFERED"] = "1"
    return env


def run_arm(arm: Arm, env: Mapping[str, str], console: Console) -> float:
    """Run one arm to its end and return its wall seconds, start-up included.

    Raises:
        ArmFailed: it ended with an error or passed its limit; with its last lines.
    """
    console.print(f"[bold]{arm.name}[/bold]  [dim]{shlex.join(arm.command)}[/dim]", soft_wrap=True, highlight=False)
    arm.log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    tail: deque[str] = deque(maxlen=TAIL)
    with arm.log.open("w", encoding="utf-8") as log, _child(arm.command, env) as child:
        expired = threading.Event()
        timer = threading.Timer(arm.limit_seconds, _expire, (child, expired))
        timer.daemon = True
        timer.start()
        try:
            for line in _follow(arm, child, console):
                log.write(line)
                tail.append(line.rstrip("\n"))
            code = child.wait()
        finally:
            timer.cancel()
    if expired.is_set():
        limit = f"not done after {arm.limit_seconds:.0f} s (--timeout), stopped"
        raise ArmFailed(f"arm {arm.name}: {limit}; whole log: {arm.log}", list(tail))
    if code != 0:
        raise ArmFailed(f"arm {arm.name}: exit status {code}; whole log: {arm.log}", list(tail))
    return time.monotonic() - start


def _follow(arm: Arm, child: subprocess.Popen[str], console: Console) -> Iterator[str]:
    """Every line of the child, as it comes; those worth seeing also go to the screen."""
    assert child.stdout is not None
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
    )
    screen = _Screen(arm.steps, console)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(arm.name, total=arm.steps, facts="starting")
        for line in child.stdout:
            yield line
            match = STEP.match(line)
            if match:
                step, facts = screen.step(int(match[1]), match[3].strip())
                bar.update(task, completed=step, facts=facts)
            elif SHOWN.search(line) and not NOISE.search(line):
                console.print("  " + line.rstrip(), style="dim", markup=False, highlight=False, soft_wrap=True)


class _Screen:
    """What the step lines say, and a line each tenth of the run where the screen is no terminal."""

    def __init__(self, steps: int, console: Console) -> None:
        self._steps = steps
        self._console = console
        self._first: tuple[float, int] | None = None  # when the first step line came, and its step
        self._printed = 0
        self._validation = ""

    def step(self, step: int, facts: str) -> tuple[int, str]:
        """Take a step line; returns the step, and its facts with the last validation loss."""
        now = time.monotonic()
        if facts.startswith("val_loss"):
            self._validation = "  " + facts
            return step, facts
        began, at = self._first = self._first or (now, step)
        tenth = 10 * step // self._steps
        if tenth > self._printed and not self._console.is_terminal:
            self._printed = tenth
            # The start-up is left out: it would be taken for slow steps.
            eta = f"eta {(now - began) / (step - at) * (self._steps - step):.0f} s" if step > at else "eta unknown"
            self._console.print(f"  {step}/{self._steps}  {facts}{self._validation}  {eta}", highlight=False)
        return step, facts + self._validation


@contextmanager
def _child(command: list[str], env: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """The launcher in a process group of its own, of which nothing is left when the block ends, however it ends."""
    child = subprocess.Popen(
        command,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        yield child
    finally:
        stop_group(child)
        if child.stdout is not None:
            child.stdout.close()


def _expire(child: subprocess.Popen[str], expired: threading.Event) -> None:
    expired.set()
    stop_group(child)


def stop_group(child: subprocess.Popen[str], grace_seconds: float = 5.0) -> None:
    """End the child's whole process group: politely, and after ``grace_seconds`` for certain."""
    end_group(child.pid, signal.SIGTERM, grace_seconds)
    child.wait()
