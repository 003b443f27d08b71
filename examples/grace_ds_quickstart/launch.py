"""Run one arm by the real ``deepspeed`` launcher, over MPI or not: progress, a hard limit, no process left behind."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
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

from grace_ds.errors import ConfigError, GraceError

LAUNCHERS = ("auto", "openmpi", "deepspeed")
CURE = "pip install 'grace_ds[mpi]', or choose --launcher deepspeed, which needs no MPI"
# Oversubscribed and unbound: the ranks and their data loaders share whatever cores there are.  Left alone, DeepSpeed names eth0.
MPI_OPTIONS = "--oversubscribe --bind-to none --mca btl_tcp_if_include lo"
STEP = re.compile(r"^step (\d+)/(\d+) (.*)")
# Of a launch's many lines, those that tell what GRACE chose.
SHOWN = re.compile(r"\bgrace\b|transport: |sketching |alignment with |implied repeats", re.IGNORECASE)
NOISE = re.compile(r"launch\.py|runner\.py|^\[rank\d+\]:")
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


@dataclass(frozen=True)
class Launcher:
    """How the ranks are started.

    Attributes:
        name: of the ``deepspeed`` launcher: ``openmpi``, or ``deepspeed`` for its own one on this machine.
        comm: the transport that belongs to it, for the key ``comm`` of the ``grace`` block.
        why: it was chosen, for the screen.
        binaries: folder of ``mpirun``, to stand first on PATH; None without MPI.
    """

    name: str
    comm: str
    why: str
    binaries: Path | None = None


def choose_launcher(asked: str) -> Launcher:
    """The launcher for ``--launcher asked``; ``auto`` takes openmpi where MPI is installed.

    Args:
        asked: one of :data:`LAUNCHERS`.

    Raises:
        ConfigError: openmpi was asked for and something of it is missing.
    """
    if asked == "deepspeed":
        return Launcher("deepspeed", "torch", "asked for; rows travel over torch.distributed")
    binaries, missing = _find_mpi()
    if not missing:
        return Launcher("openmpi", "mpi", f"rows travel over MPI; {binaries}/mpirun", binaries)
    if asked == "openmpi":
        raise ConfigError(f"--launcher openmpi: {missing}; {CURE}")
    return Launcher("deepspeed", "torch", f"not MPI: {missing} (pip install 'grace_ds[mpi]'); rows travel over torch.distributed")


def _find_mpi() -> tuple[Path | None, str]:
    """The folder of Open MPI's ``mpirun``, and what is missing; empty where nothing is."""
    # This environment first: mpi4py loads the library that was installed beside it.
    where = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    mpirun = shutil.which("mpirun", path=where)
    if mpirun is None:
        return None, "mpirun is not installed"
    binaries = Path(mpirun).parent
    # DeepSpeed asks for it; another MPI has an mpirun too, but takes other options.
    if shutil.which("ompi_info", path=str(binaries)) is None:
        return None, f"{mpirun} is not Open MPI's"
    if importlib.util.find_spec("mpi4py") is None:
        return None, "mpi4py is not installed"
    return binaries, ""


def deepspeed_command(module: str, arguments: list[str], ranks: int) -> list[str]:
    """``deepspeed --num_accelerators ranks --module module arguments``, on a free port of this machine."""
    # An empty hostfile path would be looked up in /job/hostfile, which exists on some clusters: this job is local.
    local = ["--hostfile", os.devnull, "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    return [*_deepspeed(), *local, "--module", module, *arguments]


def openmpi_command(module: str, arguments: list[str], ranks: int, hostfile: Path) -> list[str]:
    """``deepspeed --launcher openmpi … --module module arguments`` on this machine alone, without ssh.

    Args:
        module: to run as ``python -m module``.
        arguments: of the module.
        ranks: processes.
        hostfile: is written here; its folder is made.
    """
    hostfile.parent.mkdir(parents=True, exist_ok=True)
    hostfile.write_text(f"localhost slots={ranks}\n", "utf-8")
    options = MPI_OPTIONS + (" --allow-run-as-root" if os.geteuid() == 0 else "")
    # For one host DeepSpeed starts the ranks itself unless forced, and without an address it asks the host for one by ssh.
    local = ["--hostfile", str(hostfile), "--force_multi", "--no_ssh_check", "--master_addr", "127.0.0.1"]
    return [*_deepspeed(), "--launcher", "openmpi", *local, f"--launcher_args={options}", "--module", module, *arguments]


def _deepspeed() -> list[str]:
    """The launcher beside this interpreter, not whichever comes first on PATH: it must be in the same environment."""
    script = Path(sysconfig.get_path("scripts")) / "deepspeed"
    return [str(script)] if script.exists() else [sys.executable, "-m", "deepspeed.launcher.runner"]


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


def mpi_environment(env: Mapping[str, str], binaries: Path) -> dict[str, str]:
    """``env`` for :func:`openmpi_command`: this MPI first on PATH, and a free port of this machine to meet at.

    Without an address DeepSpeed asks ``hostname -I``, which says nothing where there is only the loopback.
    """
    # A rank or size left by another launcher would be taken for every rank's own.
    kept = {name: value for name, value in env.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    kept["PATH"] = os.pathsep.join([str(binaries), env.get("PATH", os.defpath)])
    return {**kept, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


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
    """The launcher in a session of its own, of which nothing is left when the block ends, however it ends."""
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
        stop_session(child)
        if child.stdout is not None:
            child.stdout.close()


def _expire(child: subprocess.Popen[str], expired: threading.Event) -> None:
    expired.set()
    stop_session(child)


def stop_session(child: subprocess.Popen[str], patience: float = 5.0) -> None:
    """End every process of the child's session: politely, and after ``patience`` seconds for certain."""
    try:
        _signal_session(child.pid, signal.SIGTERM)
        _wait_for_end(child.pid, patience)
    finally:  # a second Ctrl-C cuts the patience short, not the end
        deadline = time.monotonic() + 2.0
        while _session(child.pid) and time.monotonic() < deadline:
            _signal_session(child.pid, signal.SIGKILL)  # again and again: one may have been started meanwhile
            time.sleep(0.05)
        child.wait()


def _signal_session(leader: int, number: int) -> None:
    for process in _session(leader):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def _wait_for_end(leader: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while _session(leader) and time.monotonic() < deadline:
        time.sleep(0.05)


def _session(leader: int) -> list[int]:
    """Ids of the running processes of a session.  Not the process group: mpirun gives each rank one of its own."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rsplit(")", 1)[1].split()[:4]
        except OSError:
            continue  # it ended meanwhile
        if int(session) == leader and state != "Z":  # a zombie that its adopter has not waited for runs no more
            found.append(int(stat.parent.name))
    return found
