"""Define the pool: which ids of the corpus each version considers, and how often a run will repeat a sample.

A corpus that fits is one window.  A larger one is covered in a seeded random order by a rolling window, so that a refresh
has always collected a fair share of what it chooses from, and every sample gets its turn.  The order is a bijection
computed from the position: nothing of the corpus' size is stored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from grace_ds.data.order import Order, Permutation
from grace_ds.data.schedule import ScheduleBook
from grace_ds.errors import CheckpointError, ConfigError, DataError
from grace_ds.records import IntArray, Schedule
from grace_ds.utils.reading import MEMORY, read_npy, read_text

BLOCK = 1 << 18  # ids of a window that are made at a time: 2 MiB
_ID = re.compile(r"[+-]?[0-9]{1,4000}")
COLLECTED_SHARE = 20  # an automatic window holds 20 refreshes' worth of samples: each collects 5 % of it


@dataclass(frozen=True)
class Window:
    """Positions [start, start + size) of the corpus' random order, modulo n."""

    start: int
    size: int
    n: int

    def blocks(self) -> Iterator[IntArray]:
        """Return the positions in order, in arrays of at most :data:`BLOCK`."""
        for lo in range(0, self.size, BLOCK):
            yield (self.start + np.arange(lo, min(lo + BLOCK, self.size), dtype=np.int64)) % self.n


@dataclass(frozen=True)
class Placed:
    """What a schedule is made from.

    Attributes:
        blocks: returns the ids of the window in any order, each once, array by array, so that a rank that takes only those
            that it owns never holds the whole window.
        order: of the corpus from the schedule's start on, if nothing is chosen; None: the run's.
        closed: ids of the window that are not chosen any more, sorted.
        meta: entries of the schedule's ``meta`` from which the next window follows.
    """

    blocks: Callable[[], Iterable[IntArray]]
    order: Order | None = None
    closed: IntArray = field(default_factory=lambda: np.empty(0, np.int64))
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ids(self) -> IntArray:
        """(m,) int64, sorted: the whole window."""
        return joined(self.blocks())


def joined(blocks: Iterable[IntArray]) -> IntArray:
    """Return the ids of all ``blocks``, (m,) int64, sorted."""
    ids: IntArray = np.concatenate([np.empty(0, np.int64), *blocks])
    ids.sort()
    return ids


class Windows(Protocol):
    """The windows of a corpus, one for each schedule: of a dataset with an index, or of a stream; equal on all ranks.

    Attributes:
        n: samples of the corpus; 0 if that is not known.
        limit: ids lie below it.
        size: most samples of a window.
        advance: samples by which the window moves from one schedule to the next; 0 if it does not move.
    """

    n: int
    limit: int
    size: int
    advance: int

    def known(self, version: int, book: ScheduleBook) -> IntArray:
        """Return the ids whose samples can be read before schedule ``version`` is made, (m,) int64, sorted."""
        ...

    def place(self, version: int, start: int, book: ScheduleBook, trained: IntArray) -> Placed:
        """Return what schedule ``version`` is made from; it begins at position ``start``, after the schedules of ``book``."""
        ...

    def hold(self, schedules: Iterable[Schedule]) -> None:
        """Keep the samples that ``schedules`` and the window of the last one need."""
        ...

    def check(self, schedules: Iterable[Schedule]) -> None:
        """Raise CheckpointError if ``schedules`` of a checkpoint were made from other data."""
        ...


class Pool:
    """The rolling window over a corpus of n samples; a pure function of its arguments, equal on all ranks.

    Args:
        n: size of the corpus.
        window: samples of a window; 0: choose it so that a refresh collects at least 5 % of it.
        budget: share of the window that one coreset holds.
        interval_steps: optimizer steps between two refreshes.
        batch: samples of an optimizer step, over all ranks.
        seed: of the order.

    Attributes:
        size: samples of a window; n if the corpus is one window.
        advance: samples by which the window moves from one version to the next; 0 if it does not move.
    """

    def __init__(self, n: int, window: int, budget: float, interval_steps: int, batch: int, seed: int) -> None:
        if n < 1:
            raise DataError("the dataset is empty: there is nothing to select from")
        if window < 0:
            raise ConfigError(f"window is {window}: give a number of samples, or 0 to have it chosen")
        if not 0 < budget <= 1:
            raise ConfigError(f"budget is {budget}: give a share of the window above 0 and at most 1")
        if interval_steps < 1 or batch < 1:
            raise ConfigError(f"refresh.interval_steps is {interval_steps} and the batch {batch}: both must be at least 1")
        self.n = n
        self.size = min(n, window or COLLECTED_SHARE * interval_steps * batch)
        self.advance = 0 if self.size == n else max(1, min(self.size, round(interval_steps * batch / budget)))
        self.limit = n
        self._order = Permutation(n, seed)

    def window(self, version: int) -> Window:
        """Return the window of a schedule's version, as positions of the order."""
        return Window(version * self.advance % self.n, self.size, self.n)

    def window_at(self, version: int) -> IntArray:
        """Return the ids in the window of ``version``, (size,) int64, sorted."""
        return joined(self.blocks(version))

    def blocks(self, version: int) -> Iterator[IntArray]:
        """Return the ids in the window of ``version`` in any order, in arrays of at most :data:`BLOCK`."""
        if self.size == self.n:
            return Window(0, self.n, self.n).blocks()
        return map(self._order, self.window(version).blocks())

    def known(self, version: int, book: ScheduleBook) -> IntArray:
        """See :class:`Windows`."""
        return self.window_at(version)

    def place(self, version: int, start: int, book: ScheduleBook, trained: IntArray) -> Placed:
        """See :class:`Windows`."""
        return Placed(lambda: self.blocks(version))

    def hold(self, schedules: Iterable[Schedule]) -> None:
        """See :class:`Windows`: a dataset with an index needs nothing."""

    def check(self, schedules: Iterable[Schedule]) -> None:
        """See :class:`Windows`.

        Raises:
            CheckpointError: one names a sample that the dataset does not have.
        """
        for schedule in schedules:
            if int(schedule.ids.max()) >= self.n:
                raise CheckpointError(
                    f"schedule {schedule.version} names sample {schedule.ids.max()}, and the dataset has {self.n}: use the "
                    "dataset that it was made from"
                )


def implied_repeats(total_steps: int, batch: int, budget: float, n: int) -> float:
    """Return how often a run trains on a sample of its coresets, on average: steps * B / (budget * N)."""
    return total_steps * batch / (budget * n)


def check_repeats(total_steps: int, batch: int, budget: float, n: int, max_repeats: float) -> float:
    """Return the implied repeats of a run.

    Raises:
        ConfigError: they are above ``max_repeats``.
    """
    repeats = implied_repeats(total_steps, batch, budget, n)
    if repeats > max_repeats:
        enough = total_steps * batch / (max_repeats * n)
        cure = f"raise budget to at least {enough:.3g}, " if enough <= 1 else ""
        raise ConfigError(
            f"{total_steps} steps of {batch} samples on a budget of {budget} of {n} samples train on each chosen "
            f"sample {repeats:.3g} times, above max_repeats {max_repeats}: {cure}"
            "use more data or fewer steps, or raise max_repeats"
        )
    return repeats


def read_ids(path: str | Path, n: int) -> IntArray:
    """Read the ids of an include or exclude file: text with one id per line, or .npy.

    Args:
        path: of the file; blank lines and text after a # are skipped.
        n: size of the dataset; every id must be in [0, n).

    Returns:
        (m,) int64, sorted, unique.

    Raises:
        DataError: the file is missing, holds anything but integers, or an id outside of the dataset.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"id file {file} does not exist: correct selection.include or selection.exclude")
    ids = _npy_integers(file).astype(np.int64) if file.suffix == ".npy" else _text_ids(file)
    bad = ids[(ids < 0) | (ids >= n)]
    if len(bad):
        raise DataError(f"{file}: id {bad[0]} is outside of the dataset's [0, {n}) ({len(bad)} such): was the file made for it?")
    unique: IntArray = np.unique(ids)
    return unique


def read_sources(path: str | Path, n: int) -> IntArray:
    """Return the source of each of ``n`` samples, (n,) integers of the file's own type, as a memory map of a .npy file.

    A copy on every rank would take 8 bytes per sample of the corpus, and only the root reads a window's labels.

    Raises:
        DataError: the file is missing, holds anything but integers, or not one entry per sample.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"source file {file} does not exist: correct selection.sources")
    labels = _npy_integers(file, mapped=True)
    if len(labels) != n:
        raise DataError(f"{file} names the source of {len(labels)} samples, the dataset has {n}: give one label for each of them")
    return labels


def _npy_integers(file: Path, mapped: bool = False) -> IntArray:
    try:
        array: IntArray = read_npy(file, mapped)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as .npy: {error}; write it by numpy.save") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(f"{file} holds {array.dtype} of shape {array.shape}: a 1-D array of integer ids is needed")
    return array


def _text_ids(file: Path) -> IntArray:
    ids: list[int] = []
    try:
        lines = read_text(file, MEMORY).splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as text: {error}; give one id a line, or a .npy file") from error
    for number, line in enumerate(lines, 1):
        entry = line.split("#")[0].strip()
        if not entry:
            continue
        if not _ID.fullmatch(entry):  # int() would also take 1_000, and digits of other scripts
            raise DataError(f"{file}:{number}: {entry[:40]!r} is not an integer id; give one id a line")
        value = int(entry)
        if abs(value) >= 2**63:
            raise DataError(f"{file}:{number}: id {value} does not fit 64 bits")
        ids.append(value)
    return np.array(ids, np.int64)
