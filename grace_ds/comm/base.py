"""What the stages ask of a transport: a handful of collectives on NumPy arrays, with a limit on every wait.

Every collective begins with the same small exchange of headers.  A rank whose local work has raised calls
:meth:`Comm.abort`, which takes part in just that header exchange: whatever collective the others are in next, they see
the flag and raise :class:`~grace_ds.errors.PeerFailed` together.  So one rank's exception can never leave another
waiting, and no collective is ever matched with a different one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

from grace_ds.records import Array

ReduceOp = Literal["sum", "max", "min"]


@runtime_checkable
class Comm(Protocol):
    """A transport between the ranks of the job's data-parallel world.

    All ranks call the same methods in the same order.  Arrays are C-contiguous on return and owned by the caller.

    Raises (every method):
        PeerFailed: another rank called :meth:`abort`.
        TransportTimeout: a peer did not come within ``timeout`` seconds; the transport is retired and refuses further
            use.
        TransportError: the ranks disagree on the call, the dtype or the trailing axes.
    """

    name: str
    rank: int
    size: int
    timeout: float

    def exchange(self, chunks: Sequence[Array]) -> list[Array]:
        """All-to-all with unequal lengths: ``chunks[p]`` goes to rank p; returns one array from each rank.

        Args:
            chunks: ``size`` arrays of one dtype and equal trailing axes on all ranks; axis 0 may differ and be 0.
        """
        ...

    def allgather(self, array: Array) -> list[Array]:
        """Every rank's ``array`` in rank order; axis 0 may differ from rank to rank."""
        ...

    def gather(self, array: Array, root: int = 0) -> list[Array] | None:
        """Every rank's ``array`` in rank order on ``root``; None elsewhere."""
        ...

    def broadcast(self, array: Array | None, root: int = 0) -> Array:
        """``root``'s array, dtype and shape included; ``array`` is ignored on the other ranks."""
        ...

    def allreduce(self, array: Array, op: ReduceOp = "sum") -> Array:
        """Element by element over the ranks; equal shape on all ranks; bit-identical result on all ranks."""
        ...

    def shift(self, array: Array) -> Array:
        """Ring step: sends ``array`` to rank+1 and returns what rank-1 sent (axis 0 may differ)."""
        ...

    def agree(self) -> None:
        """Returns when every rank is here and none has failed."""
        ...

    def abort(self) -> None:
        """Tells the other ranks, at their next collective, that this rank's local work has failed.

        Never raises :class:`PeerFailed` itself; returns once all ranks know.
        """
        ...

    def abandon(self) -> None:
        """A rank is lost: this process's end waits for nobody."""
        ...

    def close(self, together: bool = True) -> None:
        """Frees what the transport holds.  Safe to call twice.

        Args:
            together: whether the other ranks close theirs too, now; without it, what would have to wait for them stays.
        """
        ...
