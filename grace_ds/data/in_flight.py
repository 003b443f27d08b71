"""Find the batch that a forward runs on: issued batches are recognised by the memory or the contents of their tensors.

A batch that was only looked at, or an evaluation in between, never counts as trained on.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from grace_ds.data.sampler import Geometry
from grace_ds.records import IntArray

log = logging.getLogger("grace_ds")

_CUT = 8  # maximum columns that a job may cut off a batch before training on it
_MOST = 64  # maximum batches in flight at once: more than a job holds in practice


@dataclass(eq=False)
class IssuedBatch:
    """A batch that was given to the user.

    Attributes:
        ids: (rows,) int64, dataset ids of its rows; -1 if the collate function dropped rows and the ids are unknown.
        end: number of the micro-batch plus one; 0 for batches of the job's own sampler.
        leaves: its tensors, kept until the batch is trained on or replaced.
        batch: the object that the user has.
        entries: its leaves by path, each with the number of in-place changes at the time of issue; independent of what the
            user then does with ``batch``.
    """

    ids: IntArray
    end: int
    leaves: list[torch.Tensor] = field(repr=False)
    batch: Any = field(repr=False, default=None)
    entries: dict[tuple[Any, ...], tuple[Any, int]] = field(repr=False, default_factory=dict)

    @staticmethod
    def of(ids: IntArray, end: int, batch: Any) -> IssuedBatch:
        """Build the record of a batch that is given to the user now."""
        entries = {path: (leaf, leaf_version(leaf)) for path, leaf in walk(batch)}
        return IssuedBatch(ids, end, list(tensors_of(batch)), batch, entries)


class InFlightBatches:
    """The batches that are in flight, and the recognition of the one that a forward runs on.

    A batch is recognised by the memory of its tensors or by their contents, never guessed.  A batch that is not recognised comes
    from another source, or the job has changed it beyond recognition.

    Attributes:
        most: number of batches that it remembers.
        recognised: whether any forward's batch has been recognised so far.
        unrecognised: forwards so far for which no batch in flight was found.
    """

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.most = _MOST
        self.recognised, self.unrecognised = False, 0
        self._batches: deque[IssuedBatch] = deque(maxlen=_MOST)
        self._last: IssuedBatch | None = None  # issued last, whether or not it has been trained on
        self._warned = False

    def __len__(self) -> int:
        return len(self._batches)

    def ids_of(self, k: int) -> IntArray | None:
        """Return the ids of the k-th batch in flight, (rows,) int64, in the order of their issue; None if there is none."""
        return self._batches[k].ids if k < len(self._batches) else None

    def issue(self, positions: torch.Tensor, ids: torch.Tensor, batch: Any) -> None:
        """Record a batch that goes to the user."""
        first = int(positions[0]) if len(positions) else -1
        end = first // self.geometry.micro + 1 if first >= 0 else 0
        if len(ids) and bool((ids < 0).any()) and not self._warned:
            self._warned = True
            log.warning(
                "collate_fn returned %d rows, not one a sample, and grace cannot tell which: such batches are not collected",
                len(ids),
            )
        issued = IssuedBatch.of(ids.numpy().copy(), end, batch)
        if self._last is not None:
            _ignore_shared(self._last, issued)
        self._last = issued
        self._batches.append(issued)

    def match(self, inputs: Any) -> IssuedBatch | None:
        """Return the batch in flight whose tensors (or views or copies of them) are among ``inputs``; None if there is none."""
        if not self._batches:
            return None
        found = self._by_memory(inputs) or self._by_contents(inputs)
        if found is None:
            self.unrecognised += 1
        else:
            self.recognised = True
        return found

    def _by_memory(self, inputs: Any) -> IssuedBatch | None:
        seen = {_address(t) for t in tensors_of(inputs)}
        return next((issued for issued in reversed(self._batches) if any(_address(t) in seen for t in issued.leaves)), None)

    def _by_contents(self, inputs: Any) -> IssuedBatch | None:
        """Find a batch that was copied: moved to a device, cut, or cast to another type.

        Tensors on a device are copied back to the CPU.
        """
        moved = [t for t in (t.detach().cpu() for t in tensors_of(inputs)) if _distinguishes(t)]
        for issued in reversed(self._batches):
            if any(_contains(a, b) and _distinguishes(a) for a in issued.leaves for b in moved):
                return issued
        return None

    def trained(self, issued: IssuedBatch) -> None:
        """Remove a batch that has been through a backward."""
        if issued in self._batches:
            self._batches.remove(issued)

    def pass_over(self, count: int) -> int:
        """Drop the ``count`` batches that were issued first; return how many there were."""
        dropped = min(count, len(self._batches))
        for _ in range(dropped):
            self._batches.popleft()
        return dropped

    def clear(self) -> None:
        """Drop every batch (after a checkpoint was loaded)."""
        self._batches.clear()
        self._last = None


def walk(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield (keys from the root, leaf) of everything in nested mappings, lists and tuples that is not one of these itself."""
    if isinstance(tree, (Mapping, list, tuple)):
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from walk(value, (*path, key))
    else:
        yield path, tree


def attention_of(inputs: Any, rows: int) -> torch.Tensor | None:
    """Return the (rows, T) attention mask among the arguments of a model, by its name; None if there is none of this form."""
    for path, leaf in walk(inputs):
        if path and path[-1] == "attention_mask" and isinstance(leaf, torch.Tensor) and leaf.dim() == 2 and len(leaf) == rows:
            return leaf.detach()
    return None


def leaf_version(leaf: Any) -> int:
    """Return the number of in-place changes of a tensor; 0 for anything else."""
    return int(leaf._version) if isinstance(leaf, torch.Tensor) and not leaf.is_inference() else 0


def tensors_of(tree: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors with at least one axis in nested lists, tuples and mappings."""
    if isinstance(tree, torch.Tensor):
        if tree.dim() > 0:
            yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_of(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from tensors_of(value)


def _ignore_shared(a: IssuedBatch, b: IssuedBatch) -> None:
    """Remove from two batches' leaves the memory that both have, such as a mask that is made once: it identifies neither.

    If they have nothing else, it is one buffer that is filled again, and it identifies the batch that was issued last.
    """
    shared = {_address(t) for t in a.leaves} & {_address(t) for t in b.leaves}
    if shared:
        for issued in (a, b):
            issued.leaves = [t for t in issued.leaves if _address(t) not in shared] or issued.leaves


def _distinguishes(t: torch.Tensor) -> bool:
    """Return whether a tensor's contents can distinguish batches.

    A mask cannot, nor a tensor that is the same in every row, as positions are.
    """
    if t.dtype == torch.bool or t.numel() == 0:
        return False
    rows = t.detach()
    if t.shape[0] > 1 and bool((rows == rows[:1]).all()):
        return False
    sample = rows.reshape(-1)[:4096]
    return bool(((sample != sample.min()) & (sample != sample.max())).any())  # more than two distinct values


def _contains(whole: torch.Tensor, part: torch.Tensor) -> bool:
    """Return whether ``part`` has the values of ``whole``, of most of its columns, or of a rank's share; both on the CPU."""
    if whole.is_floating_point() != part.is_floating_point():
        return False
    dtype = part.dtype if part.is_floating_point() else torch.int64
    whole, part = whole.to(dtype), part.to(dtype)
    if whole.numel() == part.numel():
        return torch.equal(whole.reshape(-1), part.reshape(-1))
    if whole.dim() != part.dim() or whole.dim() < 2 or len(whole) != len(part) or whole.shape[2:] != part.shape[2:]:
        return False
    width, spare = part.shape[1], whole.shape[1] - part.shape[1]
    if spare <= 0 or not width:
        return False
    # A share of the columns begins at a multiple of its length, or a few columns later.
    starts = range(spare + 1) if spare <= _CUT else (s for s in range(spare + 1) if s % width <= min(_CUT, width // 2))
    return any(torch.equal(whole[:, start : start + width], part) for start in starts)


def _address(t: torch.Tensor) -> tuple[str, int]:
    return str(t.device), t.untyped_storage().data_ptr()
