"""The fixed-size header that opens every collective, and the verdict that all ranks reach from it."""

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

# Columns of a header.  All but the last are the same towards every destination.
OP, FAILED, ARG, DTYPE, NDIM, TRAIL = range(6)
LONGEST = TRAIL + MAX_NDIM - 1  # most rows that this rank sends to any one rank: gives the number of rounds
ROWS = LONGEST + 1  # rows for the destination of this very header
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
    """``array`` as a C-contiguous array of a dtype and rank that a header can name.

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
    """One header in words, for the message of a disagreement."""
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


def judge(op: int, got: IntArray) -> None:
    """Compares what each rank has sent to everyone, (size, WIDTH) int64, so that all ranks raise the same or nothing.

    Raises:
        PeerFailed: some rank has sent the failure flag.
        TransportError: the ranks are not in the same call, or not with the same kind of array.
    """
    failed = np.flatnonzero(got[:, FAILED])
    if len(failed):
        raise PeerFailed([int(r) for r in failed])
    # A broadcast takes dtype and shape from its root; if any rank is elsewhere, the op column already differs.
    alike = got[:, : DTYPE if op == Op.BROADCAST else LONGEST]
    if op == Op.ALLREDUCE:
        alike = np.column_stack([alike, got[:, LONGEST]])
    if (alike == alike[0]).all():
        return
    calls: dict[str, list[int]] = {}
    for rank, head in enumerate(got):
        calls.setdefault(describe(head), []).append(rank)
    told = "; ".join(f"rank(s) {str(r)[1:-1]}: {words}" for words, r in list(calls.items())[:4])
    raise TransportError(
        f"the ranks disagree on a collective ({told}); check that config, code version and data are the same everywhere"
    )
