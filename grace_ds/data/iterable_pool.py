"""Place the window over a stream: which of its samples a schedule may choose from, and which it has passed for good.

Each schedule passes a part of the stream: as many samples as it has trained on if it was uniform, 1 / budget times as many if
it has chosen.  A sample that is passed was trained on, or seen by every schedule whose window held it and left.  The window is
the samples from a quarter of its size before the passed position on.  Those before it, and those that were trained on, keep the
signals that were collected on them and are not chosen any more: a sample is trained on once, unless a coreset has fewer
samples than are trained on until the next refresh.

Where a schedule stands is a function of the schedule before it and of the position at which it begins, so it is in
``Schedule.meta`` under ``stream``, equal on all ranks, and resume needs nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np

from grace_ds.data.iterable import IterableBuffer
from grace_ds.data.pool import Placed
from grace_ds.data.schedule import ScheduleBook
from grace_ds.errors import CheckpointError, ConfigError
from grace_ds.records import IntArray, Schedule

ADVANCES = 2  # an automatic window holds so many times what a schedule passes
BEHIND = 4  # one part in so many of the window lies behind the passed position


class IterablePool:
    """The rolling window over a stream.

    Args:
        buffer: the stream.
        window: most samples of a window; 0: twice what a schedule that has chosen passes.
        budget: share of what is passed that is trained on.
        interval_steps: optimizer steps between two refreshes.
        batch: samples of an optimizer step, over all ranks.
        ranks: data-parallel size.

    Attributes:
        n: 0, for the size of the corpus is not known.
        limit: ids lie below it.
        size: most samples of a window.
        advance: samples that a schedule of the configured interval passes.
    """

    n = 0
    limit = 2**62

    def __init__(self, buffer: IterableBuffer, window: int, budget: float, interval_steps: int, batch: int, ranks: int) -> None:
        self.buffer, self.budget, self.ranks = buffer, budget, ranks
        self.advance = max(1, round(interval_steps * batch / budget))
        least = -(-self.advance * BEHIND // (BEHIND - 1))
        if 0 < window < least:
            raise ConfigError(
                f"window is {window}, and over a stream {interval_steps} steps of {batch} samples on a budget of {budget} need "
                f"at least {least}: raise window (it is held in memory), or lower refresh.interval_steps"
            )
        self.size = window or ADVANCES * self.advance
        buffer.read_to(self.size)
        self.size = min(self.size, buffer.pass_length(self.size) or self.size)

    def known(self, version: int, book: ScheduleBook) -> IntArray:
        """Return the ids of the window of the last schedule, or of the first window, (m,) int64, sorted."""
        stand = Stand.of(book.schedules[-1]) if book.schedules else Stand(0, 0, self.size, 0, ())
        return np.arange(stand.low, stand.high, dtype=np.int64)

    def place(self, version: int, start: int, book: ScheduleBook, trained: IntArray) -> Placed:
        """Return the window of the schedule that follows those of ``book``.

        Args:
            start: stream position (of the run's samples, trained on) at which it begins.
            trained: ids that the run has trained on.
        """
        last = book.schedules[-1] if book.schedules else None
        passed = start if last is None else self._passed(last, start - last.start)
        floor = 0 if last is None else Stand.of(last).low
        low = max(floor, passed - self.size // BEHIND)
        self.buffer.read_to(low + self.size)
        # Of what lies below the window's end, not of all that was read: that may differ between the ranks.
        length = self.buffer.pass_length(low + self.size)
        size = min(self.size, length or self.size)
        low = max(floor, passed - size // BEHIND)
        ends = tuple(end for end in self.buffer.ends if end < low + size)
        stand = Stand(passed, low, low + size, length, ends, self.buffer.digest(low, low + size))
        # So that the next window is read when it is due: a rank asks for one part in ``ranks`` of what is trained on.
        self.buffer.read_ahead(ceil(self.ranks / self.budget), low + size + self.advance)
        ids = np.arange(low, low + size, dtype=np.int64)
        first = book.schedules[0].start if book.schedules else start
        due = book.slots(first, start - first).ids if start > first else ids[:0]
        seen = np.union1d(trained[trained >= passed], due[due >= passed])
        closed = ids[(ids < passed) | np.isin(ids, seen)]
        return Placed(lambda: [ids], InOrder(start, passed, seen), closed, {"stream": stand.meta()})

    def _passed(self, last: Schedule, used: int) -> int:
        """Return the position up to which the stream is passed once ``used`` slots of ``last`` are trained on."""
        stand = Stand.of(last)
        if "drawn_by" not in last.meta:  # in order
            return int(last.ids[used]) if used < len(last) else int(last.ids[-1]) + 1
        return min(stand.passed + round(used / self.budget), stand.high)

    def hold(self, schedules: Iterable[Schedule]) -> None:
        """Keep what ``schedules``, those still referred to, need; drop what lies before it."""
        stands = [Stand.of(schedule) for schedule in schedules]
        if stands:
            first = min(stands, key=lambda stand: stand.low)
            self.buffer.hold(first.low, list(first.ends))

    def check(self, schedules: Iterable[Schedule]) -> None:
        """Check that the stream gives the samples that the schedules of a checkpoint were made from.

        Raises:
            CheckpointError: it gives others.
        """
        for schedule in schedules:
            stand = Stand.of(schedule)
            if not stand.digest:
                continue
            self.buffer.hold(stand.low, list(stand.ends))
            if self.buffer.digest(stand.low, stand.high) != stand.digest:
                raise CheckpointError(
                    f"the stream gives other samples at its positions {stand.low} to {stand.high} than when the checkpoint was "
                    "made: use the same data in the same order (fix the seed of its shuffle), or start without the checkpoint"
                )


@dataclass(frozen=True)
class Stand:
    """Where a schedule stands in the stream.

    Attributes:
        passed: position up to which samples are passed for good.
        low, high: the window, [low, high).
        pass_length: samples of a pass; 0 if no pass has ended before ``high``.
        ends: positions before ``high`` at which passes have ended.
        digest: over the samples of the window; empty if they were not read.
    """

    passed: int
    low: int
    high: int
    pass_length: int
    ends: tuple[int, ...]
    digest: str = ""

    def meta(self) -> dict[str, Any]:
        """Return it as JSON-able entries."""
        return {**vars(self), "ends": list(self.ends)}

    @staticmethod
    def of(schedule: Schedule) -> Stand:
        """Return where ``schedule`` stands; one without an entry is in order and needs its own ids alone."""
        entries = schedule.meta.get("stream")
        if entries is None:
            first = int(schedule.ids.min())
            return Stand(first, first, int(schedule.ids.max()) + 1, 0, ())
        return Stand(**{**entries, "ends": tuple(entries["ends"])})


@dataclass(frozen=True)
class InOrder:
    """The order of a stream from a position of the run on: the samples that are not passed yet, one after another.

    Attributes:
        start: position of the run.
        passed: position of the stream that it begins at.
        seen: (m,) int64, sorted, ids from ``passed`` on that were trained on already and are left out.
    """

    start: int
    passed: int
    seen: IntArray

    def __call__(self, positions: IntArray) -> IntArray:
        """See :class:`~grace_ds.data.order.Order`; positions from ``start`` on."""
        rank = np.asarray(positions, np.int64) - self.start
        # The id of the r-th that is left: r plus the number of those left out before it.
        left_before = self.seen - self.passed - np.arange(len(self.seen))
        ids: IntArray = self.passed + rank + np.searchsorted(left_before, rank, side="right")
        return ids
