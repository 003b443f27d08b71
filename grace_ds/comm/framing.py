"""Build every collective on four small primitives of an adapter, with headers and checks that all adapters share.

An adapter moves bytes and knows nothing of dtypes or shapes.  Everything else happens here: a fixed-size header goes from
every rank to every rank, all ranks decide alike from the same headers, and only then does a payload move.  So
the ranks stay in step whatever happens between two collectives.

Two kinds of error leave a collective, and a stage's handler must distinguish them:

* :class:`~grace_ds.errors.TransportError` and its subclasses: every rank knows of the error, or will know within its own
  time limit.  Leave without calling ``abort``.
* anything else (``TypeError``, ``ValueError``: this rank's arguments; ``OSError``, ... from its own work): only this
  rank knows of it.  Call ``abort`` so that the other ranks leave too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from itertools import accumulate, pairwise
from typing import Any, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from grace_ds.comm.base import ReduceOp
from grace_ds.comm.traffic import Traffic
from grace_ds.errors import PeerFailed, TransportError, TransportTimeout
from grace_ds.records import Array, IntArray
from grace_ds.utils.reading import MEMORY

T = TypeVar("T")
Bytes = npt.NDArray[np.uint8]

DTYPES = tuple(np.dtype(c) for c in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"))
REDUCE_OPS: tuple[str, ...] = get_args(ReduceOp)
MAX_NDIM = 8

# Columns of a header.  All but the last two are the same for every destination.
OP, FAILED, ARG, DTYPE, NDIM, TRAIL = range(6)
LONGEST = TRAIL + MAX_NDIM - 1  # most rows that this rank sends to any one rank; sets the number of rounds
ROWS = LONGEST + 1  # rows for the destination of this header
SEAL = ROWS + 1  # of the columns before it
WIDTH = SEAL + 1
# Odd, so that a change of one column always changes the seal.  It tells damage and mixed-up calls, not a forger.
_SEALS = np.random.Generator(np.random.Philox(key=20)).integers(0, 1 << 63, SEAL, np.uint64) * np.uint64(2) + np.uint64(1)

_LARGEST_ARG = 1 << 20  # ranks, or operations
_SLEEP_FIRST, _SLEEP_MOST = 2e-5, 1e-3  # seconds between two polls, doubling from the first to the most
_UFUNC: dict[str, Any] = {"sum": np.add, "max": np.maximum, "min": np.minimum}


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


def seal(headers: IntArray) -> IntArray:
    """Return the seal of each header, (n,) int64: a sum modulo 2⁶⁴ of its other columns, each times an odd number."""
    mixed: IntArray = (headers[:, :SEAL].astype(np.uint64) * _SEALS).sum(axis=1, dtype=np.uint64).astype(np.int64)
    return mixed


def check_headers(headers: IntArray, limit: int) -> None:
    """Check that each header is whole, and that what it announces can exist, before anything is allocated for it.

    Args:
        headers: (size, WIDTH) int64, one from each rank.
        limit: most bytes that one rank may send to another.

    Raises:
        TransportError: naming the ranks whose headers cannot be.
    """
    columns = headers[:, :SEAL]
    bounds = np.zeros(SEAL, np.int64)
    bounds[[OP, FAILED, ARG, DTYPE, NDIM]] = max(Op), 1, _LARGEST_ARG, len(DTYPES), MAX_NDIM
    bounds[TRAIL:] = limit
    whole = (seal(headers) == headers[:, SEAL]) & ((columns >= 0) & (columns <= bounds)).all(axis=1)
    used = np.arange(MAX_NDIM - 1) < columns[:, NDIM, None] - 1
    widths = np.where(used, columns[:, TRAIL:LONGEST], 1).astype(np.float64).prod(axis=1)  # as floats: it may not fit 64 bits
    sizes = np.array([dtype.itemsize for dtype in DTYPES])[np.clip(columns[:, DTYPE] - 1, 0, len(DTYPES) - 1)]
    whole &= (columns[:, ROWS] <= columns[:, LONGEST]) & (columns[:, LONGEST] * np.maximum(widths * sizes, 1.0) <= limit)
    whole &= (columns[:, OP] != Op.ALLREDUCE) | (columns[:, ARG] < len(REDUCE_OPS))
    if not whole.all():
        ranks = np.flatnonzero(~whole).tolist()
        raise TransportError(
            f"the header from rank(s) {str(ranks)[1:-1]} is damaged, or announces more than the machine's {limit >> 30} GiB: "
            "check that code version, config and data are the same everywhere, and that nobody else is on the job's network"
        )


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


def as_bytes(array: Array) -> Bytes:
    """Return the same memory as flat bytes: (n,) uint8."""
    return array.reshape(-1).view(np.uint8)


class FramedComm:
    """All of :class:`~grace_ds.comm.base.Comm`, given an adapter's primitives (below, the methods that raise).

    Attributes:
        traffic: what this rank has sent since the transport was made.
        round_bytes: most bytes that one primitive call may carry on a rank, so that counts and displacements stay
            within a C int; larger payloads go in several rounds.  The same on all ranks.
    """

    name = "framed"
    round_bytes = 1 << 30

    def __init__(self, rank: int, size: int, timeout: float) -> None:
        if not timeout > 0:
            raise ValueError(f"the time limit must be above 0 seconds, not {timeout}")
        self.rank, self.size, self.timeout = rank, size, float(timeout)
        self.traffic = Traffic()
        self._retired = ""
        self._doing = "set-up"

    # -- the primitives: collective, blocking up to the time limit ------------------------------------------------

    def _alltoall(self, send: IntArray) -> IntArray:
        """Send row p of ``send`` (size, width) int64 to rank p; return one row from each rank, (size, width) int64."""
        raise NotImplementedError

    def _alltoallv(self, send: Bytes, out_counts: list[int], in_counts: list[int]) -> Bytes:
        """Send consecutive pieces of ``send`` to the ranks in order; return the received pieces, concatenated in rank order.

        Args:
            out_counts, in_counts: bytes to and from each rank.
        """
        raise NotImplementedError

    def _reduce(self, array: Array, op: str) -> None:
        """Reduce ``array`` (flat, int32 or int64) over the ranks, in place."""
        raise NotImplementedError

    def _spread(self, payload: Bytes, root: int) -> None:
        """Copy ``root``'s ``payload`` into every rank's ``payload`` of the same length, in place."""
        raise NotImplementedError

    def _release(self, collective: bool) -> None:
        """Free the adapter's handles; may wait for the other ranks only if ``collective``."""

    # -- waiting and giving up ------------------------------------------------------------------------------------

    def _wait(self, done: Callable[[], bool], hot: float = 0.0) -> None:
        """Poll ``done`` up to the time limit: without sleeping for ``hot`` seconds, then at growing intervals.

        Raises:
            TransportTimeout: the time limit has passed.
        """
        start, pause = time.monotonic(), 0.0
        while not done():
            waited = time.monotonic() - start
            if waited > self.timeout:
                raise self._late()
            if waited >= hot:
                pause = min(max(2 * pause, _SLEEP_FIRST), _SLEEP_MOST)
            time.sleep(pause)

    def _late(self) -> TransportTimeout:
        return TransportTimeout(
            f"{self._doing} over {self.name} not finished within {self.timeout:g} s "
            f"on rank {self.rank} of {self.size}: another rank is late, stuck or gone; "
            "see the other ranks' logs, or raise refresh.timeout_seconds"
        )

    def _guard(self, primitive: Callable[..., T], *args: Any) -> T:
        """Run a primitive and return its result; retire the transport on any error, which leaves the ranks out of step."""
        try:
            return primitive(*args)
        except TransportError as error:
            self._retire(str(error))
            raise
        except BaseException as error:
            self._retire(f"{self._doing}: {type(error).__name__}: {error}")
            if not isinstance(error, Exception):
                raise
            raise TransportError(f"{self.name} failed on rank {self.rank} in {self._retired}") from error

    def _retire(self, why: str) -> None:
        self._retired = why

    # -- headers --------------------------------------------------------------------------------------------------

    def _exchange_headers(self, op: Op, array: Array | None = None, rows: Sequence[int] | None = None, arg: int = 0) -> IntArray:
        """Exchange headers and return those of all ranks, (size, WIDTH) int64, or raise the same error on all ranks."""
        if self._retired:
            raise TransportError(
                f"transport retired after: {self._retired} (restart the job to use it again; training goes on without)"
            )
        self._doing = op.name.lower()
        head = np.zeros((self.size, WIDTH), np.int64)
        head[:, OP], head[:, FAILED], head[:, ARG] = op, op is Op.ABORT, arg
        if array is not None:
            head[:, DTYPE], head[:, NDIM] = DTYPES.index(array.dtype) + 1, array.ndim
            head[:, TRAIL : TRAIL + max(array.ndim - 1, 0)] = array.shape[1:]
            head[:, ROWS] = self._rows(array) if rows is None else rows
            head[:, LONGEST] = head[:, ROWS].max()
        head[:, SEAL] = seal(head)
        received = self._guard(self._alltoall, head)
        self.traffic.equal_pieces(self.size, head.nbytes // self.size)
        self._guard(check_headers, received, MEMORY)
        if op is not Op.ABORT:
            judge(op, received)
        return received

    @staticmethod
    def _rows(array: Array) -> int:
        return len(array) if array.ndim else 1

    # -- payload --------------------------------------------------------------------------------------------------

    def _swap(self, chunks: Sequence[Array], out_counts: list[int], in_counts: list[int], longest: int) -> Bytes:
        """Exchange arrays all-to-all, in as many rounds as ``longest`` (bytes of the longest on any rank) needs.

        Args:
            chunks: to each rank, with at least one axis.
            out_counts, in_counts: bytes to and from each rank.

        Returns:
            What was received, in rank order.
        """
        if longest == 0:
            return np.empty(0, np.uint8)
        step = max(self.round_bytes // self.size, 1)
        if longest <= step:
            return self._counted_alltoallv(as_bytes(np.concatenate(chunks)), out_counts, in_counts)
        parts, out = [as_bytes(chunk) for chunk in chunks], np.empty(sum(in_counts), np.uint8)
        starts = list(accumulate(in_counts, initial=0))
        for done in range(0, longest, step):
            pieces = [part[done : done + step] for part in parts]
            lengths = [min(max(count - done, 0), step) for count in in_counts]
            received = self._counted_alltoallv(np.concatenate(pieces), [len(piece) for piece in pieces], lengths)
            offset = 0
            for start, length in zip(starts, lengths, strict=False):
                out[start + done : start + done + length] = received[offset : offset + length]
                offset += length
        return out

    def _counted_alltoallv(self, send: Bytes, out_counts: list[int], in_counts: list[int]) -> Bytes:
        received = self._alltoallv(send, out_counts, in_counts)
        self.traffic.pieces(self.rank, out_counts)
        return received

    def _move(self, op: Op, chunks: list[Array], arg: int = 0) -> list[Array]:
        """Exchange arrays of one dtype and equal trailing axes all-to-all: first the headers, then the payload."""
        first = chunks[0]
        rows = [self._rows(chunk) for chunk in chunks]
        headers = self._exchange_headers(op, first, rows, arg)
        width = first.dtype.itemsize * math.prod(first.shape[1:])
        counts = headers[:, ROWS].tolist()
        longest = int(headers[:, LONGEST].max()) * width
        sent = chunks if first.ndim else [chunk.reshape(1) for chunk in chunks]
        raw = self._guard(self._swap, sent, [n * width for n in rows], [n * width for n in counts], longest)
        whole = raw.view(first.dtype).reshape(sum(counts), *first.shape[1:])
        parts = [whole[a:b] for a, b in pairwise(accumulate(counts, initial=0))]
        return parts if first.ndim else [part.reshape(()) for part in parts]

    # -- the contract ---------------------------------------------------------------------------------------------

    def exchange(self, chunks: Sequence[Array]) -> list[Array]:
        """See :class:`~grace_ds.comm.base.Comm`."""
        sent = [checked(chunk) for chunk in chunks]
        kinds = {(chunk.dtype, chunk.shape[1:], chunk.ndim) for chunk in sent}
        if len(sent) != self.size or len(kinds) != 1 or sent[0].ndim == 0:
            raise ValueError(
                f"exchange needs {self.size} arrays of one dtype and equal trailing axes, "
                f"got {len(sent)}: {[f'{chunk.dtype}{list(chunk.shape)}' for chunk in sent[:4]]}"
            )
        return self._move(Op.EXCHANGE, sent)

    def allgather(self, array: Array) -> list[Array]:
        """See :class:`~grace_ds.comm.base.Comm`."""
        return self._move(Op.ALLGATHER, [checked(array)] * self.size)

    def gather(self, array: Array, root: int = 0) -> list[Array] | None:
        """See :class:`~grace_ds.comm.base.Comm`."""
        self._check_root(root)
        array = checked(array)
        if array.ndim == 0:
            raise ValueError("gather needs at least one axis; use x.reshape(1)")
        received = self._move(Op.GATHER, self._only_to(root, array), root)
        return received if self.rank == root else None

    def shift(self, array: Array) -> Array:
        """See :class:`~grace_ds.comm.base.Comm`."""
        array = checked(array)
        if array.ndim == 0:
            raise ValueError("shift needs at least one axis; use x.reshape(1)")
        return self._move(Op.SHIFT, self._only_to((self.rank + 1) % self.size, array))[self.rank - 1]

    def _only_to(self, target: int, array: Array) -> list[Array]:
        chunks = [array[:0]] * self.size
        chunks[target] = array
        return chunks

    def broadcast(self, array: Array | None, root: int = 0) -> Array:
        """See :class:`~grace_ds.comm.base.Comm`."""
        self._check_root(root)
        mine = None
        if self.rank == root:
            if array is None:
                raise TypeError(f"rank {root} is the root of this broadcast and must give an array, not None")
            mine = checked(array)
        head = self._exchange_headers(Op.BROADCAST, mine, None, root)[root]
        return self._guard(self._unfold, mine, head, root)

    def _unfold(self, mine: Array | None, head: IntArray, root: int) -> Array:
        if not head[DTYPE]:
            raise TransportError(
                f"rank {root} announces a broadcast without an array; run the same version of grace_ds everywhere"
            )
        axes = [int(n) for n in (head[ROWS], *head[TRAIL : TRAIL + max(int(head[NDIM]) - 1, 0)])]
        out: Array = np.empty(axes if head[NDIM] else [], DTYPES[int(head[DTYPE]) - 1])
        if mine is not None:
            out[...] = mine
        flat = as_bytes(out)
        for start in range(0, len(flat), self.round_bytes):
            part = flat[start : start + self.round_bytes]
            self._spread(part, root)
            self.traffic.tree(self.rank, self.size, root, len(part))
        return out

    def allreduce(self, array: Array, op: ReduceOp = "sum") -> Array:
        """See :class:`~grace_ds.comm.base.Comm`.  The adapter reduces int32 and int64; other dtypes reduce in rank order."""
        array = checked(array)
        if op not in REDUCE_OPS or array.dtype == np.bool_:
            raise ValueError(f"cannot reduce {array.dtype} by {op!r}; use a numeric dtype and one of {', '.join(REDUCE_OPS)}")
        self._exchange_headers(Op.ALLREDUCE, array, None, REDUCE_OPS.index(op))
        reduce: Callable[[Array, str], Array] = (
            self._reduce_native if array.dtype in (np.int32, np.int64) else self._reduce_in_rank_order
        )
        total: Array = self._guard(reduce, array.reshape(-1), op)
        return total.reshape(array.shape)

    def _reduce_native(self, array: Array, op: str) -> Array:
        out, step = array.copy(), max(self.round_bytes // array.dtype.itemsize, 1)
        for start in range(0, len(out), step):
            part = out[start : start + step]
            self._reduce(part, op)
            self.traffic.ring(self.rank, self.size, len(part), part.itemsize)
        return np.asarray(out)

    def _reduce_in_rank_order(self, array: Array, op: str) -> Array:
        """Reduce one slice on each rank, in rank order, and share it, so that floats are bit-identical on all ranks."""
        cuts = [len(array) * p // self.size for p in range(self.size + 1)]
        size = array.dtype.itemsize
        counts = [(b - a) * size for a, b in pairwise(cuts)]
        chunks = [array[a:b] for a, b in pairwise(cuts)]
        received = self._swap(chunks, counts, [counts[self.rank]] * self.size, max(counts))
        mine = received.view(array.dtype).reshape(self.size, -1)
        total = mine[0].copy()
        for other in mine[1:]:
            total = _UFUNC[op](total, other)
        return self._swap([total] * self.size, [total.nbytes] * self.size, counts, max(counts)).view(array.dtype)

    def agree(self) -> None:
        """See :class:`~grace_ds.comm.base.Comm`."""
        self._exchange_headers(Op.AGREE)

    def abort(self) -> None:
        """See :class:`~grace_ds.comm.base.Comm`."""
        self._exchange_headers(Op.ABORT)

    def abandon(self) -> None:
        """See :class:`~grace_ds.comm.base.Comm`."""
        self._retire(self._retired or "a rank is lost")

    def close(self, collective: bool = True) -> None:
        """See :class:`~grace_ds.comm.base.Comm`."""
        if self._doing != "closed":
            self._release(collective)
            self._doing, self._retired = "closed", self._retired or "close()"

    def _check_root(self, root: int) -> None:
        if not 0 <= root < self.size:
            raise ValueError(f"root {root} is not one of the ranks 0..{self.size - 1}")
