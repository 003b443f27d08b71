"""From the schedule to the job's batches, and back: ids ride with every batch and are stripped before the user's code.

The sampler hands *tickets* (position, id) to the dataset; the wrapped dataset and collate carry them through the loader
(worker processes and pinning included); the wrapped loader takes them off and remembers which batch is out.  At the
first grad-enabled forward the batch is recognised again, by the memory of its tensors, so that a batch that was only
looked at, or an evaluation in between, never counts as trained on.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset, Sampler, default_collate

from grace_ds.data.schedule import ScheduleBook
from grace_ds.errors import DataError
from grace_ds.records import IntArray
from grace_ds.utils.rng import undisturbed_rng

log = logging.getLogger("grace_ds")

_CUT = 8  # columns that a job may cut off a batch before it is trained on
_OUTSTANDING = 64  # batches that may be out at once: more than any loader prefetches into the user's hands


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


@dataclass(eq=False)
class IssuedBatch:
    """A batch in the user's hands.

    Attributes:
        ids: (rows,) int64, dataset ids of its rows; -1 where the collate function hid which sample a row is.
        end: number of the micro-batch plus one; 0 for batches of the job's own sampler.
        leaves: its tensors, kept until it is trained on or replaced.
        batch: as the user has it.
        entries: its leaves by their path, each with the number of changes made to it in place so far: as it was issued,
            whatever the user then does with ``batch``.
    """

    ids: IntArray
    end: int
    leaves: list[torch.Tensor] = field(repr=False)
    batch: Any = field(repr=False, default=None)
    entries: dict[tuple[Any, ...], tuple[Any, int]] = field(repr=False, default_factory=dict)

    @staticmethod
    def of(ids: IntArray, end: int, batch: Any) -> IssuedBatch:
        """A batch that is given to the user now."""
        entries = {path: (leaf, leaf_version(leaf)) for path, leaf in walk(batch)}
        return IssuedBatch(ids, end, list(_leaves(batch)), batch, entries)


class TicketedDataset(Dataset[Any]):
    """The job's map-style dataset, returning (position, id, item) for a ticket or (-1, id, item) for a plain index."""

    def __init__(self, base: Any) -> None:
        if not (hasattr(base, "__getitem__") and hasattr(base, "__len__")):
            raise DataError(
                f"training data of type {type(base).__name__} has no length or no index access; a coreset needs a map-style "
                f"dataset (iterable datasets cannot be drawn from by id): materialise it, or leave grace off"
            )
        self.base = base
        if hasattr(base, "__getitems__"):
            # The loader looks for this attribute; it must be there only if the base has it.
            self.__getitems__ = self._getitems

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, ticket: Any) -> tuple[int, int, Any]:
        position, sample = ticket if isinstance(ticket, tuple) else (-1, int(ticket))
        return position, sample, self.base[sample]

    def _getitems(self, tickets: Sequence[Any]) -> list[tuple[int, int, Any]]:
        pairs = [t if isinstance(t, tuple) else (-1, int(t)) for t in tickets]
        items = self.base.__getitems__([sample for _, sample in pairs])
        return [(position, sample, item) for (position, sample), item in zip(pairs, items, strict=True)]


class TicketedCollate:
    """The job's collate function with the tickets beside its result: (positions, ids of the rows, batch)."""

    def __init__(self, collate: Callable[[list[Any]], Any] | None) -> None:
        self.collate = collate or default_collate

    def __call__(self, items: list[tuple[int, int, Any]]) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Collates ``items`` of a :class:`TicketedDataset`."""
        batch = self.collate([item for _, _, item in items])
        positions = torch.tensor([position for position, _, _ in items], dtype=torch.int64)
        ids = torch.tensor([sample for _, sample, _ in items], dtype=torch.int64)
        rows = _rows_of(batch)
        if rows is not None and rows != len(items):
            ids = self._identify(items, ids, rows)
        return positions, ids, batch

    def _identify(self, items: list[tuple[int, int, Any]], ids: torch.Tensor, rows: int) -> torch.Tensor:
        """The collate function dropped rows: ask it about every sample alone."""
        kept = []
        with undisturbed_rng():  # the job's own draws are not to depend on being asked
            for _, _, item in items:
                try:
                    kept.append(_rows_of(self.collate([item])) == 1)
                except Exception:  # an empty batch may well be an error of the user's function: then the sample was dropped
                    kept.append(False)
        found = ids[torch.tensor(kept, dtype=torch.bool)]
        return found if len(found) == rows else torch.full((rows,), -1, dtype=torch.int64)


class Stream(Protocol):
    """Where the samples of a run stand, in micro-batches over all ranks.

    Attributes:
        frontier: micro-batches that have been trained on.
        issued: those that may have been given to a loader, prefetch included.
    """

    frontier: int
    issued: int


class StreamSampler(Sampler[Any]):
    """Tickets of this rank's samples, position after position, from where training stands.

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


class InFlightBatches:
    """The batches that are out, and the recognition of the one that a forward is about.

    A batch is recognised by the memory of its tensors or by their contents, never guessed: what is not recognised is a batch of
    another source, or one that the job has changed beyond recognition.

    Attributes:
        most: batches that it remembers.
        recognised: whether any forward's batch has been recognised so far.
        unrecognised: forwards so far that no batch which was out could be found for.
    """

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.most = _OUTSTANDING
        self.recognised, self.unrecognised = False, 0
        self._batches: deque[IssuedBatch] = deque(maxlen=_OUTSTANDING)
        self._last: IssuedBatch | None = None  # issued last, whether or not it has been trained on
        self._warned = False

    def __len__(self) -> int:
        return len(self._batches)

    def issue(self, positions: torch.Tensor, ids: torch.Tensor, batch: Any) -> None:
        """Remembers a batch that goes to the user."""
        first = int(positions[0]) if len(positions) else -1
        end = first // self.geometry.micro + 1 if first >= 0 else 0
        if len(ids) and bool((ids < 0).any()) and not self._warned:
            self._warned = True
            log.warning(
                "collate_fn returned %d rows for %d samples and grace cannot tell which: such batches are not collected",
                len(ids),
                len(positions),
            )
        issued = IssuedBatch.of(ids.numpy().copy(), end, batch)
        if self._last is not None:
            _part(self._last, issued)
        self._last = issued
        self._batches.append(issued)

    def match(self, inputs: Any) -> IssuedBatch | None:
        """The outstanding batch whose tensors (or views, or copies of them) are among ``inputs``; None for no such."""
        if not self._batches:
            return None
        found = self._by_memory(inputs) or self._by_contents(inputs)
        if found is None:
            self.unrecognised += 1
        else:
            self.recognised = True
        return found

    def _by_memory(self, inputs: Any) -> IssuedBatch | None:
        seen = {_address(t) for t in _leaves(inputs)}
        return next((b for b in reversed(self._batches) if any(_address(t) in seen for t in b.leaves)), None)

    def _by_contents(self, inputs: Any) -> IssuedBatch | None:
        """For batches that were copied: moved to a device, cut, or put into another type.  From a device it takes a copy back."""
        moved = [t for t in (t.detach().cpu() for t in _leaves(inputs)) if _tells(t)]
        for issued in reversed(self._batches):
            if any(_holds(a, b) and _tells(a) for a in issued.leaves for b in moved):
                return issued
        return None

    def trained(self, issued: IssuedBatch) -> None:
        """The batch has been through a backward: it is out no more."""
        if issued in self._batches:
            self._batches.remove(issued)

    def pass_over(self, count: int) -> int:
        """Forgets the ``count`` batches that have been out for longest; returns how many there were."""
        there = min(count, len(self._batches))
        for _ in range(there):
            self._batches.popleft()
        return there

    def clear(self) -> None:
        """Forgets every batch (after a checkpoint was loaded)."""
        self._batches.clear()
        self._last = None


class TicketedLoader:
    """A data loader without its tickets: yields what the job's own loader would, and tells ``in_flight``."""

    def __init__(self, inner: Any, in_flight: InFlightBatches) -> None:
        self.inner, self.in_flight = inner, in_flight
        self._iterator: Iterator[Any] | None = None

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> TicketedLoader:
        self._iterator = iter(self.inner)
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = iter(self.inner)
        positions, ids, batch = next(self._iterator)
        self.in_flight.issue(positions, ids, batch)
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def walk(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(keys from the root, leaf) of everything in nested mappings, lists and tuples that is none of these itself."""
    if isinstance(tree, (Mapping, list, tuple)):
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from walk(value, (*path, key))
    else:
        yield path, tree


def leaf_version(leaf: Any) -> int:
    """How often a tensor was changed in place; 0 for anything else."""
    return int(leaf._version) if isinstance(leaf, torch.Tensor) and not leaf.is_inference() else 0


def _leaves(tree: Any) -> Iterator[torch.Tensor]:
    """Tensors of at least one axis in nested lists, tuples, mappings and objects with a ``__dict__`` of them."""
    if isinstance(tree, torch.Tensor):
        if tree.dim() > 0:
            yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _leaves(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _leaves(value)


def _rows_of(batch: Any) -> int | None:
    """Rows of a collated batch: the leading axis of its first tensor."""
    first = next(_leaves(batch), None)
    return None if first is None else int(first.shape[0])


def _part(a: IssuedBatch, b: IssuedBatch) -> None:
    """Takes out of two batches' leaves the memory that both have, such as a mask that is made once: it tells neither.

    Where they have nothing else, it is one buffer that is filled anew, and stands for the batch that came last.
    """
    shared = {_address(t) for t in a.leaves} & {_address(t) for t in b.leaves}
    if shared:
        for issued in (a, b):
            issued.leaves = [t for t in issued.leaves if _address(t) not in shared] or issued.leaves


def _tells(t: torch.Tensor) -> bool:
    """Whether a tensor's contents can tell batches apart: not a mask, nor the same in every row as positions are."""
    if t.dtype == torch.bool or t.numel() == 0:
        return False
    rows = t.detach()
    if t.shape[0] > 1 and bool((rows == rows[:1]).all()):
        return False
    some = rows.reshape(-1)[:4096]
    return bool(((some != some.min()) & (some != some.max())).any())  # of more than two values


def _holds(whole: torch.Tensor, part: torch.Tensor) -> bool:
    """Whether ``part`` has the values of ``whole``, or of its columns but a few at either end; both on the CPU."""
    if whole.is_floating_point() != part.is_floating_point():
        return False
    kind = part.dtype if part.is_floating_point() else torch.int64
    whole, part = whole.to(kind), part.to(kind)
    if whole.numel() == part.numel():
        return torch.equal(whole.reshape(-1), part.reshape(-1))
    if whole.dim() != part.dim() or whole.dim() < 2 or len(whole) != len(part) or whole.shape[2:] != part.shape[2:]:
        return False
    spare = whole.shape[1] - part.shape[1]
    return 0 < spare <= _CUT and any(torch.equal(whole[:, at : at + part.shape[1]], part) for at in range(spare + 1))


def _address(t: torch.Tensor) -> tuple[str, int]:
    return str(t.device), t.untyped_storage().data_ptr()
