"""Keep the latest measurements of the samples that this rank owns in a table, and store it in a checkpoint.

A table is immutable: ``merge`` and ``keep`` return a new one, so that a refresh that fails half-way leaves the old table as
it was.  On disk it is split by bucket (:mod:`grace_ds.comm.buckets`), so any number of ranks can read what any other number
has written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Generic

import numpy as np

from grace_ds.comm.buckets import N_BUCKETS, bucket_of, owner_of
from grace_ds.errors import CheckpointError, DataError
from grace_ds.records import Array, C, IntArray
from grace_ds.refresh.bucket_files import load_columns, save_columns

__all__ = ["N_BUCKETS", "Table", "bucket_of", "owner_of"]

SCHEMA = 4


@dataclass(frozen=True)
class Table(Generic[C]):
    """The latest measurement of each of this rank's samples.

    Attributes:
        rows: n rows sorted by id, unique.
    """

    rows: C

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def ids(self) -> IntArray:
        """(n,) int64, sorted, unique."""
        return self.rows.ids

    @property
    def last(self) -> IntArray:
        """(n,) int64, optimizer step of each sample's latest row."""
        return self.rows.step

    def merge(self, rows: C) -> Table[C]:
        """Return a table with ``rows`` (any order, repeats allowed) added: of each id the row with the latest step.

        At equal steps the row further back in ``rows`` wins, and any of ``rows`` wins over the one held so far.

        Raises:
            DataError: a column of ``rows`` has another width.
        """
        for f in fields(rows):
            come, here = getattr(rows, f.name).shape[1:], getattr(self.rows, f.name).shape[1:]
            if come != here:
                raise DataError(f"{rows.name} with {f.name} of width {come} do not fit a table of width {here}")
        if not len(rows):
            return self
        ids = np.concatenate([self.ids, rows.ids])
        order = np.lexsort((np.concatenate([self.last, rows.step]), ids))  # stable, so ties keep their positions
        first = np.flatnonzero(np.diff(ids[order], prepend=ids[order[0]] - 1))
        winners = order[np.append(first[1:], len(order)) - 1]
        merged = {f.name: _pick(getattr(self.rows, f.name), getattr(rows, f.name), winners) for f in fields(rows)}
        return Table(type(rows)(**merged))

    def keep(self, window_ids: IntArray) -> Table[C]:
        """Return a table without the samples outside of ``window_ids`` (any order)."""
        stays = np.isin(self.ids, window_ids)
        return self if stays.all() else Table(self.rows.take(stays))  # no second copy of all sketches if none is dropped

    def lookup(self, ids: IntArray) -> IntArray:
        """Return the position of each of ``ids`` in this table: (q,) int64, -1 if the table lacks it."""
        ids = np.asarray(ids, np.int64)
        if not len(self):
            return np.full(len(ids), -1, np.int64)
        position = np.minimum(np.searchsorted(self.ids, ids), len(self) - 1)
        return np.where(self.ids[position] == ids, position, -1).astype(np.int64)

    def save(self, directory: str | os.PathLike[str], rank: int, world: int) -> dict[str, str]:
        """Write this rank's buckets, atomically; files of another world size in ``directory`` stay untouched.

        Returns:
            {file name: digest}: at most one file, none if this rank owns no bucket.  The checkpoint's manifest needs the
            union over all ranks.
        """
        columns = {f.name: getattr(self.rows, f.name) for f in fields(self.rows)}
        return save_columns(directory, self.rows.name, SCHEMA, columns, rank, world)

    @staticmethod
    def load(directory: str | os.PathLike[str], files: Mapping[str, str], rank: int, world: int, empty: C) -> Table[C]:
        """Load the buckets that ``rank`` of ``world`` owns, whatever world size wrote them.

        Args:
            files: {file name: digest} of all ranks that took part in the save.
            empty: no rows, with the types and widths of this run.

        Raises:
            CheckpointError: a file is missing, changed, of another schema or width, or the files overlap or leave gaps.
        """
        names = tuple(f.name for f in fields(empty))
        parts = [empty]
        for path, columns in load_columns(directory, empty.name, SCHEMA, files, rank, world, names):
            parts.append(_parsed(path, columns, empty))
        whole = type(empty).concat(parts)
        return Table(whole.take(np.argsort(whole.ids)))


def _pick(old: Array, new: Array, index: IntArray) -> Array:
    """Return elements ``index`` of the concatenation of old and new, without concatenating them: sketches are large."""
    out = np.empty((len(index), *old.shape[1:]), old.dtype)
    is_new = index >= len(old)
    out[~is_new] = old[index[~is_new]]
    out[is_new] = new[index[is_new] - len(old)]
    return out


def _parsed(path: Path, columns: dict[str, Array], empty: C) -> C:
    """Return the rows of one file, checked to have the types and widths of this run."""
    expected = {name: getattr(empty, name) for name in columns}
    odd = [name for name, column in columns.items() if column.dtype != expected[name].dtype or column.ndim != expected[name].ndim]
    if odd:
        raise CheckpointError(f"{path} has columns of another type or length: {', '.join(odd)}; load another checkpoint")
    for name, column in columns.items():
        if column.shape[1:] != expected[name].shape[1:]:
            key = "collect.dim" if name == "sketch" else name
            raise CheckpointError(
                f"{path} has {name} of width {column.shape[1]}, this run {key}={expected[name].shape[1]}; use the same in both"
            )
    return type(empty)(**columns)
