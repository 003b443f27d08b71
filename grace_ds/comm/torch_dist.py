"""The transport over torch.distributed: a separate gloo group, so that its calls cannot mix with the job's collectives."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import numpy as np

from grace_ds.comm.framing import Bytes, FramedComm
from grace_ds.errors import TransportError
from grace_ds.records import Array, IntArray


class TorchComm(FramedComm):
    """A gloo group over the data-parallel ranks of this process, whatever backend the job itself uses.

    Args:
        groups: every data-parallel group of the job, as ascending global ranks.  All ranks of torch's world construct
            this together with the same list, because ``new_group`` is collective over the world; afterwards only the
            members of a group communicate.
        timeout: seconds, limit of every wait.

    Raises:
        TransportError: this rank is in none of the groups, or in several.
    """

    name = "torch"

    def __init__(self, groups: Sequence[Sequence[int]], timeout: float) -> None:
        import torch.distributed as dist

        me = dist.get_rank()
        mine = [group for group in groups if me in group]
        if len(mine) != 1 or any(list(group) != sorted(set(group)) for group in groups):
            raise TransportError(f"rank {me} must be in one ascending group of {[list(group) for group in groups]}")
        super().__init__(rank=mine[0].index(me), size=len(mine[0]), timeout=timeout)
        self._ranks = list(mine[0])
        # Without use_local_synchronization: its group names repeat once a group is destroyed, and gloo then hangs on
        # the stale addresses in the store.
        limit = datetime.timedelta(seconds=timeout)
        made = [dist.new_group(list(group), backend="gloo", timeout=limit) for group in groups]
        self._group: Any = made[list(groups).index(mine[0])]

    def _finish(self, work: Any) -> None:
        """Wait for gloo's own thread, whose time limit equals this transport's; either may expire first."""
        self._wait(work.is_completed)
        try:
            work.wait()
        except RuntimeError as error:
            if "timed out" in str(error).lower():
                raise self._late() from error
            raise

    def _alltoall(self, send: IntArray) -> IntArray:
        import torch
        import torch.distributed as dist

        received = np.empty_like(send)
        pair = torch.from_numpy(received.reshape(-1)), torch.from_numpy(send.reshape(-1))
        self._finish(dist.all_to_all_single(*pair, group=self._group, async_op=True))
        return received

    def _alltoallv(self, send: Bytes, out_counts: list[int], in_counts: list[int]) -> Bytes:
        import torch
        import torch.distributed as dist

        received = np.empty(sum(in_counts), np.uint8)
        pair = torch.from_numpy(received), torch.from_numpy(send)
        self._finish(dist.all_to_all_single(*pair, in_counts, out_counts, group=self._group, async_op=True))
        return received

    def _reduce(self, array: Array, op: str) -> None:
        import torch
        import torch.distributed as dist

        operations = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
        self._finish(dist.all_reduce(torch.from_numpy(array), operations[op], group=self._group, async_op=True))

    def _spread(self, payload: Bytes, root: int) -> None:
        import torch
        import torch.distributed as dist

        self._finish(dist.broadcast(torch.from_numpy(payload), self._ranks[root], group=self._group, async_op=True))

    def _release(self, collective: bool) -> None:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None
