"""From the schedule to this rank's samples: positions in a loader's order, with the id that stands at each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch.utils.data import Sampler

from grace_ds.data.schedule import ScheduleBook


@dataclass(frozen=True)
class Geometry:
    """How positions map to ranks: position = (q·ranks + rank)·rows + row, q the running number of the micro-batch.

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
    """Where the samples of a run stand, in micro-batches over all ranks.

    Attributes:
        frontier: micro-batches that have been trained on.
        issued: those that may have been given to a loader, prefetch included.
    """

    frontier: int
    issued: int


class StreamSampler(Sampler[Any]):
    """(position, id) of this rank's samples, one after another, from where training stands.

    Args:
        book: the schedules; read when a micro-batch is issued, so a new one takes effect beyond the prefetch.
        geometry: of the job.
        micro_batches: micro-batches of one iteration (the job's epoch length).
        length: what ``len()`` says: the samples of the job's own sampler, so that ``len(loader)`` stays as it is.
    """

    def __init__(self, book: ScheduleBook, geometry: Geometry, micro_batches: int, length: int) -> None:
        self.book, self.geometry, self.micro_batches, self.length = book, geometry, micro_batches, length
        self.frontier = 0  # micro-batches that have been trained on
        self.issued = 0  # micro-batches handed to the loader, prefetch included

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # What an earlier iterator had prefetched but nobody trained on is issued again.
        g, self.issued = self.geometry, self.frontier
        for q in range(self.frontier, self.frontier + self.micro_batches):
            start = q * g.micro + g.rank * g.rows
            ids = self.book.slots(start, g.rows).ids.tolist()
            self.issued = max(self.issued, q + 1)
            yield from zip(range(start, start + g.rows), ids, strict=True)
