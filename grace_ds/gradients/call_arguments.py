"""Describe where an argument of the job's model call comes from: an entry of the batch, a part of one, or a constant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from grace_ds.errors import DataError

Path = tuple[Any, ...]
Bounds = tuple[int | None, int | None]
_FEW = 8  # start positions tried for a copied cut, besides the first and the last
_SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Cut:
    """A tensor of the batch, or a slice of it.

    Attributes:
        path: keys that lead from the batch to the tensor.
        axes: bounds of the slice, one pair per axis.
        dtype: the type that the part is cast to.
    """

    path: Path
    axes: tuple[Bounds, ...]
    dtype: torch.dtype

    def of(self, batch: Any) -> torch.Tensor:
        """Return the same part of another batch."""
        tensor = _at(batch, self.path)
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != len(self.axes):
            shape = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise DataError(
                f"entry {name_of(self.path)} of a probed batch is {shape}, {len(self.axes)} axes are needed as in the "
                "job's; give trusted items the form of the job's own"
            )
        return tensor[tuple(slice(*bounds) for bounds in self.axes)].to(self.dtype)


@dataclass(frozen=True)
class Node:
    """An object at ``path`` of the batch that is not a tensor: a container, a string, a number."""

    path: Path

    def of(self, batch: Any) -> Any:
        """Return the object at the same path of another batch."""
        return _at(batch, self.path)


@dataclass(frozen=True, eq=False)
class Constant:
    """A value that is the same in every call, independent of the batch."""

    value: Any

    def of(self, batch: Any) -> Any:
        """Return the value."""
        return self.value


@dataclass(frozen=True, eq=False)
class Rows:
    """A tensor whose rows all equal ``row``: either an entry of the batch, or one that the job makes for any batch."""

    row: torch.Tensor
    like: Cut

    def of(self, batch: Any) -> torch.Tensor:
        """Return ``row`` repeated for each row of the batch entry that ``like`` names."""
        return self.row.expand(len(self.like.of(batch)), *self.row.shape)


Source = Cut | Node | Constant | Rows


def views(x: torch.Tensor, entry: torch.Tensor, path: Path) -> Iterator[Cut]:
    """Yield the cuts of ``entry`` whose memory ``x`` occupies."""
    if x is entry:
        yield Cut(path, ((None, None),) * x.dim(), x.dtype)
        return
    plain = x.layout == entry.layout == torch.strided and x.dtype == entry.dtype and x.device == entry.device
    if not plain or x.dim() != entry.dim() or not x.dim() or not x.numel() or memory_of(x) != memory_of(entry):
        return
    offset, starts = x.storage_offset() - entry.storage_offset(), [0] * x.dim()
    for axis in sorted(range(x.dim()), key=entry.stride().__getitem__, reverse=True):
        if entry.stride(axis) > 0 and offset >= 0:
            starts[axis] = min(offset // entry.stride(axis), entry.shape[axis] - 1)
            offset -= starts[axis] * entry.stride(axis)
    lengths = list(x.shape)
    if offset or any(s + n > size for s, n, size in zip(starts, lengths, entry.shape, strict=True)):
        return
    same = entry[tuple(slice(s, s + n) for s, n in zip(starts, lengths, strict=True))]
    if same.shape[0] == entry.shape[0] and (same.storage_offset(), same.stride()) == (x.storage_offset(), x.stride()):
        yield from _forms(path, starts, lengths, entry.shape, x.dtype)


def copies(x: torch.Tensor, entry: torch.Tensor, path: Path) -> Iterator[Cut]:
    """Yield the cuts of ``entry``, along one axis at most, that equal ``x`` in value after a cast to its type."""
    if x.dim() != entry.dim() or x.layout != torch.strided or entry.layout != torch.strided:
        return
    if x.dim() and x.shape[0] != entry.shape[0]:
        return
    shorter = [axis for axis in range(x.dim()) if x.shape[axis] != entry.shape[axis]]
    if len(shorter) > 1 or any(x.shape[axis] > entry.shape[axis] for axis in shorter):
        return
    slack = entry.shape[shorter[0]] - x.shape[shorter[0]] if shorter else 0
    # Of a sequence that is shared out over ranks, this one's part may begin at a multiple of its length, or one token later.
    parts = [start + shift for start in range(0, slack, x.shape[shorter[0]]) for shift in (0, 1)] if shorter and slack else []
    for start in sorted({*range(min(slack, _FEW) + 1), *(start for start in parts if start <= slack), slack}):
        starts = [start if axis in shorter else 0 for axis in range(x.dim())]
        part = entry[tuple(slice(s, s + n) for s, n in zip(starts, x.shape, strict=True))]
        if equal(part, x):
            yield from _forms(path, starts, list(x.shape), entry.shape, x.dtype)


def _forms(path: Path, starts: list[int], lengths: list[int], sizes: torch.Size, dtype: torch.dtype) -> Iterator[Cut]:
    """Yield the slices the job may have written for this part: bounds from the end, from the start, or the last few."""
    forms: dict[tuple[Bounds, ...], None] = {}
    for which in range(3):
        axes: list[Bounds] = []
        for start, length, size in zip(starts, lengths, sizes, strict=True):
            end = start + length - size or None
            whole = not start and end is None
            axes.append((None, None) if whole else ((start, end), (start, start + length), (start - size, end))[which])
        forms[tuple(axes)] = None
    for form in forms:
        yield Cut(path, form, dtype)


def fits(source: Source, other: Source) -> bool:
    """Return whether the sources of two calls agree."""
    if isinstance(source, Cut | Node):
        return source == other
    if isinstance(source, Rows):
        return isinstance(other, Rows) and equal(source.row, other.row)
    return isinstance(other, Constant) and alike(source.value, other.value)


def describe(source: Source) -> str:
    """Describe a source in words; a cut as Python writes it."""
    if not isinstance(source, Cut | Node):
        return "a constant"
    bounds = source.axes if isinstance(source, Cut) and not is_whole(source) else ()
    cut = ", ".join(":".join("" if bound is None else str(bound) for bound in axis) for axis in bounds)
    return f"entry {name_of(source.path)}" + (f"[{cut}]" if cut else "")


def is_whole(source: Cut | Node) -> bool:
    """Return whether the source is a whole entry, with nothing cut off."""
    return isinstance(source, Node) or all(bounds == (None, None) for bounds in source.axes)


def _at(batch: Any, path: Path) -> Any:
    for i, key in enumerate(path):
        try:
            batch = batch[key]
        except (KeyError, IndexError, TypeError) as error:
            raise DataError(
                f"a probed batch has no entry {name_of(path[: i + 1])}, which the job's call takes; give trusted items the "
                "entries of the job's own"
            ) from error
    return batch


def name_of(path: Path) -> str:
    """Return a path in words."""
    return ".".join(map(str, path)) or "(the batch)"


def memory_of(x: torch.Tensor) -> tuple[str, int]:
    """Return an identifier of the memory that a tensor uses; views of one tensor share it."""
    return (str(x.device), x.untyped_storage().data_ptr()) if x.layout == torch.strided else ("", id(x))


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors have the same values, the first cast to the type of the second."""
    return a.shape == b.shape and torch.equal(a.detach().to(b.device, b.dtype), b.detach())


def alike(a: Any, b: Any) -> bool:
    """Return whether two values are equal: the same object, or equal tensors or plain values of one type."""
    if a is b:
        return True
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and equal(a, b)
    return type(a) is type(b) and isinstance(a, _SCALARS) and bool(a == b)
