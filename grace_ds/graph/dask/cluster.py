"""Run a Dask cluster inside a job while one graph is built: a scheduler next to rank 0, and a worker thread in every rank.

Every connection is encrypted and needs credentials that were made for this graph and sent to the ranks over the job's own
transport.  Ports are open only on the interface that leads to the job's first host.
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

PATIENCE = 5.0  # seconds that a component has to close by itself
SHARE = 0.8  # of the transport's time limit: rank 0 must give up before the ranks that wait for it
SETTINGS = {
    "distributed.scheduler.http.routes": [],  # Dask always opens an HTTP port: keep it on the loopback, without pages
    "distributed.worker.http.routes": [],
    "distributed.scheduler.work-stealing": False,  # tasks belong to the rank that holds their rows
    "distributed.worker.profile.enabled": False,
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    "distributed.comm.require-encryption": True,
    "distributed.comm.retry.count": 0,
    "distributed.admin.tick.limit": "1h",  # a back end that holds the GIL is not an error
}
_CREDENTIALS = ["tls_ca_file"] + [f"tls_{role}_{item}" for role in ("client", "scheduler", "worker") for item in ("key", "cert")]
_SCRUBBED = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "SLURM_")  # a child process with these variables would take itself for a rank


class Cluster:
    """Handle that rank 0 submits tasks to.

    Attributes:
        client: of distributed.
        workers: address of each rank's worker, in rank order.
        deadline: of all waiting, on the clock ``time.monotonic()``.
    """

    def __init__(self, client: Any, workers: list[str], scheduler: subprocess.Popen[str], deadline: float) -> None:
        self.client, self.workers, self.deadline = client, workers, deadline
        self._scheduler = scheduler

    def wait(self, futures: list[Any]) -> None:
        """Wait until all futures are done.

        Raises:
            ExecutorError: a task failed, the scheduler or a worker is gone, or the deadline has passed.
        """
        last_check = time.monotonic()
        while not all(f.done() for f in futures):
            now = time.monotonic()
            if now > self.deadline:
                raise ExecutorError("the Dask executor has not finished in time: a backend hangs; see refresh.timeout_seconds")
            if now - last_check > 0.25:
                last_check = now
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
            present = self.client.sync(self.client.scheduler.ncores, callback_timeout=PATIENCE)
        except Exception:  # the scheduler or its machine is busy: the deadline decides
            return
        missing = [rank for rank, address in enumerate(self.workers) if address not in present]
        if missing:
            raise ExecutorError(f"the Dask workers of ranks {missing} are gone in the middle of a graph")


@contextmanager
def cluster(comm: Comm) -> Iterator[Cluster | None]:
    """Start the cluster, and end all of it on exit.  Collective.

    Yields what rank 0 submits to, and None on the other ranks.

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
        scheduler, settings = None, b""
        if comm.rank == 0:
            scheduler, settings = _start_scheduler(stack, deadline)
        settings = comm.broadcast(np.frombuffer(settings, np.uint8) if comm.rank == 0 else None).tobytes()
        world = json.loads(settings)
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
    """Let only warnings and errors of distributed through; it logs everything it does at the level info."""
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
    """Return the address of the interface that leads to the job's first host; the loopback if the job has none."""
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
    """Start the scheduler; return the process, and the settings that the workers need."""
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
        start_new_session=True,  # Ctrl-C goes to the job, which ends the scheduler in order
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
    """End the scheduler by closing its input; kill it if it does not end."""
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
    """Start a worker in a thread of this process, closed with ``stack``; return its address."""
    started: queue.SimpleQueue[Any] = queue.SimpleQueue()
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="grace_ds-dask-", ignore_cleanup_errors=True))
    args = (scheduler, security, rank, folder, started)
    thread = threading.Thread(target=_work, args=args, daemon=True, name="grace_ds-dask")
    thread.start()
    try:
        outcome = started.get(timeout=max(0.0, deadline - time.monotonic()))
    except queue.Empty:
        raise ExecutorError(f"the Dask worker of rank {rank} did not reach {scheduler} in time") from None
    if isinstance(outcome, BaseException):
        raise ExecutorError(f"the Dask worker of rank {rank} cannot be started: {outcome!r}") from outcome
    loop, stop, address = outcome

    def close() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            loop.call_soon_threadsafe(stop.set)
        thread.join(2 * PATIENCE)

    stack.callback(close)
    return str(address)


def _work(scheduler: str, security: Any, rank: int, folder: str, started: queue.SimpleQueue[Any]) -> None:
    """Run the worker in its thread, with its own event loop; report its start or its error to ``started``."""
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
        started.put((asyncio.get_running_loop(), stop, worker.address))
        gone = asyncio.ensure_future(worker.finished())
        stopped = asyncio.ensure_future(stop.wait())
        await asyncio.wait((gone, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        with contextlib.suppress(Exception):  # a back end may hang in it; its thread is a daemon
            await worker.close(timeout=PATIENCE, executor_wait=False, reason="the graph is done")

    try:
        asyncio.run(serve())
    except BaseException as error:
        started.put(error)


def _start_client(stack: contextlib.ExitStack, scheduler: str, security: Any, workers: int, deadline: float) -> Any:
    from distributed import Client

    remaining = max(0.1, deadline - time.monotonic())
    client = Client(scheduler, security=security, timeout=remaining, set_as_default=False)

    def close() -> None:
        with contextlib.suppress(Exception):  # the scheduler may be gone
            client.close(timeout=PATIENCE)

    stack.callback(close)
    client.wait_for_workers(workers, timeout=remaining)
    return client
