"""What every transport must do, run inside the ranks: each collective against values that any rank can make itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from grace_ds.comm.base import Comm
from grace_ds.errors import PeerFailed, TransportError

DTYPES = ("bool", "uint8", "int32", "int64", "uint64", "float16", "float32", "float64")


def made(dtype: str, rank: int, *shape: int) -> Any:
    """The same array on every rank that asks for it."""
    noise = np.random.default_rng([DTYPES.index(dtype), rank, *shape]).standard_normal(shape) * 100
    return np.abs(noise).astype(dtype) if dtype.startswith("u") else noise.astype(dtype)


def same(a: Any, b: Any) -> None:
    """Equal in dtype, shape and every bit, and the caller's own to write to."""
    assert isinstance(a, np.ndarray) and a.flags.c_contiguous and a.flags.writeable
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert a.tobytes() == b.tobytes()


def check_collectives(comm: Comm) -> None:
    """All collectives, lengths unequal and often 0, in all dtypes, of one and two axes."""
    me, size = comm.rank, comm.size

    def part(dtype: str, src: int, to: int, *trail: int) -> Any:
        return made(dtype, 10 * src + to, (3 * src + 2 * to) % 5, *trail)

    for i, dtype in enumerate(DTYPES):
        trail = ((), (3,), (2, 2), (0,))[i % 4]
        got = comm.exchange([part(dtype, me, p, *trail) for p in range(size)])
        for p in range(size):
            same(got[p], part(dtype, p, me, *trail))
            got[p].reshape(-1)[:] = 0  # must not disturb the others
        for p, x in enumerate(comm.allgather(made(dtype, me, (me + 1) % 3, *trail))):
            same(x, made(dtype, p, (p + 1) % 3, *trail))
        root = i % size
        gathered = comm.gather(made(dtype, me, me, *trail), root)
        assert (gathered is not None) == (me == root)
        for p, x in enumerate(gathered or []):
            same(x, made(dtype, p, p, *trail))
        sent = made(dtype, 7, 5, *trail)
        same(comm.broadcast(sent if me == root else None, root), sent)
        same(comm.shift(made(dtype, me, me + 1, *trail)), made(dtype, (me - 1) % size, (me - 1) % size + 1, *trail))
    same(comm.broadcast(np.array(2.5) if me == 0 else np.zeros((4, 4), np.int8)), np.array(2.5))
    assert [float(x) for x in comm.allgather(np.array(float(me)))] == [float(p) for p in range(size)]
    transposed = made("int32", me, 4, 3).T
    same(comm.shift(transposed), np.ascontiguousarray(made("int32", (me - 1) % size, 4, 3).T))
    assert all(len(x) == 0 for x in comm.exchange([np.empty((0, 3), np.float16)] * size))
    comm.agree()


def check_reductions(comm: Comm, lengths: Sequence[int]) -> dict[str, bytes]:
    """Sums, maxima and minima; returns the results' bytes, which must be equal on all ranks."""
    out = {}
    for dtype in DTYPES[1:]:
        for n in lengths:
            parts = [made(dtype, p, n) for p in range(comm.size)]
            for op, ufunc in (("sum", np.add), ("max", np.maximum), ("min", np.minimum)):
                got = comm.allreduce(parts[comm.rank], op)
                wanted = ufunc.reduce(np.stack(parts), axis=0, dtype=dtype)
                assert got.dtype == wanted.dtype and got.shape == wanted.shape
                if dtype.startswith("float") and op == "sum":
                    np.testing.assert_allclose(got, wanted, rtol=1e-2 if dtype == "float16" else 1e-5, atol=1e-2)
                else:
                    np.testing.assert_array_equal(got, wanted)
                out[f"{dtype} {n} {op}"] = got.tobytes()
    square = np.arange(6, dtype=np.int64).reshape(2, 3)
    np.testing.assert_array_equal(comm.allreduce(square), square * comm.size)
    assert int(comm.allreduce(np.int64(3))) == 3 * comm.size
    return out


def calls(comm: Comm) -> list[Callable[[], Any]]:
    """One call of each collective."""
    x = np.arange(4, dtype=np.int64)
    return [
        lambda: comm.exchange([x] * comm.size),
        lambda: comm.allgather(x),
        lambda: comm.gather(x),
        lambda: comm.broadcast(x),
        lambda: comm.allreduce(x),
        lambda: comm.allreduce(x.astype(np.float32)),
        lambda: comm.shift(x),
        comm.agree,
    ]


def works(comm: Comm) -> None:
    """The transport is in step."""
    assert [int(x[0]) for x in comm.allgather(np.array([comm.rank]))] == list(range(comm.size))


def check_one_failed(comm: Comm) -> None:
    """Each rank in turn fails before each collective: the others leave with its number, and the transport goes on."""
    for bad in range(comm.size):
        for call in calls(comm):
            if comm.rank == bad:
                comm.abort()
            else:
                with pytest.raises(PeerFailed) as caught:
                    call()
                assert caught.value.ranks == [bad]
            works(comm)


def check_several_failed(comm: Comm) -> None:
    """All but one rank abort at the same time; then all do."""
    if comm.rank != 1:
        comm.abort()
    else:
        with pytest.raises(PeerFailed) as caught:
            comm.exchange([np.zeros(3)] * comm.size)
        assert caught.value.ranks == [r for r in range(comm.size) if r != 1]
    works(comm)
    comm.abort()
    works(comm)


def check_own_mistake(comm: Comm) -> None:
    """Arguments that this rank alone can see are wrong: an ordinary error here, and the abort tells the others."""
    x = np.zeros(2)
    wrong: list[Callable[[], Any]] = [
        lambda: comm.allgather(np.array(["a"])),
        lambda: comm.allgather(np.zeros(2, ">i4")),
        lambda: comm.allgather(np.zeros((1,) * 9)),
        lambda: comm.exchange([x] * (comm.size + 1)),
        lambda: comm.exchange([x] * (comm.size - 1) + [np.zeros((2, 2, 2))]) if comm.size > 1 else comm.exchange([]),
        lambda: comm.broadcast(None, root=comm.rank),
        lambda: comm.gather(x, root=comm.size),
        lambda: comm.allreduce(np.zeros(2, bool)),
        lambda: comm.allreduce(x, "mean"),  # type: ignore[arg-type]
    ]
    for call in wrong:
        if comm.rank == 0:
            with pytest.raises((TypeError, ValueError)):
                call()
            comm.abort()
        else:
            with pytest.raises(PeerFailed):
                comm.agree()
    works(comm)


def check_disagreements(comm: Comm) -> None:
    """Unequal calls are the same error on all ranks, none hangs, and the transport goes on."""
    odd = comm.rank == comm.size - 1
    x = np.zeros((2, 3), np.float32)
    pairs: list[tuple[Callable[[], Any], str]] = [
        (lambda: comm.agree() if odd else comm.allgather(x), "agree.*|allgather.*"),
        (lambda: comm.broadcast(x) if odd else comm.allreduce(x), "broadcast"),
        (lambda: comm.allgather(x.astype(np.float64) if odd else x), "float64"),
        (lambda: comm.allgather(x[:, :2] if odd else x), r"\[\*, 2\]"),
        (lambda: comm.allgather(x[0] if odd else x), r"float32\[\*\]"),
        (lambda: comm.gather(x, root=1 if odd else 0), "root=1"),
        (lambda: comm.broadcast(x, root=1 if odd else 0), "root=1"),
        (lambda: comm.allreduce(x[:1] if odd else x), r"\[1, 3\]"),
        (lambda: comm.allreduce(x, "max" if odd else "sum"), "max"),
    ]
    for call, named in pairs:
        with pytest.raises(TransportError, match=named) as caught:
            call()
        assert not isinstance(caught.value, PeerFailed)
        works(comm)


def check_all(comm: Comm) -> dict[str, bytes]:
    """Everything above; twice where payloads are concerned, the second time in many small rounds."""
    assert isinstance(comm, Comm)
    check_collectives(comm)
    short = (0, 1, 29)
    out = check_reductions(comm, [*short, 1000])
    whole, comm.round_bytes = comm.round_bytes, 40  # type: ignore[attr-defined]
    check_collectives(comm)
    again = check_reductions(comm, short)
    assert again == {key: out[key] for key in again}
    comm.round_bytes = whole  # type: ignore[attr-defined]
    check_own_mistake(comm)
    if comm.size > 1:
        check_one_failed(comm)
        check_several_failed(comm)
        check_disagreements(comm)
    return out
