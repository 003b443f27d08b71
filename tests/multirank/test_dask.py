"""The Dask executor in real ranks: the ring's edges, and an orderly end of whatever breaks in the middle of a graph."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from grace_ds import registry
from grace_ds.comm.choose import choose
from grace_ds.config.schema import GraphConfig
from grace_ds.errors import ExecutorError, GraceError, PeerFailed
from grace_ds.graph.backends.torch_backend import TorchBackend
from grace_ds.graph.build import knn
from grace_ds.graph.dask import cluster as dask_cluster
from tests.multirank.harness import World, run_ranks
from tests.multirank.test_clustered import K, N, corpus
from tests.multirank.test_ring import owners

pytest.importorskip("distributed", reason="dask[distributed] is not installed: pip install grace_ds[dask]")
pytestmark = [pytest.mark.slow, pytest.mark.multirank]
LIMIT = 20.0  # seconds of every wait


def config(tier: str, executor: str, backend: str = "torch") -> GraphConfig:
    return GraphConfig(tier=tier, executor=executor, backend=backend, clusters=9, overlap=2, k=K)


def mine(world: World) -> tuple[np.ndarray, np.ndarray]:
    ids, x = corpus()
    own = owners("uneven", N, world.size) == world.rank
    return ids[own], x[own]


def both_executors(world: World) -> dict[str, list[bytes]]:
    comm = choose("torch", timeout=60.0)
    ids, x = mine(world)
    anchors = ids % 3 == 0
    found: dict[str, list[bytes]] = {}
    for tier in ("exact", "clustered"):
        for executor in ("ring", "dask"):
            alike = knn(comm, ids, x, ids, x, config(tier, executor))
            few = knn(comm, ids, x, ids[anchors], x[anchors], config(tier, executor))
            found.setdefault(tier, []).append(b"".join(a.tobytes() for g in (alike, few) for a in (g.ids, g.similarity)))
    return found


@pytest.mark.parametrize("size", [1, 3])
def test_dask_finds_the_edges_of_the_ring(size: int) -> None:
    for found in run_ranks(both_executors, size, timeout=110):
        for tier, (ring, dask) in found.items():
            assert ring == dask, tier
            assert len(ring) > 0


class Stuck(TorchBackend):
    """Hangs, raises, or lets something be killed while it waits, on the last rank."""

    what = ""
    entered = threading.Event()

    def search(self, index, Q, k):  # type: ignore[no-untyped-def]
        Stuck.entered.set()
        if Stuck.what == "raise":
            raise MemoryError("the backend is out of memory")
        if Stuck.what:
            time.sleep(3600 if Stuck.what == "hang" else 4)
        return super().search(index, Q, k)


def children() -> set[int]:
    """Processes that this one has started and that still run."""
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def listening() -> set[str]:
    """Inodes of the TCP sockets that this process listens on."""
    table = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    here = {os.readlink(f) for f in Path("/proc/self/fd").iterdir() if f.exists()}
    return {row[9] for row in table if row[3] == "0A" and f"socket:[{row[9]}]" in here}


def broken(world: World, what: str) -> tuple[str, float, bool, bool]:
    """(error, seconds, nothing left behind, the next graph is right)."""
    comm = choose("torch", timeout=LIMIT)
    ids, x = mine(world)
    right = knn(comm, ids, x, ids, x, config("exact", "ring"))
    before = children(), listening()
    registry.backends.register("stuck")(lambda recall: Stuck())
    Stuck.what = what if world.rank == world.size - 1 else ""
    if what == "kill scheduler" and world.rank == 0:
        threading.Thread(target=kill_scheduler, daemon=True).start()
    if what == "kill worker" and world.rank == world.size - 1:
        threading.Thread(target=close_worker, daemon=True).start()
    started, error = time.monotonic(), ""
    try:
        knn(comm, ids, x, ids, x, config("exact", "dask", "stuck"))
    except GraceError as caught:
        error = type(caught).__name__
        if not isinstance(caught, PeerFailed):
            comm.abort()
    seconds = time.monotonic() - started
    clean = (children(), listening()) == before
    again = knn(comm, ids, x, ids, x, config("exact", "dask"))
    return error, seconds, clean, again.ids.tobytes() == right.ids.tobytes()


def kill_scheduler() -> None:
    known = children()
    while not (new := [pid for pid in children() - known if b"dask_scheduler" in Path(f"/proc/{pid}/cmdline").read_bytes()]):
        time.sleep(0.01)
    Stuck.entered.wait(LIMIT)
    time.sleep(0.5)
    os.kill(new[0], signal.SIGKILL)


def close_worker() -> None:
    """Ends the worker's loop in the middle of a task, as a crash of its thread would."""
    from distributed import Worker

    Stuck.entered.wait(LIMIT)
    for worker in list(Worker._instances):
        worker.loop.add_callback(worker.close, timeout=0.1, executor_wait=False)


@pytest.mark.parametrize("what", ["raise", "hang", "kill scheduler", "kill worker"])
def test_a_fault_gives_the_graph_up_in_time_on_all_ranks_and_leaves_nothing(what: str) -> None:
    results = run_ranks(broken, 2, what, timeout=110)
    errors = [error for error, *_ in results]
    assert errors == ["ExecutorError", "PeerFailed"], errors
    for _, seconds, clean, right in results:
        assert seconds < LIMIT + 10
        assert clean, "a process or a port was left behind"
        assert right


INTRUDER = """
import sys
from distributed import Client
from distributed.security import Security
security = Security.temporary() if sys.argv[1].startswith("tls") else None
Client(sys.argv[1], security=security, timeout=4, set_as_default=False)
print("let in")
"""


def intruded(world: World) -> list[str]:
    comm = choose("torch", timeout=100.0)
    outcome: list[str] = []
    with dask_cluster.cluster(comm) as dask:
        if dask is not None:
            address = dask.client.scheduler.address
            for tried in (address, address.replace("tls", "tcp")):
                command = [sys.executable, "-c", INTRUDER, tried]
                outcome.append(subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.strip())
            host, port = address.removeprefix("tls://").rsplit(":", 1)
            rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
            outcome += [next(row[1] for row in rows if row[1].endswith(f":{int(port):04X}") and row[3] == "0A"), host]
            outcome.append(str(dask.client.submit(abs, -5).result(30)))
        comm.agree()
    return outcome


def test_a_client_without_the_credentials_is_turned_away() -> None:
    other, plain, bound, host, answer = run_ranks(intruded, 2, timeout=115)[0]
    assert (other, plain, answer) == ("", "", "5")
    assert (bound.split(":")[0], host) == ("0100007F", "127.0.0.1")  # the loopback, and not every interface


def test_dask_that_is_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GraceError, match=r"pip install grace_ds\[dask\]"), dask_cluster.cluster(None):  # type: ignore[arg-type]
        pass


def test_executor_errors_are_not_the_transports() -> None:
    from grace_ds.errors import TransportError

    assert not issubclass(ExecutorError, TransportError)  # which would freeze GRACE for the rest of the job
