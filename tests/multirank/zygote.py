"""A process that has imported torch and DeepSpeed, and forks ranks: a start costs a tenth of a second in the place of five.

``python -m tests.multirank.zygote MODULE ...`` imports the modules, reads one request a line from its standard input and
answers with one line: the process id of the rank, or ``{"exits": {pid: status}}``.

A forked rank has the hash seed of its parent, so ranks of one job come from different ones (:func:`mothers`): what depends on
the order of a set then differs between the ranks, as it does between processes of their own.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Beside what jobs import there is what their first engine imports: compiling, for which DeepSpeed's optimizers ask, and GRACE.
USUAL = (
    "tests.multirank.zero_job",
    "deepspeed.runtime.zero.muon.original_muon",
    "grace_ds.integrations.deepspeed",
    "grace_ds.comm.torch_dist",
)


class Zygote:
    """Starts ranks, and tells how they ended; for several threads.

    Args:
        modules: imported before any rank is forked.
        variables: of the environment, that imports may read.
    """

    def __init__(self, modules: Sequence[str] = USUAL, variables: Mapping[str, str] | None = None) -> None:
        env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(variables or {})}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "examples"), env.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.multirank.zygote", *modules],
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._lock = threading.Lock()
        self._exits: dict[int, int] = {}

    def start(self, module: str, words: Sequence[object], env: Mapping[str, str], out: Path, inside: int | None = None) -> int:
        """Forks a rank that runs ``main()`` of a module, and leads a session of its own.

        Args:
            module: as its name; it is imported in the rank unless it has been before.
            words: of its command line.
            env: its whole environment.
            out: takes its output.
            inside: a process whose network and host name it enters.

        Returns:
            Its process id.
        """
        request = {"module": module, "words": [str(w) for w in words], "env": dict(env), "out": str(out), "inside": inside}
        return int(self._ask(request))

    def exit_of(self, pid: int) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        with self._lock:
            self._exits |= {int(k): v for k, v in self._tell({})["exits"].items()}
            return self._exits.get(pid)

    def stop(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(30)

    def _ask(self, request: dict[str, Any]) -> Any:
        with self._lock:
            return self._tell(request)

    def _tell(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


_ONE_AT_A_TIME = threading.Lock()


def mothers(*modules: str) -> list[Zygote]:
    """The two of this test run that have imported ``modules`` beside the usual ones; they end with it."""
    with _ONE_AT_A_TIME:
        return _mothers(*modules)


@cache
def _mothers(*modules: str) -> list[Zygote]:
    cache = tempfile.mkdtemp(prefix="grace_ds_datasets_")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    variables = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": cache, "TOKENIZERS_PARALLELISM": "0"}
    made = [Zygote((*USUAL, *modules), variables) for _ in range(2)]
    for zygote in made:
        atexit.register(zygote.stop)
    return made


def wait_for_ends(pids: Sequence[int], seconds: float, some: bool = False) -> None:
    """Returns when all of these processes have ended, or ``some`` has, or so many seconds are over."""
    waiting = select.poll()
    handles: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    try:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and its parent knows
                handle = os.pidfd_open(pid)
                handles[handle] = pid
                waiting.register(handle, select.POLLIN)
        if some and len(handles) < len(pids):
            return
        while handles and (left := deadline - time.monotonic()) > 0:
            for handle, _ in waiting.poll(1000 * left):
                waiting.unregister(handle)
                os.close(handle)
                del handles[handle]
                if some:
                    return
    finally:
        for handle in handles:
            os.close(handle)


def session(leader: int) -> dict[int, str]:
    """What still runs of a session: process id and command line."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its_session = stat.read_text().rsplit(")", 1)[1].split()[:4]
            if int(its_session) == leader and state != "Z":
                found[int(stat.parent.name)] = (stat.parent / "cmdline").read_text().replace("\0", " ")
    return found


def enter(inside: int) -> None:
    """Moves this process into the network and the host name of another one."""
    libc = ctypes.CDLL(None, use_errno=True)
    for space in ("net", "uts"):
        handle = os.open(f"/proc/{inside}/ns/{space}", os.O_RDONLY)
        if libc.setns(handle, 0):
            raise OSError(ctypes.get_errno(), f"cannot enter {space} of {inside}")
        os.close(handle)


def rank(request: dict[str, Any]) -> None:
    """Body of a forked rank; ends the process as an interpreter of its own would."""
    os.setsid()
    out = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for handle, target in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(handle, target)
    os.close(nothing)
    os.close(out)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, buffering=1) for n, mode in ((0, "r"), (1, "w"), (2, "w")))
    os.environ.clear()
    os.environ.update(request["env"])
    if request["inside"] is not None:
        enter(request["inside"])
    sys.argv = [request["module"], *request["words"]]
    importlib.import_module(request["module"]).main()


def serve(modules: Sequence[str]) -> None:
    """Reads requests until there are no more."""
    for module in modules:  # that is what takes long
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # nothing of it is looked through, or copied to be, in every rank again
    exits: dict[int, int] = {}
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any
        if request:
            pid = os.fork()
            if not pid:
                # Out of this loop and of its frames, so that an error is told by sys.excepthook and ends the interpreter.
                raise Rank(request)
            running.add(pid)
            answer = pid
        else:
            for pid in list(running):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    running.discard(pid)
                    exits[pid] = os.waitstatus_to_exitcode(status)
            answer, exits = {"exits": exits}, {}
        sys.__stdout__.write(json.dumps(answer) + "\n")  # type: ignore[union-attr]
        sys.__stdout__.flush()  # type: ignore[union-attr]


class Rank(Exception):
    """This process is a rank now."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request


def main() -> None:
    mine = None
    try:
        serve(sys.argv[1:])
    except Rank as forked:
        mine = forked.request
    except Exception:
        traceback.print_exc()
        raise
    if mine is not None:
        rank(mine)


if __name__ == "__main__":
    main()
