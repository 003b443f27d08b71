"""Recover the corpus behind Megatron's training dataset: one epoch of unique samples with stable ids.

Megatron's datasets are as long as the run: they repeat the corpus as often as needed, and which sample an index means
depends on that length.  A coreset needs ids that mean the same in every run.  So each dataset is built once more with
``num_samples=None``, which gives one epoch, described by a hash without the run's length.
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
    """Which of the blend's datasets each position of the run draws from, and which ids belong to which dataset.

    Attributes:
        wanted: (run's length,) the dataset's number at each position; the job's own array, so that its weights hold.
        numbers: (run's length,) how many samples of that dataset come before it; the job's own array too.
        starts: (datasets + 1,) int64: dataset d holds the ids ``starts[d] … starts[d + 1] - 1``.
    """

    wanted: Array
    numbers: Array
    starts: IntArray

    def of(self, ids: IntArray) -> IntArray:
        """Return the dataset that each id belongs to: (n,) int64."""
        return np.searchsorted(self.starts, ids, side="right").astype(np.int64) - 1


class Corpus(Dataset[Any]):
    """Unique samples, map-style; an item is what the job's own dataset would give.

    Attributes:
        parts: one-epoch datasets; exactly one unless the job blends several.
        blend: None if the job does not blend datasets.
        digest: 32 hex digits that identify the samples and their ids, whatever the run's length and a blend's weights.
    """

    def __init__(self, parts: list[Any], blend: Blend | None, digest: str) -> None:
        self.parts, self.blend, self.digest = parts, blend, digest
        self._starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)

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
    """Only the token ids of a corpus, for code that reads content."""

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
            packed, item = "cu_seqlens" in item, torch.as_tensor(tokens)
            if packed:  # conversations, padded to the sequence's length
                text = torch.nonzero(item != item[-1])
                item = item[: int(text[-1]) + 2] if len(text) else item[:1]
        return {"input_ids": torch.as_tensor(item)}


def one_epoch(dataset: Any, first: bool, wait: Callable[[], None]) -> Corpus | None:
    """Return the corpus behind ``dataset``.  Collective: Megatron builds an index on rank 0, the other ranks read it.

    Args:
        dataset: what the job trains on; None on a rank without data.
        first: whether this rank builds what is not cached.
        wait: a barrier: returns when all ranks have called it.

    Returns:
        None if ``dataset`` is None.

    Raises:
        DataError: the dataset is not map-style.
    """
    corpus = None
    try:
        corpus = _corpus(dataset) if first and dataset is not None else None
    finally:
        wait()  # also after an error: the other ranks wait here
    if not first and dataset is not None:
        corpus = _corpus(dataset)
    return corpus


def _corpus(dataset: Any) -> Corpus:
    if hasattr(dataset, "dataset_index") and hasattr(dataset, "datasets"):
        parts = [_unique(blended) for blended in dataset.datasets]
        starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
        wanted, numbers = dataset.dataset_index, dataset.dataset_sample_index
        if wanted is None:  # defer_npy_index_mmap: Megatron reads them at the first item
            wanted = np.load(dataset.path_to_dataset_index, mmap_mode="r")
            numbers = np.load(dataset.path_to_dataset_sample_index, mmap_mode="r")
        return Corpus(parts, Blend(wanted, numbers, starts), _digest(parts))
    part = _unique(dataset)
    return Corpus([part], None, _digest([part]))


def _unique(dataset: Any) -> Any:
    """Return one epoch of a Megatron dataset; any other map-style dataset counts as one epoch already."""
    if hasattr(dataset, "unique_description_hash") and hasattr(dataset, "index_split"):
        source = dataset

        def of_length(samples: int | None) -> Any:
            return type(source)(source.dataset, source.dataset_path, source.indices, samples, source.index_split, source.config)

        part = of_length(None)
        # Megatron-LM's dataset for --sft is as long as it is told to be, and None is no length.
        return part if _has_length(part) else of_length(len(source.indices))
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise DataError(
            f"training data of type {type(dataset).__name__} has no length or no index access; a coreset needs a map-style "
            "dataset: leave GRACE out, or give one"
        )
    return dataset


def _has_length(dataset: Any) -> bool:
    try:
        return len(dataset) >= 0
    except TypeError:
        return False


def _digest(parts: list[Any]) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        hasher.update((getattr(part, "unique_description_hash", None) or fingerprint(Texts(part))).encode())
        hasher.update(len(part).to_bytes(8, "little"))
    return hasher.hexdigest()


def follow(blend: Blend, schedule: Schedule) -> Schedule:
    """Return ``schedule`` with each slot's sample from the blend's dataset for that position, so that its weights hold.

    The samples of a dataset keep their order.  If the schedule holds fewer of them than the blend needs, they are repeated; if
    it holds more, the last ones are left out.  For a uniform schedule, and for a dataset without any chosen sample, the slots
    get that dataset's own samples one after another in a seeded order.
    """
    positions = np.arange(schedule.start, schedule.start + len(schedule)) % len(blend.wanted)
    wanted, scheduled = np.asarray(blend.wanted[positions], np.int64), blend.of(schedule.ids)
    taken = np.full(len(schedule), -1, np.int64)
    if schedule.meta.get("objective") != "uniform":
        for part in np.unique(wanted):
            slots, available = np.flatnonzero(wanted == part), np.flatnonzero(scheduled == part)
            if len(available):
                taken[slots] = available[np.arange(len(slots)) % len(available)]
    free = taken < 0
    ids, roles, weights = schedule.ids[taken], schedule.roles[taken], schedule.weights[taken]
    ids[free] = _in_turn(blend, wanted[free], np.asarray(blend.numbers[positions], np.int64)[free], schedule.seed)
    roles[free], weights[free] = Role.CORE, 1.0
    return dataclasses.replace(schedule, ids=ids, roles=roles, weights=weights)


def _in_turn(blend: Blend, parts: IntArray, numbers: IntArray, seed: int) -> IntArray:
    """Return sample number ``numbers`` of each dataset in its own seeded order, epoch after epoch: (n,) int64."""
    ids = np.empty(len(parts), np.int64)
    sizes = np.diff(blend.starts)
    for part in np.unique(parts):
        size = int(sizes[part])
        for epoch in np.unique(numbers[parts == part] // size):
            chosen = (parts == part) & (numbers // size == epoch)
            ids[chosen] = blend.starts[part] + Permutation(size, seed + int(epoch))(numbers[chosen] % size)
    return ids
