"""Run many ranks in one process: threads that take turns, over a transport without a network.

What runs is the code of real ranks, down to :mod:`grace_ds.comm.framing`; only the four primitives below it copy from one array
to another.  So what is counted (:mod:`grace_ds.comm.traffic`) is what real ranks count.  One thread runs at a time, until it
needs the others; so memory can be told apart by rank, and a run is the same each time.
"""

from __future__ import annotations

import itertools
import threading
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.comm.framing import WIDTH, Bytes, FramedComm
from grace_ds.errors import TransportError
from grace_ds.records import Array, IntArray

T = TypeVar("T")

STACK = 1 << 20  # bytes of a rank's stack, of which what is used is taken


@dataclass(frozen=True)
class Simulated(Generic[T]):
    """What the simulated ranks have done.

    Attributes:
        results: of each rank.
        peaks: of each rank, most bytes that Python and NumPy held for it in each of its turns: the first, then two for each
            primitive, in the second of which it goes on; empty if that was not traced.
    """

    results: list[T]
    peaks: list[list[int]]


def simulate(size: int, work: Callable[[Comm], T], timeout: float = 600.0, traced: bool = False) -> Simulated[T]:
    """Run ``work`` on ``size`` ranks of this process and return what it returned on each.

    Args:
        size: ranks; each is a thread.
        work: is given the transport of its rank; shares nothing with the other ranks that it changes.
        timeout: seconds that a rank waits for the others at a time.
        traced: whether to trace memory, which makes Python several times slower.

    Raises:
        Exception: that of the first rank that failed by itself; the others have ended too.
    """
    world = _World(size, traced)
    results: list[Any] = [None] * size
    errors: dict[int, BaseException] = {}

    def run(rank: int) -> None:
        try:
            world.await_turn(rank, timeout)
            results[rank] = work(SimulatedComm(world, rank, timeout))
        except BaseException as error:  # is raised in the caller's thread
            errors[rank] = error
        finally:
            world.leave(rank)

    before = threading.stack_size(STACK)
    if traced:
        tracemalloc.start()
    try:
        threads = [threading.Thread(target=run, args=(rank,), daemon=True, name=f"rank {rank}") for rank in range(size)]
        for thread in threads:
            thread.start()
        world.begin()
        for thread in threads:
            thread.join()
    finally:
        threading.stack_size(before)
        if traced:
            tracemalloc.stop()
    if errors:
        raise next((error for error in errors.values() if not isinstance(error, TransportError)), next(iter(errors.values())))
    return Simulated(results, world.peaks)


class SimulatedComm(FramedComm):
    """The transport of one rank of :func:`simulate`."""

    name = "simulated"

    def __init__(self, world: _World, rank: int, timeout: float) -> None:
        super().__init__(rank, world.size, timeout)
        self._world = world

    def _meet(self, given: Any, take: Callable[[list[Any]], T]) -> T:
        """Return what ``take`` makes of what all ranks have given; no rank goes on before all have taken."""
        world = self._world
        world.given[self.rank] = given
        self._others_run()
        if world.ended:
            at = world.ended[0]
            raise TransportError(f"rank {at} has ended while rank {self.rank} waits in {self._doing}")
        taken = take(world.given)
        self._others_run()
        world.given[self.rank] = None
        return taken

    def _others_run(self) -> None:
        self._world.pass_turn(self.rank)
        if not self._world.await_turn(self.rank, self.timeout):
            raise self._late()

    def _alltoall(self, send: IntArray) -> IntArray:
        board = self._world.board
        board[self.rank] = send
        return self._meet(None, lambda _: board[:, self.rank].copy())

    def _alltoallv(self, send: Bytes, out_counts: list[int], in_counts: list[int]) -> Bytes:
        me = self.rank

        def take(given: list[tuple[Bytes, list[int]]]) -> Bytes:
            sent = [given[p] for p, n in enumerate(in_counts) if n]
            return np.concatenate([send[:0], *(whole[starts[me] : starts[me + 1]] for whole, starts in sent)])

        return self._meet((send, list(itertools.accumulate(out_counts, initial=0))), take)

    def _reduce(self, array: Array, op: str) -> None:
        operation: Any = {"sum": np.add, "max": np.maximum, "min": np.minimum}[op]

        def take(given: list[Array]) -> None:
            if self.rank:
                array[:] = given[0]
            else:  # the first to take
                for other in given[1:]:
                    operation(array, other, out=array)

        self._meet(array, take)

    def _spread(self, payload: Bytes, root: int) -> None:
        def take(given: list[Bytes]) -> None:
            if self.rank != root:
                payload[:] = given[root]

        self._meet(payload, take)


class _World:
    """What the threads share.

    Attributes:
        given: by each rank, to the primitive that all are in.
        board: (size, size, WIDTH) int64, headers by sender and receiver.
        ended: ranks whose work is over.
        peaks: most bytes of each rank, turn by turn.
    """

    def __init__(self, size: int, traced: bool) -> None:
        self.size, self.traced = size, traced
        self.given: list[Any] = [None] * size
        self.board = np.empty((size, size, WIDTH), np.int64)
        self.ended: list[int] = []
        self.peaks: list[list[int]] = [[] for _ in range(size)]
        self._held, self._base = [0] * size, 0
        self._turn: int | None = 0
        self._lock = threading.Lock()
        self._gates = [threading.Lock() for _ in range(size)]
        for gate in self._gates:
            gate.acquire()

    def begin(self) -> None:
        """Give the first rank its turn."""
        self._gates[0].release()

    def await_turn(self, rank: int, timeout: float) -> bool:
        """Return once it is the turn of ``rank``; False if that takes more than ``timeout`` seconds."""
        if not self._gates[rank].acquire(timeout=timeout):
            return False
        if self.traced:
            tracemalloc.reset_peak()
            self._base = tracemalloc.get_traced_memory()[0]
        return True

    def pass_turn(self, rank: int) -> None:
        """End the turn of ``rank``; the next that still works has its own."""
        if self.traced:
            now, peak = tracemalloc.get_traced_memory()
            self.peaks[rank].append(self._held[rank] + peak - self._base)
            self._held[rank] += now - self._base
        with self._lock:
            after = (at % self.size for at in range(rank + 1, rank + self.size + 1))
            self._turn = next((at for at in after if at not in self.ended), None)
            if self._turn is not None:
                self._gates[self._turn].release()

    def leave(self, rank: int) -> None:
        """Note that the work of ``rank`` is over, and end its turn."""
        with self._lock:
            self.ended.append(rank)
            its_turn = self._turn == rank  # not that of a rank that has waited too long
        if its_turn:
            self.pass_turn(rank)
