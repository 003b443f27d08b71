"""A process that has imported torch and DeepSpeed, and forks ranks into the network of a host: a start costs a second.

``python -m tests.cluster.zygote`` reads one request a line from its standard input and answers with one line: the process id
of the rank, or ``{"exits": {pid: status}}``.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.multirank.launch import environment

ROOT = Path(__file__).resolve().parents[2]


class Zygote:
    """Starts ranks, and tells how they ended; for several threads."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, **environment(folder), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.zygote"],
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lock = threading.Lock()
        self._exits: dict[int, int] = {}

    def start(self, spec: Path, inside: int, env: Mapping[str, str], out: Path) -> int:
        """A rank of ``fault_job`` in the namespaces of the process ``inside``; it leads a session of its own."""
        return int(self._ask({"spec": str(spec), "inside": inside, "env": dict(env), "out": str(out)}))

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
    out = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for handle, target in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(handle, target)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, buffering=1) for n, mode in ((0, "r"), (1, "w"), (2, "w")))
    os.environ.update(request["env"])
    enter(request["inside"])
    sys.argv = ["fault_job", request["spec"]]
    from tests.cluster import fault_job

    fault_job.main()


def serve() -> None:
    """Reads requests until there are no more."""
    from tests.cluster import fault_job  # noqa: F401  that is what takes long

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
            answer = {"exits": exits}
        sys.__stdout__.write(json.dumps(answer) + "\n")  # type: ignore[union-attr]
        sys.__stdout__.flush()  # type: ignore[union-attr]


class Rank(Exception):
    """This process is a rank now."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request


def main() -> None:
    mine = None
    try:
        serve()
    except Rank as forked:
        mine = forked.request
    except Exception:
        traceback.print_exc()
        raise
    if mine is not None:
        rank(mine)


if __name__ == "__main__":
    main()
