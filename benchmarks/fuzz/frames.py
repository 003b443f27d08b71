"""Frames between the ranks: what one rank of three receives in a job's collectives, recorded and replayed with changes.

A header is sealed, so a change of one is refused or changes nothing.  In half of the cases the seal is made anew, as a hostile
peer would: then no announced size may be allocated before it is found to be possible, and nothing but the project's own error
may follow.  A payload has no checksum of its own, as TCP and MPI have theirs: a changed one is taken for what it says, except in
a schedule, whose digest all ranks compare.
"""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from benchmarks.fuzz.mutate import NUMBERS
from benchmarks.fuzz.target import SAME, SILENT, TAKEN, Target
from grace_ds.comm.framing import SEAL, WIDTH, Bytes, FramedComm, seal
from grace_ds.records import Array, IntArray, Schedule
from grace_ds.refresh.broadcast import broadcast_schedule

RANKS, ME = 3, 1
Tape = list[tuple[str, Array]]


def job(comm: FramedComm) -> list[Array]:
    """One of each collective, and a schedule from rank 0."""
    rng = np.random.default_rng(comm.rank)
    found = comm.exchange([rng.integers(0, 9, (comm.rank + p, 2)) for p in range(comm.size)])
    found += comm.allgather(rng.random((comm.rank, 3)))
    found += comm.gather(np.arange(comm.rank + 2, dtype=np.int32), root=ME) or []
    found.append(comm.shift(np.full((4, 1, 2), comm.rank, np.uint8)))
    found.append(comm.broadcast(np.arange(12, dtype=np.float32).reshape(3, 4) if comm.rank == 0 else None))
    found.append(comm.allreduce(np.arange(5) + comm.rank))
    found.append(comm.allreduce(np.arange(5) / (comm.rank + 1), "max"))
    comm.agree()
    schedule = None
    if comm.rank == 0:
        ids = np.arange(40, dtype=np.int64)
        schedule = Schedule(3, 80, ids, np.zeros(40, np.uint8), np.ones(40, np.float32), 7, {"batch": 8, "window": 90}, "a")
    got = broadcast_schedule(comm, schedule)
    facts = f"{got.version} {got.start} {got.seed} {sorted(got.meta.items())} {got.run}"
    return [*found, got.ids, got.roles, got.weights, np.frombuffer(facts.encode(), np.uint8)]


class _Bus(FramedComm):
    """A transport between threads that keeps what its rank receives."""

    name = "threads"

    def __init__(self, rank: int, shared: dict[str, Any]) -> None:
        super().__init__(rank, RANKS, 60.0)
        self.shared, self.tape = shared, Tape()

    def _all(self, value: Any) -> list[Any]:
        self.shared[f"{self.rank}"] = value
        self.shared["barrier"].wait(60)
        found = [self.shared[f"{rank}"] for rank in range(RANKS)]
        self.shared["barrier"].wait(60)
        return found

    def _alltoall(self, send: IntArray) -> IntArray:
        received: IntArray = np.stack([rows[self.rank] for rows in self._all(send.copy())])
        self.tape.append(("headers", received.copy()))
        return received

    def _alltoallv(self, send: Bytes, out_counts: list[int], in_counts: list[int]) -> Bytes:
        pieces = [np.split(data, np.cumsum(counts)[:-1])[self.rank] for data, counts in self._all((send.copy(), out_counts))]
        received: Bytes = np.concatenate(pieces)
        self.tape.append(("payload", received.copy()))
        return received

    def _reduce(self, array: Array, op: str) -> None:
        parts = self._all(array.copy())
        array[:] = parts[0]
        for part in parts[1:]:
            array[:] = {"sum": np.add, "max": np.maximum, "min": np.minimum}[op](array, part)
        self.tape.append(("payload", array.copy()))

    def _spread(self, payload: Bytes, root: int) -> None:
        payload[:] = self._all(payload.copy())[root]
        self.tape.append(("payload", payload.copy()))


class _Replay(FramedComm):
    """The transport of one rank, which receives what stands on a tape."""

    name = "tape"

    def __init__(self, tape: Tape) -> None:
        super().__init__(ME, RANKS, 5.0)
        self.tape = iter(tape)

    def _next(self, kind: str, nbytes: int) -> Array:
        found, data = next(self.tape)
        if found != kind or data.nbytes != nbytes:  # as gloo and MPI refuse a message of another length
            raise RuntimeError(f"{data.nbytes} bytes of {found} where {nbytes} of {kind} were to come")
        copy: Array = data.copy()
        return copy

    def _alltoall(self, send: IntArray) -> IntArray:
        received: IntArray = self._next("headers", send.nbytes)
        received[ME] = send[ME]  # what a rank sends to itself does not travel
        return received

    def _alltoallv(self, send: Bytes, out_counts: list[int], in_counts: list[int]) -> Bytes:
        received: Bytes = self._next("payload", sum(in_counts))
        mine = send[sum(out_counts[:ME]) : sum(out_counts[: ME + 1])]
        received[sum(in_counts[:ME]) : sum(in_counts[: ME + 1])] = mine
        return received

    def _reduce(self, array: Array, op: str) -> None:
        array[:] = self._next("payload", array.nbytes)

    def _spread(self, payload: Bytes, root: int) -> None:
        payload[:] = self._next("payload", payload.nbytes)


def recorded() -> tuple[Tape, list[Array]]:
    """What rank :data:`ME` receives in the job, and what the job returns there."""
    shared: dict[str, Any] = {"barrier": threading.Barrier(RANKS)}
    comms, found = [_Bus(rank, shared) for rank in range(RANKS)], {}

    def run(comm: _Bus) -> None:
        found[comm.rank] = job(comm)

    threads = [threading.Thread(target=run, args=(comm,)) for comm in comms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return comms[ME].tape, found[ME]


def changed(tape: Tape, rng: random.Random) -> Tape:
    """The tape with one to three numbers of one header, or bytes of one payload, changed."""
    at = rng.choice([i for i, (_, data) in enumerate(tape) if data.size])
    kind, data = tape[at][0], tape[at][1].copy()
    if kind == "payload":
        flat = data.reshape(-1).view(np.uint8)
        for _ in range(rng.randint(1, 3)):
            flat[rng.randrange(len(flat))] ^= rng.randint(1, 255)
    else:
        rank = rng.choice([r for r in range(RANKS) if r != ME])
        for _ in range(rng.randint(1, 3)):
            column = rng.randrange(WIDTH)
            old = int(data[rank, column])
            value = rng.choice((*NUMBERS, old + rng.choice((-1, 1)), old ^ 1 << rng.randrange(63)))
            data[rank, column] = (value + 2**63) % 2**64 - 2**63
        if rng.random() < 0.5:
            data[:, SEAL] = seal(data)
    return [*tape[:at], (kind, data), *tape[at + 1 :]]


def targets(folder: Path) -> list[Target]:
    """One target; ``folder`` is not needed."""
    tape, honest = recorded()
    # The schedule comes last: its header in JSON, three arrays, and the digests of all ranks.
    schedule_from = len(tape) - 10

    def judge(value: Tape) -> str:
        got = job(_Replay(value))
        if len(got) == len(honest) and all(
            a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in zip(got, honest, strict=True)
        ):
            return SAME
        at = next(i for i, (a, b) in enumerate(zip(value, tape, strict=True)) if a[1].tobytes() != b[1].tobytes())
        return TAKEN if value[at][0] == "payload" and at < schedule_from else SILENT

    built = st.randoms(use_true_random=False).map(lambda rng: changed(tape, rng))
    return [Target("frames", 0.2, lambda rng: changed(tape, rng), judge, built, 0.2)]
