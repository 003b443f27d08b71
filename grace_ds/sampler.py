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

from grace_ds.errors import DataError
from grace_ds.records import IntArray
from grace_ds.schedule import ScheduleBook

log = logging.getLogger("grace_ds")

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


class Outstanding:
    """The batches that are out, and the recognition of the one that a forward is about.

    Attributes:
        most: batches that it remembers.
    """

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.most = _OUTSTANDING
        self._batches: deque[IssuedBatch] = deque(maxlen=_OUTSTANDING)
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
                "collate_fn returned %d rows for %d samples and grace cannot tell which: such batches are not harvested",
                len(ids),
                len(positions),
            )
        self._batches.append(IssuedBatch.of(ids.numpy().copy(), end, batch))

    def match(self, inputs: Any) -> IssuedBatch | None:
        """The outstanding batch whose tensors (or views, or copies of them) are among a forward's ``inputs``."""
        if not self._batches:
            return None
        seen = {_address(t) for t in _leaves(inputs)}
        for issued in reversed(self._batches):
            if any(_address(t) in seen for t in issued.leaves):
                return issued
        if len(self._batches) == 1:
            return self._batches[0]
        # The batch was copied (moved to a device) and several are out: compare contents.  Rare, so a sync is fine.
        moved = [t.detach().cpu() for t in _leaves(inputs)]
        for issued in reversed(self._batches):
            if any(a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b) for a in issued.leaves for b in moved):
                return issued
        return self._batches[-1]

    def trained(self, issued: IssuedBatch) -> None:
        """The batch has been through a backward: it is out no more."""
        if issued in self._batches:
            self._batches.remove(issued)

    def clear(self) -> None:
        """Forgets every batch (after a checkpoint was loaded)."""
        self._batches.clear()


class TicketedLoader:
    """A data loader without its tickets: yields what the job's own loader would, and tells ``outstanding``."""

    def __init__(self, inner: Any, outstanding: Outstanding) -> None:
        self.inner, self.outstanding = inner, outstanding
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
        self.outstanding.issue(positions, ids, batch)
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


def _address(t: torch.Tensor) -> tuple[str, int]:
    return str(t.device), t.untyped_storage().data_ptr()
