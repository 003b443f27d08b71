"""Read an iterable dataset as if it were map-style: its samples are numbered in the order in which they come.

A sample's id is its position in the stream, counted over all passes, so ids, schedules, samplers and resume are those of any
other dataset.  Each rank reads the whole stream and holds the samples of the present window in memory: a schedule may give any
of them to any rank, and the number of ranks may change at a resume.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from grace_ds.data.dataset import UNKNOWN
from grace_ds.data.sampler import Geometry, StreamSampler
from grace_ds.data.schedule import ScheduleBook
from grace_ds.errors import DataError
from grace_ds.utils.rng import undisturbed_rng

log = logging.getLogger("grace_ds")


def is_iterable(dataset: Any) -> bool:
    """Return whether a dataset can only be iterated over: torch's ``IterableDataset``, ``datasets`` with ``streaming=True``."""
    return isinstance(dataset, IterableDataset) or (hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__"))


def map_style(dataset: Any) -> Any:
    """Return ``dataset``, in an :class:`IterableBuffer` if it can only be iterated over."""
    return IterableBuffer(dataset) if is_iterable(dataset) else dataset


class IterableBuffer:
    """The samples of an iterable dataset by their positions in the stream.

    When the dataset ends it is iterated over again (a further pass), after a call of its ``set_epoch(pass)`` if it has that
    method; positions go on.  Reading leaves the global random states as they were.  A position below ``low`` can still be read:
    the stream is then read again from the start of its pass.

    Args:
        source: gives the same samples in the same order on every rank and each time that it is iterated over.

    Attributes:
        low, high: the positions held, [low, high).
        ends: positions at which the passes that were read to their ends have ended, ascending.
    """

    def __init__(self, source: Any) -> None:
        if hasattr(source, "__next__"):
            raise DataError(
                f"training data of type {type(source).__name__} is an iterator, which cannot be started again for a resume: give "
                "an object whose __iter__ begins anew, such as a torch IterableDataset"
            )
        self.source = source
        self.low = self.high = 0
        self.ends: list[int] = []
        self._held: dict[int, tuple[Any, bytes]] = {}  # position → item and its digest
        self._iterator: Iterator[Any] | None = None
        self._pace, self._limit = 0, 0

    def __len__(self) -> int:
        """Return the number of samples read so far."""
        return self.high

    def __getitem__(self, position: int) -> Any:
        position = int(position)
        if position < self.low:
            self.hold(position)
        self.read_to(max(position + 1, min(self.high + self._pace, self._limit)))
        item = self._held[position][0]
        # A map-style dataset gives a new item each time, so a collate function may change it.
        return copy.copy(item) if isinstance(item, (dict, list)) else item

    def read_to(self, end: int) -> None:
        """Read and hold the samples before position ``end``."""
        if end <= self.high:
            return
        with undisturbed_rng():
            while self.high < end:
                item = self._next()
                self._held[self.high] = item, _digest(item)
                self.high += 1

    def read_ahead(self, pace: int, limit: int) -> None:
        """Read ``pace`` samples more whenever one is asked for, up to position ``limit``, so that a refresh finds them read."""
        self._pace, self._limit = pace, limit

    def hold(self, low: int, ends: list[int] | None = None) -> None:
        """Drop what lies before position ``low``; go there, forward or back, if it is not held.

        Args:
            ends: of the passes before ``low``, if they are known from a checkpoint.
        """
        if self.low <= low <= self.high:
            for position in range(self.low, low):
                del self._held[position]
            self.low = low
            return
        if ends and (not self.ends or len(ends) > len(self.ends)):
            self.ends, self._iterator = list(ends), None
        if low < self.low or self._iterator is None:
            before = [end for end in self.ends if end <= low]
            self.ends, self._iterator = before, None
            self.high = before[-1] if before else 0
            log.info("the stream is read again from its sample %d, to go on at %d", self.high, low)
            skip = getattr(self.source, "skip", None)
            if callable(skip):  # datasets' IterableDataset: without running this package's own loop
                with undisturbed_rng():
                    self._begin(skip(low - self.high))
                self.high = low
        self._held = {}
        with undisturbed_rng():
            while self.high < low:
                self._next()
                self.high += 1
        self.low = low

    def pass_length(self, before: int) -> int:
        """Return the samples of the last pass that has ended before position ``before``; 0 if none has."""
        ends = [0, *(end for end in self.ends if end < before)]
        return ends[-1] - ends[-2] if len(ends) > 1 else 0

    def digest(self, low: int, high: int) -> str:
        """Return 16 hex digits over the samples [low, high), which are read if they are not held yet."""
        if low < self.low:
            self.hold(low)
        self.read_to(high)
        hasher = hashlib.blake2b(digest_size=8)
        for position in range(low, high):
            hasher.update(self._held[position][1])
        return hasher.hexdigest()

    def _begin(self, source: Any) -> Iterator[Any]:
        set_epoch = getattr(source, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(len(self.ends))
        self._iterator = iter(source)
        return self._iterator

    def _next(self) -> Any:
        """Return the sample at position ``high``."""
        began = self.ends[-1] if self.ends else 0
        for _ in range(2):
            iterator = self._iterator or self._begin(self.source)
            try:
                return next(iterator)
            except StopIteration:
                self._iterator = None
                if self.high > began:
                    self.ends.append(self.high)
                    began = self.high
            except Exception as error:
                raise DataError(
                    f"sample {self.high} of the stream raised {type(error).__name__}: {error}; repair that item"
                ) from error
        raise DataError(
            f"the stream of type {type(self.source).__name__} gave no sample in pass {len(self.ends)}; make its __iter__ "
            "begin anew each time it is called"
        )


class IterableSampler(StreamSampler):
    """The sampler of a stream: an iteration ends after as many samples as a pass holds, once that is known.

    Args:
        book: the schedules, whose ``meta`` says how long a pass is.
        geometry: of the job.
        drop_last: whether the job drops an incomplete last micro-batch.
    """

    def __init__(self, book: ScheduleBook, geometry: Geometry, drop_last: bool) -> None:
        super().__init__(book, geometry, 0, UNKNOWN * geometry.rows)
        self.drop_last = drop_last

    def __iter__(self) -> Iterator[tuple[int, int]]:
        geometry, first, self.issued = self.geometry, self.frontier, self.frontier
        for q in itertools.count(first):
            start = q * geometry.micro + geometry.rank * geometry.rows
            # Of the micro-batch's first position: the same schedule on every rank.
            if 0 < self._micro_batches(q * geometry.micro) <= q - first:
                return
            ids = self.book.slots(start, geometry.rows).ids.tolist()
            self.issued = max(self.issued, q + 1)
            yield from zip(range(start, start + geometry.rows), ids, strict=True)

    def _micro_batches(self, position: int) -> int:
        """Return the micro-batches of an iteration as the schedule at a position knows them; 0 if it does not."""
        schedule = self.book.at(position)
        samples = 0 if schedule is None else int(schedule.meta.get("stream", {}).get("pass_length", 0))
        micro = self.geometry.micro
        return samples and max(1, samples // micro if self.drop_last else -(-samples // micro))


def _digest(item: Any) -> bytes:
    """Return 8 bytes over everything in an item: nested mappings and sequences, tensors, arrays and plain values."""
    hasher = hashlib.blake2b(digest_size=8)
    _feed(hasher, item)
    return hasher.digest()


def _feed(hasher: Any, value: Any) -> None:
    if isinstance(value, dict):
        for key, entry in value.items():
            hasher.update(repr(key).encode())
            _feed(hasher, entry)
    elif isinstance(value, (list, tuple)) and not (value and isinstance(value[0], (int, float))):
        for entry in value:
            _feed(hasher, entry)
    elif isinstance(value, torch.Tensor):
        hasher.update(f"{value.dtype}{tuple(value.shape)}".encode())
        hasher.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, (np.ndarray, list, tuple)):
        array = np.asarray(value)
        hasher.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    else:
        hasher.update(repr(value).encode())
