"""A Dask cluster inside a job, for as long as one graph takes: a scheduler beside rank 0, a worker thread in every rank.

Every connection is encrypted and asks for credentials that were made for this graph and went to the ranks over the job's
own transport.  Ports are open on the interface that leads to the job's first host, and on no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.errors import ConfigError, ExecutorError

PATIENCE = 5.0  # seconds that a part is given to close by itself
SHARE = 0.8  # of the transport's time limit: rank 0 must give up before those who wait for it
SETTINGS = {
    "distributed.scheduler.http.routes": [],  # Dask opens an HTTP port whatever one says: on the loopback, with nothing to see
    "distributed.worker.http.routes": [],
    "distributed.scheduler.work-stealing": False,  # tasks belong to the rank that holds their rows
    "distributed.worker.profile.enabled": False,
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    "distributed.comm.require-encryption": True,
    "distributed.comm.retry.count": 0,
    "distributed.admin.tick.limit": "1h",  # a backend that holds the GIL is no fault
}
_CREDENTIALS = ["tls_ca_file"] + [f"tls_{who}_{what}" for who in ("client", "scheduler", "worker") for what in ("key", "cert")]
_SCRUBBED = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "SLURM_")  # a child with these takes itself for a rank


class Cluster:
    """What rank 0 submits to.

    Attributes:
        client: of distributed.
        workers: address of each rank's worker, in rank order.
        deadline: of everything that is waited for, ``time.monotonic()``.
    """

    def __init__(self, client: Any, workers: list[str], scheduler: subprocess.Popen[str], deadline: float) -> None:
        self.client, self.workers, self.deadline = client, workers, deadline
        self._scheduler = scheduler

    def wait(self, futures: list[Any]) -> None:
        """Returns when all are done.

        Raises:
            ExecutorError: a task failed, the scheduler or a worker is gone, or the time is up.
        """
        looked = time.monotonic()
        while not all(f.done() for f in futures):
            now = time.monotonic()
            if now > self.deadline:
                raise ExecutorError("the Dask executor has not finished in time: a backend hangs; see refresh.timeout_seconds")
            if now - looked > 0.25:
                looked = now
                self._check()
            if any(f.status in ("error", "cancelled", "lost") for f in futures):
                break
            time.sleep(0.01)
        for f in futures:
            if f.status == "error":
                raise ExecutorError(f"a task of the Dask executor has failed: {f.exception()!r}") from f.exception()
            if f.status != "finished":
                self._check()
                raise ExecutorError(f"a task of the Dask executor is {f.status}: a worker or the scheduler is gone")

    def _check(self) -> None:
        if self._scheduler.poll() is not None:
            raise ExecutorError(f"the Dask scheduler has ended with {self._scheduler.returncode} in the middle of a graph")
        try:
            there = self.client.sync(self.client.scheduler.ncores, callback_timeout=PATIENCE)
        except Exception:  # busy, or its machine is: the deadline decides
            return
        missing = [rank for rank, address in enumerate(self.workers) if address not in there]
        if missing:
            raise ExecutorError(f"the Dask workers of ranks {missing} are gone in the middle of a graph")


@contextmanager
def cluster(comm: Comm) -> Iterator[Cluster | None]:
    """Starts the cluster; yields what rank 0 submits to, None on the other ranks.  Collective; everything ends with it.

    Raises:
        ConfigError: Dask or its encryption is not installed.
        ExecutorError: the scheduler or a worker cannot be started.
    """
    _installed()
    import dask

    deadline = time.monotonic() + SHARE * comm.timeout
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet())
        stack.enter_context(dask.config.set({**SETTINGS, "distributed.comm.timeouts.connect": f"{comm.timeout:g}s"}))
        scheduler, told = None, b""
        if comm.rank == 0:
            scheduler, told = _start_scheduler(stack, deadline)
        told = comm.broadcast(np.frombuffer(told, np.uint8) if comm.rank == 0 else None).tobytes()
        world = json.loads(told)
        from distributed.security import Security

        security = Security(require_encryption=True, **world["security"])
        address = _start_worker(stack, world["scheduler"], security, comm.rank, deadline)
        workers = [a.tobytes().decode() for a in comm.allgather(np.frombuffer(address.encode(), np.uint8))]
        if scheduler is None:
            yield None
            return
        yield Cluster(_start_client(stack, world["scheduler"], security, len(workers), deadline), workers, scheduler, deadline)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leaves warnings and errors of distributed, which tells everything it does at the level info."""
    import distributed  # noqa: F401  which sets its levels when it is imported

    logger = logging.getLogger("distributed")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _installed() -> None:
    for module, name in (("distributed", "dask[distributed]"), ("cryptography", "cryptography")):
        if importlib.util.find_spec(module) is None:
            cure = "pip install grace_ds[dask], or set it to ring"
            raise ConfigError(f"graph.executor is 'dask', but {name} is not installed: {cure}")


def host_here() -> str:
    """The address of the interface that leads to the job's first host; the loopback where the job has none."""
    first = os.environ.get("MASTER_ADDR", "")
    if not first:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
        try:
            probe.connect((first, 9))
        except OSError as error:
            raise ExecutorError(f"MASTER_ADDR={first} cannot be reached ({error}): what is Dask to bind to?") from error
        return str(probe.getsockname()[0])


def _start_scheduler(stack: contextlib.ExitStack, deadline: float) -> tuple[subprocess.Popen[str], bytes]:
    """The process, and what the workers must know of it."""
    from distributed.security import Security

    made = Security.temporary()
    security = {name: getattr(made, name) for name in _CREDENTIALS}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(_SCRUBBED)}
    process = subprocess.Popen(
        [sys.executable, "-m", "grace_ds.graph.dask.scheduler"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
        start_new_session=True,  # Ctrl-C is for the job, which ends it in order
    )
    stack.callback(_end, process)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps({"security": security, "host": host_here(), "dask": SETTINGS}) + "\n")
    process.stdin.flush()
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=lambda out: lines.put(out.readline()), args=(process.stdout,), daemon=True).start()
    try:
        address = lines.get(timeout=max(0.0, deadline - time.monotonic())).strip()
    except queue.Empty:
        address = ""
    if not address:
        raise ExecutorError("the Dask scheduler did not start; what it printed stands above")
    return process, json.dumps({"scheduler": address, "security": security}).encode()


def _end(process: subprocess.Popen[str]) -> None:
    """Ends the scheduler: by the end of its input, and after a while for certain."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def _start_worker(stack: contextlib.ExitStack, scheduler: str, security: Any, rank: int, deadline: float) -> str:
    """A worker in a thread of this process, closed with ``stack``; its address."""
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="grace_ds-dask-", ignore_cleanup_errors=True))
    args = (scheduler, security, rank, folder, told)
    thread = threading.Thread(target=_work, args=args, daemon=True, name="grace_ds-dask")
    thread.start()
    try:
        found = told.get(timeout=max(0.0, deadline - time.monotonic()))
    except queue.Empty:
        raise ExecutorError(f"the Dask worker of rank {rank} did not reach {scheduler} in time") from None
    if isinstance(found, BaseException):
        raise ExecutorError(f"the Dask worker of rank {rank} cannot be started: {found!r}") from found
    loop, stop, address = found

    def close() -> None:
        with contextlib.suppress(RuntimeError):  # it has closed by itself
            loop.call_soon_threadsafe(stop.set)
        thread.join(2 * PATIENCE)

    stack.callback(close)
    return str(address)


def _work(scheduler: str, security: Any, rank: int, folder: str, told: queue.SimpleQueue[Any]) -> None:
    """The worker's thread: a loop of its own."""
    from distributed import Worker

    async def serve() -> None:
        stop = asyncio.Event()
        worker = Worker(
            scheduler,
            nthreads=1,
            name=f"grace-{rank}",
            host=host_here(),
            security=security,
            memory_limit=0,
            dashboard=False,
            dashboard_address="127.0.0.1:0",
            local_directory=folder,
        )
        await worker
        told.put((asyncio.get_running_loop(), stop, worker.address))
        gone = asyncio.ensure_future(worker.finished())
        stopped = asyncio.ensure_future(stop.wait())
        await asyncio.wait((gone, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        with contextlib.suppress(Exception):  # a backend may hang in it: its thread is a daemon
            await worker.close(timeout=PATIENCE, executor_wait=False, reason="the graph is done")

    try:
        asyncio.run(serve())
    except BaseException as error:
        told.put(error)


def _start_client(stack: contextlib.ExitStack, scheduler: str, security: Any, workers: int, deadline: float) -> Any:
    from distributed import Client

    left = max(0.1, deadline - time.monotonic())
    client = Client(scheduler, security=security, timeout=left, set_as_default=False)

    def close() -> None:
        with contextlib.suppress(Exception):  # the scheduler may be gone
            client.close(timeout=PATIENCE)

    stack.callback(close)
    client.wait_for_workers(workers, timeout=left)
    return client
