"""Define the fixed-size header that opens every collective, and what all ranks decide from the headers."""

from __future__ import annotations

from enum import IntEnum
from typing import get_args

import numpy as np

from grace_ds.comm.base import ReduceOp
from grace_ds.errors import PeerFailed, TransportError
from grace_ds.records import Array, IntArray

DTYPES = tuple(np.dtype(c) for c in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"))
REDUCE_OPS: tuple[str, ...] = get_args(ReduceOp)
MAX_NDIM = 8

# Columns of a header.  All but the last are the same for every destination.
OP, FAILED, ARG, DTYPE, NDIM, TRAIL = range(6)
LONGEST = TRAIL + MAX_NDIM - 1  # most rows that this rank sends to any one rank; sets the number of rounds
ROWS = LONGEST + 1  # rows for the destination of this header
WIDTH = ROWS + 1


class Op(IntEnum):
    """The tag of a collective in its header."""

    EXCHANGE = 1
    ALLGATHER = 2
    GATHER = 3
    BROADCAST = 4
    ALLREDUCE = 5
    SHIFT = 6
    AGREE = 7
    ABORT = 8


def checked(array: Array) -> Array:
    """Return ``array`` as a C-contiguous array of a dtype and a number of axes that a header can hold.

    Raises:
        TypeError: the dtype is not one of :data:`DTYPES`.
        ValueError: more than :data:`MAX_NDIM` axes.
    """
    array = np.asarray(array, order="C")
    if array.dtype not in DTYPES:
        raise TypeError(f"cannot send dtype {array.dtype}; use one of {', '.join(map(str, DTYPES))}")
    if array.ndim > MAX_NDIM:
        raise ValueError(f"cannot send {array.ndim} axes; at most {MAX_NDIM}: reshape it")
    return array


def describe(head: IntArray) -> str:
    """Return one header in words, for the message about a disagreement."""
    try:
        words = Op(int(head[OP])).name.lower()
    except ValueError:
        return f"an unknown call {int(head[OP])} (another version of grace_ds?)"
    if words == "allreduce":
        words = f"{words}({REDUCE_OPS[int(head[ARG])]})"
    elif words in ("broadcast", "gather"):
        words = f"{words}(root={int(head[ARG])})"
    if head[DTYPE]:
        first = [str(int(head[ROWS]))] if words.startswith("allreduce") else ["*"]
        trail = [str(int(n)) for n in head[TRAIL : TRAIL + max(int(head[NDIM]) - 1, 0)]]
        words += f" of {DTYPES[int(head[DTYPE]) - 1]}[{', '.join(first + trail) if head[NDIM] else ''}]"
    return words


def judge(op: int, headers: IntArray) -> None:
    """Compare the headers of all ranks, so that all ranks raise the same error or none.

    Args:
        op: the :class:`Op` of this rank's call.
        headers: (size, WIDTH) int64, one from each rank.

    Raises:
        PeerFailed: some rank has sent the failure flag.
        TransportError: the ranks are not in the same call, or not with the same kind of array.
    """
    failed = np.flatnonzero(headers[:, FAILED])
    if len(failed):
        raise PeerFailed([int(r) for r in failed])
    # A broadcast takes dtype and shape from its root; if a rank is in another call, the op column differs already.
    compared = headers[:, : DTYPE if op == Op.BROADCAST else LONGEST]
    if op == Op.ALLREDUCE:
        compared = np.column_stack([compared, headers[:, LONGEST]])
    if (compared == compared[0]).all():
        return
    calls: dict[str, list[int]] = {}
    for rank, head in enumerate(headers):
        calls.setdefault(describe(head), []).append(rank)
    summary = "; ".join(f"rank(s) {str(ranks)[1:-1]}: {call}" for call, ranks in list(calls.items())[:4])
    raise TransportError(
        f"the ranks disagree on a collective ({summary}); check that config, code version and data are the same everywhere"
    )
