"""Check invariants of every training step: each violation is counted, and the first one is logged with its cure."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.data.in_flight import InFlightBatches, IssuedBatch
from grace_ds.data.sampler import Geometry
from grace_ds.data.schedule import ScheduleBook
from grace_ds.records import Array, IntArray

log = logging.getLogger("grace_ds")

_FOLDED = 1024  # batches after which their hashes are summed
PATIENCE = 2  # first optimizer steps without a recognised batch, after which steps are counted instead
_MIX = np.uint64(0x9E3779B97F4A7C15)
_FINISH = np.uint64(0xBF58476D1CE4E5B9)


@dataclass
class StepWatch:
    """The checks of one engine's steps, on this rank.

    Attributes:
        slips: steps at which the position moved by another amount than a batch.
        empty_steps: steps whose gradients were to be collected and gave no row.
        mismatches: refreshes before which the ranks had not trained on the scheduled samples.
        counting: no batch has been recognised so far, so the position moves by a batch per step.
    """

    slips: int = 0
    empty_steps: int = 0
    mismatches: int = 0
    counting: bool = False
    _still: int = 0
    _blind: int = 0
    _thin: bool = False
    _trail: Trail = field(default_factory=lambda: Trail())

    def counts(self) -> dict[str, int]:
        """Return the counts by the names that they have among the metrics."""
        return {"position_slips": self.slips, "empty_steps": self.empty_steps, "order_mismatches": self.mismatches}

    def trained(self, issued: IssuedBatch, geometry: Geometry) -> None:
        """Record that a batch of the schedule has been through a backward."""
        if issued.end:
            self._trail.add(issued, geometry)

    def advance(self, moved: int, geometry: Geometry, in_flight: InFlightBatches) -> int:
        """Check the movement of an optimizer step; return the micro-batches to add to the position if none is recognised.

        Args:
            moved: micro-batches by which the step's recognised batches have moved the position.
        """
        expected = geometry.accumulation
        if moved == expected or (moved == 0 and not len(in_flight)):  # a step on data of another source does not move it
            self._still = 0
            return 0
        if moved == 0 and not in_flight.recognised:
            return self._count(expected, in_flight)
        self.slips += moved != 0
        if moved and self.slips == 1:
            log.warning(
                "an optimizer step moved the order of samples on by %d micro-batches, and %d make a step: a batch that the "
                "loader gave was not trained on, or one was trained on in two steps; such samples are passed over",
                moved,
                expected,
            )
        return 0

    def _count(self, expected: int, in_flight: InFlightBatches) -> int:
        self._still += 1
        if not self.counting and self._still < PATIENCE:
            return 0
        steps = 1 if self.counting else self._still
        if not self.counting:
            self.counting = True
            log.warning(
                "the batches that the model is given are not recognised as the loader's: they are changed on the way, beyond a "
                "cut of some columns, another type or device. Samples are counted by optimizer steps, %d micro-batches each, "
                "and no gradients or losses are collected; change them in collate_fn instead, or set recipe: content",
                expected,
            )
        return in_flight.pass_over(steps * expected)

    def collected(self, rows: int, expected: bool) -> None:
        """Check the number of rows of a step whose gradients were collected.

        Args:
            rows: that the step has given.
            expected: whether it must give rows: it trained on batches of the schedule, and the scale of the layers is known.
        """
        if rows or not expected:
            return
        self.empty_steps += 1
        if self.empty_steps == 1:
            log.warning(
                "a step whose gradients were to be collected gave no rows: the hooks on the layers have not fired, or gave no "
                "finite number. Influences stay unknown like this; see the messages above, check collect.layers and "
                "collect.exclude, or set recipe: content"
            )

    def compare(self, comm: Comm, book: ScheduleBook, geometry: Geometry, cursor: int) -> None:
        """Check that the ranks together have trained on the scheduled samples since the last call.  Collective."""
        trail, self._trail = self._trail, Trail(cursor)
        lowest, highest = (int(comm.allreduce(np.array([cursor], np.int64), op)[0]) for op in ("min", "max"))
        mine = np.array([trail.digest(geometry).astype(np.int64), trail.batches, trail.unknown], np.int64)
        digest, batches, unknown = comm.allreduce(mine).tolist()
        if lowest != highest:
            self._mismatch(f"the ranks stand at different samples of the order, from {lowest} to {highest}")
            return
        if not batches or unknown or self.counting or trail.since < 0 or cursor <= trail.since:
            return
        slots = book.slots(trail.since, cursor - trail.since)
        copies = np.uint64(comm.size // geometry.ranks)  # ranks that work on the same samples
        with np.errstate(over="ignore"):
            expected = np.multiply(_digest(np.arange(trail.since, cursor), slots.ids), copies)
        if int(expected.astype(np.int64)) != digest:
            self._mismatch(f"from sample {trail.since} to {cursor} the ranks have not trained on what the schedule says")

    def published(self, meta: Mapping[str, Any]) -> None:
        """Check the ``meta`` of a schedule that has been published."""
        share, window, coreset = meta.get("effective_share"), int(meta["window"]), int(meta["coreset"])
        if share is not None and share * window < coreset and not self._thin:
            self._thin = True
            log.warning(
                "the coreset has %d samples, and the chances of the window's %d leave %d effective ones: the rest is what the "
                "filters reject. Lower budget, or raise window; guard.enabled: true says where nothing is worth leaving out",
                coreset,
                window,
                round(share * window),
            )
        if "gradients" not in meta.get("parts", ()):
            self._blind = 0
            return
        self._blind = 0 if meta.get("known_influence") else self._blind + 1
        if self._blind == PATIENCE + 1:
            log.warning(
                "%d schedules in a row were made with gradients collected and no influence known of any sample: see the messages "
                "above about the trusted set and the hooks, or set recipe: content",
                self._blind,
            )

    def restart(self, cursor: int) -> None:
        """Start again at a position, as after loading a checkpoint."""
        self._trail, self._still = Trail(cursor), 0

    def _mismatch(self, what: str) -> None:
        self.mismatches += 1
        if self.mismatches == 1:
            log.warning(
                "%s: some rank feeds its model from another loader, or leaves batches out that others train on; feed every rank "
                "from the loader that grace_ds gives, batch by batch",
                what,
            )


class Trail:
    """A digest of the (position, sample) pairs that a rank has trained on; digests of several ranks add up.

    Attributes:
        since: position of the first pair; -1 if it is not known.
        batches: number of batches added.
        unknown: number of batches whose samples are not known.
    """

    def __init__(self, since: int = -1) -> None:
        self.since, self.batches, self.unknown = since, 0, 0
        self._sum = np.uint64(0)
        self._firsts: list[int] = []
        self._ids: list[IntArray] = []

    def add(self, issued: IssuedBatch, geometry: Geometry) -> None:
        """Add a batch of the schedule."""
        self._firsts.append((issued.end - 1) * geometry.micro + geometry.rank * geometry.rows)
        self._ids.append(issued.ids)
        if len(self._ids) == _FOLDED:
            self._fold(geometry)

    def digest(self, geometry: Geometry) -> Any:
        """Return the digest, uint64: a sum of hashes, so that the order of the batches does not matter."""
        self._fold(geometry)
        return self._sum

    def _fold(self, geometry: Geometry) -> None:
        """Sum the hashes of the batches added; hashing them one by one would cost a hundred times as much per step."""
        whole = [len(ids) == geometry.rows and not bool((ids < 0).any()) for ids in self._ids]
        self.unknown += whole.count(False)
        self.batches += whole.count(True)
        known = [(first, ids) for first, ids, good in zip(self._firsts, self._ids, whole, strict=True) if good]
        if known:
            firsts, ids = np.array([first for first, _ in known]), np.stack([ids for _, ids in known])
            with np.errstate(over="ignore"):
                self._sum = np.add(self._sum, _digest((firsts[:, None] + np.arange(geometry.rows)).reshape(-1), ids.reshape(-1)))
        self._firsts, self._ids = [], []


def _digest(positions: IntArray, ids: IntArray) -> Any:
    with np.errstate(over="ignore"):
        mixed: Array = positions.astype(np.uint64) * _MIX + ids.astype(np.uint64)
        mixed ^= mixed >> np.uint64(32)
        mixed *= _FINISH
        mixed ^= mixed >> np.uint64(29)
        return np.uint64(np.add.reduce(mixed * _FINISH, dtype=np.uint64))
