"""The transport of a single rank: the same checks and the same code path as the other transports, without any waiting."""

from __future__ import annotations

from grace_ds.comm.framing import Bytes, FramedComm
from grace_ds.records import Array, IntArray


class LocalComm(FramedComm):
    """The transport of a job with a single data-parallel rank."""

    name = "local"

    def __init__(self, timeout: float = 600.0) -> None:
        super().__init__(rank=0, size=1, timeout=timeout)

    def _alltoall(self, send: IntArray) -> IntArray:
        return send

    def _alltoallv(self, send: Bytes, out_counts: list[int], in_counts: list[int]) -> Bytes:
        return send

    def _reduce(self, array: Array, op: str) -> None:
        pass

    def _spread(self, payload: Bytes, root: int) -> None:
        pass
