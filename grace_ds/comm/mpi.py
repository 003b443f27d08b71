"""The transport over MPI (mpi4py): non-blocking calls, polled up to the time limit.

Importing mpi4py's ``MPI`` initialises MPI, which may hang or abort a process that no MPI launcher has started.  So it is
imported only when it is needed, after :mod:`grace_ds.comm.choose` has found a launcher on all ranks.
"""

from __future__ import annotations

import atexit
import math
import signal
from collections.abc import Sequence
from typing import Any

import numpy as np

from grace_ds.comm.framing import Bytes, FramedComm
from grace_ds.errors import TransportError
from grace_ds.records import Array, IntArray

_HOT_HEADER = 2e-3  # seconds of polling without sleep; the ranks of a refresh mostly arrive within this
_HOT_RATE = 1e8  # bytes a second; MPI may move a payload only while it is polled
_EXIT_LEAST = 30.0  # seconds that the ranks' exits may lie apart, however short the transport's limit
_EXIT_LOST = 2.0  # seconds for the exit of a process that has lost a rank
_abandoned: list[Any] = []  # requests and buffers of abandoned calls, kept alive because MPI may still write to them


def _mpi() -> Any:
    """Return mpi4py's MPI module.  mpi4py also finalises MPI: at exit, and only if it has initialised it."""
    from mpi4py import MPI

    return MPI


def world() -> tuple[int, int]:
    """Return this process's (rank, size) in MPI's world.  Initialises MPI."""
    comm = _mpi().COMM_WORLD
    return comm.Get_rank(), comm.Get_size()


_exit_limits: list[float] = []  # seconds; the last one counts


def _limit_exit(seconds: float) -> None:
    """Limit MPI_Finalize at exit to ``seconds``; it would wait for ever for a rank that is stuck or dead."""
    if not _exit_limits:
        atexit.register(_set_alarm)
    _exit_limits.append(seconds)


def _set_alarm() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(math.ceil(_exit_limits[-1]))


class _Polled(FramedComm):
    """Non-blocking MPI calls under the time limit."""

    name = "mpi"

    def _finish(self, request: Any, *buffers: Any) -> None:
        try:
            self._wait(request.Test, _HOT_HEADER + sum(buffer.nbytes for buffer in buffers) / _HOT_RATE)
        except BaseException:
            _abandoned.append((request, buffers))
            raise

    def _retire(self, why: str) -> None:
        super()._retire(why)
        _limit_exit(max(self.timeout, _EXIT_LEAST))

    def abandon(self) -> None:
        """See :class:`~grace_ds.comm.base.Comm`."""
        super().abandon()
        _limit_exit(_EXIT_LOST)


class MpiComm(_Polled):
    """A separate communicator over the data-parallel ranks, in their order.

    Collective over MPI's world, whose ranks must be torch's (:mod:`grace_ds.comm.choose` has checked it).

    Args:
        ranks: world ranks of this process's data-parallel group, in data-parallel order.
        timeout: seconds, limit of every wait.

    Raises:
        TransportError: MPI's split did not give the requested group.
    """

    def __init__(self, ranks: Sequence[int], timeout: float) -> None:
        me = world()[0]
        super().__init__(rank=list(ranks).index(me), size=len(ranks), timeout=timeout)
        # A split has its own communication context, so messages of the job cannot be confused with those of GRACE.
        self._comm: Any = _mpi().COMM_WORLD.Split(min(ranks), self.rank)
        if (self._comm.Get_rank(), self._comm.Get_size()) != (self.rank, self.size):
            raise TransportError(
                f"MPI made world rank {me} rank {self._comm.Get_rank()} of {self._comm.Get_size()}, "
                f"not {self.rank} of {self.size}: the data-parallel groups of the ranks do not fit together"
            )

    def _alltoall(self, send: IntArray) -> IntArray:
        received = np.empty_like(send)
        self._finish(self._comm.Ialltoall(send, received), send, received)
        return received

    def _alltoallv(self, send: Bytes, out_counts: list[int], in_counts: list[int]) -> Bytes:
        received = np.empty(sum(in_counts), np.uint8)
        starts = [[sum(counts[:p]) for p in range(self.size)] for counts in (out_counts, in_counts)]
        byte = _mpi().BYTE
        source, target = [send, out_counts, starts[0], byte], [received, in_counts, starts[1], byte]
        self._finish(self._comm.Ialltoallv(source, target), send, received)
        return received

    def _reduce(self, array: Array, op: str) -> None:
        mpi = _mpi()
        operations = {"sum": mpi.SUM, "max": mpi.MAX, "min": mpi.MIN}
        self._finish(self._comm.Iallreduce(mpi.IN_PLACE, array, operations[op]), array)

    def _spread(self, payload: Bytes, root: int) -> None:
        self._finish(self._comm.Ibcast(payload, root), payload)

    def _release(self, collective: bool) -> None:
        # Free is collective, and it would also wait for a call that is still under way.
        if collective and not self._retired and not _mpi().Is_finalized():
            self._comm.Free()
        self._comm = None


class Handshake(_Polled):
    """One exchange over MPI's world that shows whether it is the same as torch's world."""

    def __init__(self, timeout: float) -> None:
        super().__init__(*world(), timeout)

    def check(self, torch_rank: int, token: int) -> str:
        """Return why MPI's processes are not torch's in torch's order; empty if they are.  Collective over MPI's world.

        Args:
            torch_rank: of this process.
            token: a number that is the same on all ranks of this torch world and differs from that of any other.
        """
        self._doing = "handshake"
        mine, received = np.array([torch_rank, token], np.int64), np.empty((self.size, 2), np.int64)
        request = _mpi().COMM_WORLD.Iallgather(mine, received)
        self._guard(self._finish, request, mine, received)
        expected = np.column_stack([np.arange(self.size), np.full(self.size, token)])
        return "" if (received == expected).all() else f"MPI's ranks have torch ranks {received[:, 0].tolist()}"
