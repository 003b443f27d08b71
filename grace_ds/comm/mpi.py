"""The transport over MPI (mpi4py): non-blocking calls, polled up to the time limit.

Importing mpi4py's ``MPI`` initialises MPI, which may hang or abort a process that no MPI launcher has started, so it is
imported here, late, and only after :mod:`grace_ds.comm.choose` has seen a launcher on all ranks.
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

_HOT_HEADER = 2e-3  # seconds; the ranks of a refresh mostly come within this
_HOT_RATE = 1e8  # bytes a second; MPI may move a payload only while it is polled
_EXIT_LEAST = 30.0  # seconds that the ranks' exits may lie apart, however short the transport's limit
_EXIT_LOST = 2.0  # seconds for the end of a process whose world is not whole
_abandoned: list[Any] = []  # buffers and requests of calls given up on: MPI may still write to them


def _mpi() -> Any:
    """mpi4py's MPI module.  Finalisation stays mpi4py's: at exit, and only if it was mpi4py that initialised."""
    from mpi4py import MPI

    return MPI


def world() -> tuple[int, int]:
    """This process's (rank, size) in MPI's world; initialises MPI."""
    comm = _mpi().COMM_WORLD
    return comm.Get_rank(), comm.Get_size()


_exit_limits: list[float] = []  # seconds; the last one counts


def _limit_exit(seconds: float) -> None:
    """At exit, lets MPI_Finalize take ``seconds``; it would wait for ever for a rank that is stuck or gone."""
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
            self._wait(request.Test, _HOT_HEADER + sum(b.nbytes for b in buffers) / _HOT_RATE)
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
    """A communicator of its own over the data-parallel ranks, in their order.

    Collective over MPI's world, whose ranks must be torch's (:mod:`grace_ds.comm.choose` has checked it).

    Args:
        ranks: world ranks of this process's data-parallel group, in data-parallel order.
        timeout: seconds, limit of every wait.

    Raises:
        TransportError: MPI's split did not give the group asked for.
    """

    def __init__(self, ranks: Sequence[int], timeout: float) -> None:
        me = world()[0]
        super().__init__(rank=list(ranks).index(me), size=len(ranks), timeout=timeout)
        # A split is a communicator with a context of its own: no message of the job's can be taken for one of ours.
        self._comm: Any = _mpi().COMM_WORLD.Split(min(ranks), self.rank)
        if (self._comm.Get_rank(), self._comm.Get_size()) != (self.rank, self.size):
            raise TransportError(
                f"MPI made world rank {me} rank {self._comm.Get_rank()} of {self._comm.Get_size()}, "
                f"not {self.rank} of {self.size}: the data-parallel groups of the ranks do not fit together"
            )

    def _alltoall(self, send: IntArray) -> IntArray:
        got = np.empty_like(send)
        self._finish(self._comm.Ialltoall(send, got), send, got)
        return got

    def _alltoallv(self, send: Bytes, out_counts: list[int], in_counts: list[int]) -> Bytes:
        got = np.empty(sum(in_counts), np.uint8)
        starts = [[sum(c[:p]) for p in range(self.size)] for c in (out_counts, in_counts)]
        byte = _mpi().BYTE
        there, here = [send, out_counts, starts[0], byte], [got, in_counts, starts[1], byte]
        self._finish(self._comm.Ialltoallv(there, here), send, got)
        return got

    def _reduce(self, array: Array, op: str) -> None:
        mpi = _mpi()
        known = {"sum": mpi.SUM, "max": mpi.MAX, "min": mpi.MIN}
        self._finish(self._comm.Iallreduce(mpi.IN_PLACE, array, known[op]), array)

    def _spread(self, payload: Bytes, root: int) -> None:
        self._finish(self._comm.Ibcast(payload, root), payload)

    def _release(self, together: bool) -> None:
        # A free is collective; and with a call still under way it would wait for that.
        if together and not self._retired and not _mpi().Is_finalized():
            self._comm.Free()
        self._comm = None


class Handshake(_Polled):
    """MPI's world before anything is known of it: one exchange that shows whether it is torch's world too."""

    def __init__(self, timeout: float) -> None:
        super().__init__(*world(), timeout)

    def check(self, torch_rank: int, token: int) -> str:
        """Collective over MPI's world.  Empty, or why these processes are not torch's in torch's order.

        Args:
            torch_rank: of this process.
            token: the same number on all ranks of one torch world, and of no other.
        """
        self._doing = "handshake"
        mine, got = np.array([torch_rank, token], np.int64), np.empty((self.size, 2), np.int64)
        request = _mpi().COMM_WORLD.Iallgather(mine, got)
        self._guard(self._finish, request, mine, got)
        wanted = np.column_stack([np.arange(self.size), np.full(self.size, token)])
        return "" if (got == wanted).all() else f"MPI's ranks have torch ranks {got[:, 0].tolist()}"
