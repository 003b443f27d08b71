"""The corpus behind Megatron's training dataset: one epoch of unique samples with stable ids.

Megatron's datasets are as long as the run: they repeat the corpus as often as it takes, and which sample an index means
depends on that length.  A coreset needs ids that mean the same in every run, so each dataset is built once more with
``num_samples=None``, which is one epoch, described by a hash without the run's length.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from grace_ds.data.order import Permutation
from grace_ds.data.tokens import fingerprint
from grace_ds.errors import DataError
from grace_ds.records import Array, IntArray, Role, Schedule


@dataclass(frozen=True)
class Blend:
    """Which of the blend's datasets each position of the run draws from, and which ids are whose.

    Attributes:
        wanted: (run's length,) the dataset's number at each position; the job's own, so that its weights hold.
        numbers: (run's length,) how many samples of that dataset come before it; the job's own too.
        starts: (datasets + 1,) int64: dataset d holds the ids ``starts[d] … starts[d + 1] - 1``.
    """

    wanted: Array
    numbers: Array
    starts: IntArray

    def of(self, ids: IntArray) -> IntArray:
        """(n,) int64: the dataset that each id belongs to."""
        return np.searchsorted(self.starts, ids, side="right").astype(np.int64) - 1


class Corpus(Dataset[Any]):
    """Unique samples, map-style; an item is what the job's own dataset would give.

    Attributes:
        parts: one-epoch datasets; one of them unless the job blends.
        blend: None where it does not.
        digest: 32 hex digits; names the samples and their ids, whatever the length of the run and the weights of a blend.
    """

    def __init__(self, parts: list[Any], blend: Blend | None, digest: str) -> None:
        self.parts, self.blend, self.digest = parts, blend, digest
        self._starts = np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int | None) -> Any:
        if index is None:  # Megatron's padding of an incomplete batch
            part, item = 0, self.parts[0][None]
        else:
            part = int(np.searchsorted(self._starts, index, side="right")) - 1
            item = self.parts[part][int(index - self._starts[part])]
        return item if self.blend is None else {"dataset_id": part, **item}


class Texts(Dataset[Any]):
    """The token ids of a corpus alone, for all that looks at content."""

    def __init__(self, corpus: Any) -> None:
        self.corpus = corpus

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = self.corpus[index]
        if isinstance(item, dict):
            tokens = next((item[key] for key in ("tokens", "input_ids", "text") if key in item), None)
            if tokens is None:
                raise DataError(f"an item of the training dataset has {sorted(item)}, and none of tokens, input_ids and text")
            item = tokens
        return {"input_ids": torch.as_tensor(item)}


def one_epoch(dataset: Any, first: bool, wait: Callable[[], None]) -> Corpus | None:
    """The corpus behind ``dataset``.  Collective: Megatron builds an index on rank 0, the others read it.

    Args:
        dataset: what the job trains on; None on a rank that has none.
        first: whether this rank is to build what is not cached.
        wait: returns when all ranks have come so far.

    Returns:
        None where ``dataset`` is None.
    """
    made = None
    try:
        made = _corpus(dataset) if first and dataset is not None else None
    finally:
        wait()  # the others must not be left there
    if not first and dataset is not None:
        made = _corpus(dataset)
    return made


def _corpus(dataset: Any) -> Corpus:
    if hasattr(dataset, "dataset_index") and hasattr(dataset, "datasets"):
        parts = [_unique(d) for d in dataset.datasets]
        starts = np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int64)
        wanted, numbers = dataset.dataset_index, dataset.dataset_sample_index
        if wanted is None:  # defer_npy_index_mmap: they are read at the first item
            wanted = np.load(dataset.path_to_dataset_index, mmap_mode="r")
            numbers = np.load(dataset.path_to_dataset_sample_index, mmap_mode="r")
        return Corpus(parts, Blend(wanted, numbers, starts), _digest(parts))
    part = _unique(dataset)
    return Corpus([part], None, _digest([part]))


def _unique(dataset: Any) -> Any:
    """One epoch of a Megatron dataset; any other map-style dataset is taken to be one already."""
    if hasattr(dataset, "unique_description_hash") and hasattr(dataset, "index_split"):
        d = dataset
        return type(d)(d.dataset, d.dataset_path, d.indices, None, d.index_split, d.config)
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise DataError(
            f"training data of type {type(dataset).__name__} has no length or no index access; a coreset needs a map-style "
            "dataset: leave GRACE out, or give one"
        )
    return dataset


def _digest(parts: list[Any]) -> str:
    h = hashlib.blake2b(digest_size=16)
    for part in parts:
        h.update((getattr(part, "unique_description_hash", None) or fingerprint(Texts(part))).encode())
        h.update(len(part).to_bytes(8, "little"))
    return h.hexdigest()


def follow(blend: Blend, schedule: Schedule) -> Schedule:
    """``schedule`` with each slot's sample of the dataset that the job has at its position, so that a blend's weights hold.

    The samples of a dataset keep their order; where the schedule holds fewer of them than the blend asks for they come again,
    where it holds more the last ones are left out.  What a uniform schedule holds, and what a dataset of which nothing was
    chosen gives, is that dataset's own samples one after another in a seeded order.
    """
    positions = np.arange(schedule.start, schedule.start + len(schedule)) % len(blend.wanted)
    wanted, found = np.asarray(blend.wanted[positions], np.int64), blend.of(schedule.ids)
    taken = np.full(len(schedule), -1, np.int64)
    if schedule.meta.get("objective") != "uniform":
        for part in np.unique(wanted):
            slots, have = np.flatnonzero(wanted == part), np.flatnonzero(found == part)
            if len(have):
                taken[slots] = have[np.arange(len(slots)) % len(have)]
    free = taken < 0
    ids, roles, weights = schedule.ids[taken], schedule.roles[taken], schedule.weights[taken]
    ids[free] = _in_turn(blend, wanted[free], np.asarray(blend.numbers[positions], np.int64)[free], schedule.seed)
    roles[free], weights[free] = Role.CORE, 1.0
    return dataclasses.replace(schedule, ids=ids, roles=roles, weights=weights)


def _in_turn(blend: Blend, parts: IntArray, numbers: IntArray, seed: int) -> IntArray:
    """(n,) int64: sample number ``numbers`` of each dataset in its own seeded order, epoch after epoch."""
    ids = np.empty(len(parts), np.int64)
    sizes = np.diff(blend.starts)
    for part in np.unique(parts):
        size = int(sizes[part])
        for epoch in np.unique(numbers[parts == part] // size):
            here = (parts == part) & (numbers // size == epoch)
            ids[here] = blend.starts[part] + Permutation(size, seed + int(epoch))(numbers[here] % size)
    return ids
