"""The table: what this rank remembers of the samples it owns, and its files in a checkpoint.

A table is a value: ``merge`` and ``keep`` return a new one, so that a refresh that fails half-way leaves the old table
as it was.  On disk it is cut by bucket (:mod:`grace_ds.buckets`), so any number of ranks can read what any other number
has written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from grace_ds.bucket_files import load_columns, save_columns
from grace_ds.buckets import N_BUCKETS, bucket_of, owner_of
from grace_ds.errors import CheckpointError, DataError
from grace_ds.records import Array, IntArray, Rows

__all__ = ["N_BUCKETS", "Table", "bucket_of", "owner_of"]

SCHEMA = 2
PREFIX = "rows"


@dataclass(frozen=True)
class Table:
    """This rank's harvested rows.

    Attributes:
        rows: n rows sorted by id, unique; each the latest harvest of its sample.
        visits: (n,) int32, committed uses of the sample: every harvested row counts, repeats in one merge too.
    """

    rows: Rows
    visits: npt.NDArray[np.int32]

    @staticmethod
    def empty(dim: int) -> Table:
        """No rows, with sketches ``dim`` wide."""
        return Table(Rows.empty(dim), np.empty(0, np.int32))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def ids(self) -> IntArray:
        """(n,) int64, sorted, unique."""
        return self.rows.ids

    @property
    def last(self) -> IntArray:
        """(n,) int64, optimizer step of each sample's latest harvest."""
        return self.rows.step

    @property
    def dim(self) -> int:
        """Width of a sketch."""
        return int(self.rows.sketch.shape[1])

    def merge(self, rows: Rows) -> Table:
        """A table with ``rows`` (any order, repeats allowed) added: of each id the row with the latest step.

        At equal steps the row further back in ``rows`` wins, and any of ``rows`` over the one held so far.
        """
        if rows.sketch.shape[1:] != self.rows.sketch.shape[1:]:
            raise DataError(f"rows with sketches {rows.sketch.shape[1]} wide do not fit a table of width {self.dim}")
        if not len(rows):
            return self
        ids = np.concatenate([self.ids, rows.ids])
        order = np.lexsort((np.concatenate([self.last, rows.step]), ids))  # stable, so ties keep their positions
        first = np.flatnonzero(np.diff(ids[order], prepend=ids[order[0]] - 1))
        winners = order[np.append(first[1:], len(order)) - 1]
        uses = np.concatenate([self.visits, np.ones(len(rows), np.int32)])
        merged = {f.name: _pick(getattr(self.rows, f.name), getattr(rows, f.name), winners) for f in fields(Rows)}
        return Table(Rows(**merged), np.add.reduceat(uses[order], first, dtype=np.int32))

    def keep(self, window_ids: IntArray) -> Table:
        """A table without the samples outside of ``window_ids`` (any order)."""
        return self._take(np.isin(self.ids, window_ids))

    def lookup(self, ids: IntArray) -> IntArray:
        """Position of each of ``ids`` in this table: (q,) int64, -1 where it has none."""
        ids = np.asarray(ids, np.int64)
        if not len(self):
            return np.full(len(ids), -1, np.int64)
        at = np.minimum(np.searchsorted(self.ids, ids), len(self) - 1)
        return np.where(self.ids[at] == ids, at, -1).astype(np.int64)

    def save(self, directory: str | os.PathLike[str], rank: int, world: int) -> dict[str, str]:
        """Writes this rank's buckets, atomically; files of another world size in ``directory`` stay untouched.

        Returns:
            {file name: digest}: at most one file, none where this rank owns no bucket.  The checkpoint's manifest needs
            the union over all ranks.
        """
        columns = {f.name: getattr(self.rows, f.name) for f in fields(Rows)}
        return save_columns(directory, PREFIX, SCHEMA, {**columns, "visits": self.visits}, rank, world)

    @staticmethod
    def load(directory: str | os.PathLike[str], files: Mapping[str, str], rank: int, world: int, dim: int) -> Table:
        """Reads the buckets that ``rank`` of ``world`` owns, whatever the world size was that wrote them.

        Args:
            files: {file name: digest} of all ranks that took part in the save.
            dim: width of a sketch in this run.

        Raises:
            CheckpointError: a file is missing, changed, of another schema or width, or the files overlap or leave gaps.
        """
        names = (*(f.name for f in fields(Rows)), "visits")
        parts = [Table.empty(dim)]
        for path, columns in load_columns(directory, PREFIX, SCHEMA, files, rank, world, names):
            parts.append(_parsed(path, columns, dim))
        whole = Table(Rows.concat([p.rows for p in parts]), np.concatenate([p.visits for p in parts]))
        return whole._take(np.argsort(whole.ids))

    def _take(self, index: Array) -> Table:
        return Table(self.rows.take(index), self.visits[index])


def _pick(old: Array, new: Array, index: IntArray) -> Array:
    """Elements ``index`` of old and new joined, without joining them: sketches are large."""
    out = np.empty((len(index), *old.shape[1:]), old.dtype)
    is_new = index >= len(old)
    out[~is_new] = old[index[~is_new]]
    out[is_new] = new[index[is_new] - len(old)]
    return out


def _parsed(path: Path, columns: dict[str, Array], dim: int) -> Table:
    """The rows of one file, of the types and widths that this run has."""
    usual = {**vars(Rows.empty(dim)), "visits": np.empty(0, np.int32)}
    odd = [n for n, found in columns.items() if found.dtype != usual[n].dtype or found.ndim != usual[n].ndim]
    if odd:
        raise CheckpointError(f"{path} has columns of another type or length: {', '.join(odd)}; load another checkpoint")
    if columns["sketch"].shape[1] != dim:
        raise CheckpointError(
            f"{path} has sketches of width {columns['sketch'].shape[1]}, this run harvest.dim={dim}; use the same in both"
        )
    visits = columns.pop("visits")
    return Table(Rows(**columns), visits)
