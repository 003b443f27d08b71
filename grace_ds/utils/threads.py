"""Work on the parts of something in several threads, and take the results in order; and how many threads that should be."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")
AHEAD = 2  # parts for each thread that wait to be worked on or taken: more would only take memory
_LOCAL_RANKS = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


def in_order(work: Callable[[A], B], parts: Iterable[A], threads: int) -> Iterator[B]:
    """Yield ``work(part)`` of each part, in the order of the parts.

    The parts are made, one after another, by the thread that iterates.  NumPy releases the GIL in its loops, so that threads
    share the cores as processes would, without copies.

    Args:
        work: called by several threads at a time; an exception of it is raised here.
        parts: made when a thread will soon be free.
        threads: 1: no thread is started.
    """
    if threads <= 1:
        yield from map(work, parts)
        return
    pool, waiting = ThreadPoolExecutor(threads, "grace_ds-features"), deque[Future[B]]()
    try:
        for part in parts:
            waiting.append(pool.submit(work, part))
            if len(waiting) > AHEAD * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def threads_of_rank(environment: Mapping[str, str], cores: frozenset[int] | None = None) -> int:
    """Return how many threads a rank may use while the ranks beside it do the same.

    That is its share of the cores that it may run on, and at most OMP_NUM_THREADS if that is set.  torchrun sets it to 1 for
    everyone who has not; that is no wish of anyone and does not count.

    Args:
        environment: of the process.
        cores: that it may run on; None: as the system says.
    """
    if cores is None:
        affinity = getattr(os, "sched_getaffinity", None)
        cores = frozenset(affinity(0) if affinity is not None else range(os.cpu_count() or 1))
    ranks = next((int(environment[name]) for name in _LOCAL_RANKS if environment.get(name, "").isdigit()), 1)
    everywhere = os.cpu_count() or 1
    # Ranks that are bound to different cores do not share them: fewer than all, and a whole share of them or less.
    shares = 1 if ranks > 1 and len(cores) <= everywhere // ranks else max(1, ranks)
    threads = max(1, len(cores) // shares)
    wanted = environment.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    by_torchrun = "TORCHELASTIC_RUN_ID" in environment and ranks > 1 and wanted == "1"
    return min(threads, int(wanted)) if wanted.isdigit() and int(wanted) > 0 and not by_torchrun else threads
