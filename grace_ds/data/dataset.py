"""Carry sample ids through the job's dataset, collate function and loader.

The sampler passes pairs (position, id) to the dataset instead of indices.  Dataset and collate function carry them through
the loader (worker processes and pinning included).  The loader removes them again and records which batch was issued.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate

from grace_ds.data.in_flight import InFlightBatches, tensors_of
from grace_ds.errors import DataError
from grace_ds.utils.rng import undisturbed_rng

UNKNOWN = 2**40  # micro-batches of a loader whose length is not known, and more


_OPTIONS = (
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "pin_memory_device",
    "in_order",
)


class IdDataset(Dataset[Any]):
    """The job's dataset by index; it returns (position, id, item) for such a pair, (-1, id, item) for a plain index."""

    def __init__(self, base: Any) -> None:
        if not (hasattr(base, "__getitem__") and hasattr(base, "__len__")):
            raise DataError(
                f"training data of type {type(base).__name__} have no length or no index access; a coreset is drawn by index: "
                "give a map-style dataset, or an iterable one to grace_ds.initialize or grace_ds.attach"
            )
        self.base = base
        if hasattr(base, "__getitems__"):
            # The loader checks for this attribute; it must exist only if the base has it.
            self.__getitems__ = self._getitems

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: Any) -> tuple[int, int, Any]:
        position, sample = index if isinstance(index, tuple) else (-1, int(index))
        return position, sample, self.base[sample]

    def _getitems(self, indices: Sequence[Any]) -> list[tuple[int, int, Any]]:
        pairs = [index if isinstance(index, tuple) else (-1, int(index)) for index in indices]
        items = self.base.__getitems__([sample for _, sample in pairs])
        return [(position, sample, item) for (position, sample), item in zip(pairs, items, strict=True)]


class IdCollate:
    """The job's collate function, with positions and ids added to its result: (positions, ids of the rows, batch)."""

    def __init__(self, collate: Callable[[list[Any]], Any] | None) -> None:
        self.collate = collate or default_collate

    def __call__(self, items: list[tuple[int, int, Any]]) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Collate ``items`` of a :class:`IdDataset`."""
        batch = self.collate([item for _, _, item in items])
        positions = torch.tensor([position for position, _, _ in items], dtype=torch.int64)
        ids = torch.tensor([sample for _, sample, _ in items], dtype=torch.int64)
        rows = _rows_of(batch)
        if rows is not None and rows != len(items):
            ids = self._identify(items, ids, rows)
        return positions, ids, batch

    def _identify(self, items: list[tuple[int, int, Any]], ids: torch.Tensor, rows: int) -> torch.Tensor:
        """Find out which samples the collate function dropped, by collating every sample alone.

        Returns:
            (rows,) int64 ids of the rows that are left; all -1 if that cannot be found out.
        """
        kept = []
        with undisturbed_rng():  # the job's own random draws must not depend on these calls
            for _, _, item in items:
                try:
                    kept.append(_rows_of(self.collate([item])) == 1)
                except Exception:  # the user's function may reject an empty batch: then the sample was dropped
                    kept.append(False)
        kept_ids = ids[torch.tensor(kept, dtype=torch.bool)]
        return kept_ids if len(kept_ids) == rows else torch.full((rows,), -1, dtype=torch.int64)


class IdLoader:
    """A data loader that removes positions and ids: it yields the job's own batches, and reports them to ``in_flight``."""

    def __init__(self, inner: Any, in_flight: InFlightBatches) -> None:
        self.inner, self.in_flight = inner, in_flight
        self._iterator: Iterator[Any] | None = None

    def __len__(self) -> int:
        length: int = len(self.inner)
        if length >= UNKNOWN:
            raise TypeError("a loader over an iterable dataset has no len(): set a number of steps instead")
        return length

    def __iter__(self) -> IdLoader:
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


def loader_options(loader: Any) -> dict[str, Any]:
    """Return the options of a torch DataLoader that one rebuilt over another dataset keeps; accelerate does the same."""
    return {name: getattr(loader, name) for name in _OPTIONS if hasattr(loader, name)}


def _rows_of(batch: Any) -> int | None:
    """Return the number of rows of a collated batch: the leading axis of its first tensor; None without tensors."""
    first = next(tensors_of(batch), None)
    return None if first is None else int(first.shape[0])
