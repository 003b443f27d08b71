"""Sum within groups of ranks, over a transport that all of them share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.records import Array


class SumWithin:
    """Sum arrays over the ranks that hold one model together, while the other groups do so too.

    It is one exchange of ``comm``, so that a rank that fails in the middle of a refresh ends the others' wait as anywhere else.

    Args:
        comm: between all ranks; every rank of it calls in step.
        members: ranks of ``comm`` in this rank's group, ascending, this rank among them.

    Attributes:
        size: ranks of the group.
    """

    def __init__(self, comm: Comm, members: Sequence[int]) -> None:
        self.comm, self.members = comm, list(members)
        self.size = len(self.members)

    def allreduce(self, array: Array) -> Array:
        """Return the sum over the group, element by element; the same bits on all its ranks.  Collective over ``comm``."""
        flat = np.ascontiguousarray(array).reshape(-1)
        received = self.comm.exchange([flat if rank in self.members else flat[:0] for rank in range(self.comm.size)])
        total = np.sum([received[rank] for rank in self.members], axis=0, dtype=flat.dtype)
        return np.asarray(total.reshape(array.shape))
