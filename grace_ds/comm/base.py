"""The protocol of a transport: a handful of collectives on NumPy arrays, with a time limit on every wait.

Every collective begins with the same small exchange of headers.  A rank whose local work has raised calls
:meth:`Comm.abort`, which takes part in just that header exchange.  Whatever collective the other ranks enter next, they
see the flag and all raise :class:`~grace_ds.errors.PeerFailed`.  So one rank's exception can never leave another
waiting, and no collective is ever matched with a different one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

from grace_ds.comm.traffic import Traffic
from grace_ds.records import Array

ReduceOp = Literal["sum", "max", "min"]


@runtime_checkable
class Comm(Protocol):
    """A transport between the ranks of the job's data-parallel world.

    All ranks call the same methods in the same order.  Arrays are C-contiguous on return and owned by the caller.
    ``traffic`` counts what this rank has sent.

    Raises (every method):
        PeerFailed: another rank called :meth:`abort`.
        TransportTimeout: a peer did not join within ``timeout`` seconds; the transport is retired and refuses further
            use.
        TransportError: the ranks disagree on the call, the dtype or the trailing axes.
    """

    name: str
    rank: int
    size: int
    timeout: float
    traffic: Traffic

    def exchange(self, chunks: Sequence[Array]) -> list[Array]:
        """Send ``chunks[p]`` to rank p and return one array from each rank (all-to-all with unequal lengths).

        Args:
            chunks: ``size`` arrays of one dtype and equal trailing axes on all ranks; axis 0 may differ and be 0.
        """
        ...

    def allgather(self, array: Array) -> list[Array]:
        """Return every rank's ``array`` in rank order, on all ranks; axis 0 may differ from rank to rank."""
        ...

    def gather(self, array: Array, root: int = 0) -> list[Array] | None:
        """Return every rank's ``array`` in rank order on ``root``; None on the other ranks."""
        ...

    def broadcast(self, array: Array | None, root: int = 0) -> Array:
        """Return ``root``'s array, with its dtype and shape; ``array`` is ignored on the other ranks."""
        ...

    def allreduce(self, array: Array, op: ReduceOp = "sum") -> Array:
        """Reduce element by element over the ranks; equal shape on all ranks; bit-identical result on all ranks."""
        ...

    def shift(self, array: Array) -> Array:
        """Send ``array`` to rank+1 and return the array of rank-1 (one step of a ring; axis 0 may differ)."""
        ...

    def agree(self) -> None:
        """Return when every rank has made this call and none has failed."""
        ...

    def abort(self) -> None:
        """Tell the other ranks, at their next collective, that this rank's local work has failed.

        Return once all ranks know.  Never raises :class:`PeerFailed` itself.
        """
        ...

    def abandon(self) -> None:
        """Give the transport up because a rank is lost: the exit of this process then waits for no other rank."""
        ...

    def close(self, collective: bool = True) -> None:
        """Free what the transport holds.  Safe to call twice.

        Args:
            collective: whether the other ranks close their transports now too.  If not, handles whose release would wait
                for the other ranks are kept.
        """
        ...
