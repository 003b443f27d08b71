"""Turn the schedule into this rank's samples: positions in the loader's order, with the id at each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch.utils.data import Sampler

from grace_ds.data.schedule import ScheduleBook


@dataclass(frozen=True)
class Geometry:
    """Mapping of positions to ranks: position = (q·ranks + rank)·rows + row, with q the running number of the micro-batch.

    Attributes:
        ranks: data-parallel size.
        rank: this process's data-parallel rank.
        rows: samples of one micro-batch on one rank.
        accumulation: micro-batches of one optimizer step.
    """

    ranks: int
    rank: int
    rows: int
    accumulation: int

    @property
    def micro(self) -> int:
        """Samples of one micro-batch over all ranks."""
        return self.ranks * self.rows

    @property
    def batch(self) -> int:
        """Samples of one optimizer step over all ranks."""
        return self.micro * self.accumulation


class Stream(Protocol):
    """Progress of a run through its samples, in micro-batches over all ranks.

    Attributes:
        frontier: number of micro-batches trained on.
        issued: number that may have been given to a loader, prefetch included.
        steps_even: whether every optimizer step must move it by one step's micro-batches.
    """

    frontier: int
    issued: int
    steps_even: bool


class StreamSampler(Sampler[Any]):
    """Sampler of (position, id) of this rank's samples, one after another, from the current position of training.

    Args:
        book: the schedules; read when a micro-batch is issued, so a new one takes effect beyond the prefetch.
        geometry: of the job.
        micro_batches: micro-batches of one iteration (the job's epoch length).
        length: value of ``len()``: the samples of the job's own sampler, so that ``len(loader)`` does not change.
    """

    def __init__(self, book: ScheduleBook, geometry: Geometry, micro_batches: int, length: int) -> None:
        self.book, self.geometry, self.micro_batches, self.length = book, geometry, micro_batches, length
        self.steps_even = True
        self.frontier = 0  # micro-batches trained on
        self.issued = 0  # micro-batches given to the loader, prefetch included

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # Samples that an earlier iterator had prefetched but that were not trained on are issued again.
        geometry, self.issued = self.geometry, self.frontier
        for q in range(self.frontier, self.frontier + self.micro_batches):
            start = q * geometry.micro + geometry.rank * geometry.rows
            ids = self.book.slots(start, geometry.rows).ids.tolist()
            self.issued = max(self.issued, q + 1)
            yield from zip(range(start, start + geometry.rows), ids, strict=True)
