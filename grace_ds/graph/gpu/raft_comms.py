"""Make the NCCL clique and the RAFT handle that the cuVS back ends run on, from raft-dask, with or without Dask.

The communicator is separate from torch's.  torch's may be busy with the job's own collectives while this one is made, so
the device is synchronised and all ranks meet before and after.  Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.errors import ExecutorError

ID_BYTES = 127  # length of an NCCL unique id as raft-dask returns it: the 128th byte is a zero


@dataclass(frozen=True)
class RaftResources:
    """A RAFT handle as cuVS expects it: with ``get_c_obj()`` and ``sync()``, which pylibraft's handle names differently.

    Attributes:
        handle: ``pylibraft.common.Handle`` with the comms injected.
    """

    handle: Any

    def get_c_obj(self) -> int:
        """Return the address of the C++ ``raft::resources``."""
        return int(self.handle.getHandle())

    def sync(self) -> None:
        """Wait for the handle's streams."""
        self.handle.sync()


@dataclass(frozen=True)
class Clique:
    """An NCCL clique between the ranks of a transport.

    Attributes:
        resources: this rank's handle, for cuVS.
        ranks: (size,) int64, the transport's rank of each rank of the clique.
    """

    resources: RaftResources
    ranks: np.ndarray[Any, np.dtype[np.int64]]


@contextmanager
def clique(comm: Comm, stream: Any = None) -> Iterator[Clique]:
    """Set up NCCL without Dask: the unique id travels over the transport, and ranks are the transport's.  Collective.

    Args:
        comm: with one GPU per rank, set as the current device.
        stream: CuPy stream of the handle; None: a new one.

    Raises:
        ExecutorError: NCCL does not start, or its first collectives are wrong; this rank must call ``comm.abort()``.
    """
    import cupy
    from pylibraft.common import Handle, Stream
    from raft_dask.common import inject_comms_on_handle_coll_only
    from raft_dask.common.nccl import nccl

    root_id = np.frombuffer(unique_id(), np.uint8) if comm.rank == 0 else None
    uid = comm.broadcast(root_id).tobytes()
    cupy.cuda.runtime.deviceSynchronize()
    comm.agree()
    handle = Handle(stream=Stream() if stream is None else stream.ptr)
    link = nccl()
    try:
        link.init(comm.size, uid, comm.rank)
    except RuntimeError as error:  # do not destroy it: destroying an uninitialised link is undefined
        raise ExecutorError(f"NCCL does not start on rank {comm.rank} of {comm.size}: {error}") from error
    try:
        inject_comms_on_handle_coll_only(handle, link, comm.size, comm.rank, False)
        check(handle, comm)
        ranks = np.concatenate(comm.allgather(np.array([link.user_rank()], np.int64)))
        yield Clique(RaftResources(handle), ranks)
        handle.sync()
        cupy.cuda.runtime.deviceSynchronize()
        comm.agree()
    except BaseException:
        link.abort()
        raise
    link.destroy()


def unique_id() -> bytes:
    """Return a new NCCL unique id.

    Raises:
        ExecutorError: its length is not what raft-dask's ``init`` takes.
    """
    from raft_dask.common.nccl import nccl

    uid = bytes(nccl.get_unique_id())
    if len(uid) != ID_BYTES:
        raise ExecutorError(f"raft-dask gave an NCCL id of {len(uid)} bytes instead of {ID_BYTES}: this version is not known")
    return uid


def check(handle: Any, comm: Comm) -> None:
    """Run RAFT's own tests of the collectives once.  Collective.

    Raises:
        ExecutorError: one of them gives a wrong result.
    """
    from raft_dask.common import perform_test_comms_allgather, perform_test_comms_allreduce, perform_test_comms_bcast

    for test in (perform_test_comms_allreduce, perform_test_comms_bcast, perform_test_comms_allgather):
        if not test(handle, 0):
            raise ExecutorError(f"NCCL between {comm.size} ranks is broken: {test.__name__} failed on rank {comm.rank}")


@contextmanager
def dask_clique(client: Any, workers: list[str]) -> Iterator[bytes]:
    """Set up NCCL under Dask: a session of ``raft_dask.common.Comms`` over ``workers``.

    Yields the session's id, for :func:`handle_here`.
    """
    from raft_dask.common import Comms

    comms = Comms(comms_p2p=False, client=client, verbose=False)
    comms.init(workers=workers)
    try:
        yield comms.sessionId
    finally:
        comms.destroy()


def handle_here(session: bytes) -> RaftResources:
    """Return the handle of a session; to be called by a task on its worker.

    Raises:
        ExecutorError: the session has no handle on this worker.
    """
    from distributed import get_worker
    from raft_dask.common import local_handle

    handle = local_handle(session, dask_worker=get_worker())
    if handle is None:
        raise ExecutorError("raft-dask has no handle for this worker: its Comms were not initialised here")
    return RaftResources(handle)
