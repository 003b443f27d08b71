"""Rebuild the Trainer's training loader so that it reads the schedule.

Accelerate reads one batch ahead, moves batches, rebuilds the loader to skip what was trained on before a resume, and has its
own loader class.  So the loader is not wrapped.  Each batch carries its positions and ids under a key that is removed right
before the training step, and only the loader's dataset, batch sampler and collate function are replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler

from grace_ds.data.dataset import IdCollate, IdDataset, loader_options
from grace_ds.data.sampler import StreamSampler
from grace_ds.errors import ConfigError, DataError, GraceError
from grace_ds.records import IntArray

KEY = "grace_ds_ids"
_DROPPED = (-2, -2)  # index of a sample in a batch that the Trainer must skip without reading it


@dataclass(frozen=True, eq=False)
class BatchIds:
    """The samples of a batch.  Not a tensor, so that it is not moved to a device.

    Attributes:
        first: position of its first sample; -1 in a batch of the job's own order.
        ids: (rows,) int64, dataset ids of its rows; -1 if the collate function hides which sample a row is.
    """

    first: int
    ids: IntArray


class TrainerDataset(IdDataset):
    """The training set, indexed by pairs (position, id)."""

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        if hasattr(base, "set_epoch"):
            self.set_epoch = base.set_epoch  # accelerate looks for it

    def __getitem__(self, index: Any) -> tuple[int, int, Any]:
        if index == _DROPPED:
            raise GraceError(
                "the Trainer took a batch that was trained on before the resume instead of skipping it; set ignore_data_skip=True"
            )
        return super().__getitem__(index)

    def _getitems(self, indices: Any) -> list[tuple[int, int, Any]]:
        if _DROPPED in indices:
            self[_DROPPED]
        return super()._getitems(indices)


class TrainerCollate:
    """The job's collate function, with :class:`BatchIds` in each batch under ``KEY``."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate_ids = IdCollate(collate)

    def __call__(self, items: list[tuple[int, int, Any]]) -> Any:
        """Collate ``items`` of a :class:`TrainerDataset`.

        Raises:
            DataError: the job's collate function returns no mapping.
        """
        positions, ids, batch = self._collate_ids(items)
        if not isinstance(batch, MutableMapping):
            raise DataError(f"data_collator returned a {type(batch).__name__}; a Trainer's batches are dicts: return one")
        batch[KEY] = BatchIds(int(positions[0]), ids.numpy())
        return batch


class ScheduleBatches(BatchSampler):
    """This rank's micro-batches of an epoch: those of the schedule once GRACE has an engine, the job's own before that.

    Args:
        own: the job's batch sampler of this rank; its attributes are visible through this one, because accelerate sets epochs
            on them.

    Attributes:
        stream: the schedule's pairs; None before there is an engine, and in shadow mode.
        skipped: micro-batches that the Trainer will drop at the start of the next iteration.
    """

    def __init__(self, own: Any) -> None:
        self.own = own
        self.stream: StreamSampler | None = None
        self.skipped = 0

    def __len__(self) -> int:
        return len(self.own)

    def __getattr__(self, name: str) -> Any:
        if name == "own":  # while this object is unpickled
            raise AttributeError(name)
        return getattr(self.own, name)

    @property
    def shuffler(self) -> Any:
        """The sampler that the job's batches are cut from; None if it cannot be found."""
        return getattr(
            getattr(self.own, "batch_sampler", self.own), "sampler", None
        )  # accelerate wraps it if there are several ranks

    def __iter__(self) -> Iterator[Any]:
        if self.stream is None:
            yield from self.own
            return
        skipped, self.skipped = self.skipped, 0
        for _ in range(skipped):
            yield [_DROPPED]
        # The stream begins at the position of training, whatever a loader had read ahead.
        pairs = iter(self.stream)
        for _ in range(len(self) - skipped):
            yield list(islice(pairs, self.stream.geometry.rows))


def rebuilt(stock: Any) -> Any:
    """Return the Trainer's prepared training loader, with the same class and options, and with positions and ids.

    Raises:
        ConfigError: its class sends batches to other ranks than the one that reads them.
    """
    from accelerate.data_loader import DataLoaderShard

    if not isinstance(stock, DataLoaderShard):
        raise ConfigError(
            f"the Trainer's training loader is a {type(stock).__name__}; GRACE feeds accelerate's DataLoaderShard only: leave "
            "get_train_dataloader as it is and accelerator_config.dispatch_batches unset"
        )
    return DataLoaderShard(
        TrainerDataset(stock.dataset),
        device=stock.device,
        rng_types=stock.rng_types,
        synchronized_generator=stock.synchronized_generator,
        batch_sampler=ScheduleBatches(stock.batch_sampler),
        collate_fn=TrainerCollate(stock.collate_fn),
        _drop_last=stock._drop_last,
        _non_blocking=stock._non_blocking,
        **loader_options(stock),
    )


def take_ids(inputs: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Remove and return (positions (1,), ids (rows,)), both int64, of a batch; None if it holds none."""
    batch_ids = inputs.pop(KEY, None) if isinstance(inputs, MutableMapping) else None
    if batch_ids is None:
        return None
    return torch.tensor([batch_ids.first]), torch.from_numpy(np.asarray(batch_ids.ids, np.int64))
