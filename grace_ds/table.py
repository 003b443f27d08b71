"""The table: what this rank remembers of the samples it owns, and its files in a checkpoint.

A table is a value: ``merge`` and ``keep`` return a new one, so that a refresh that fails half-way leaves the old table
as it was.  On disk it is cut by bucket (:mod:`grace_ds.buckets`), so any number of ranks can read what any other number
has written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from grace_ds.buckets import N_BUCKETS, bucket_of, buckets_of, owner_of
from grace_ds.errors import CheckpointError, DamagedState, DataError
from grace_ds.files import digest as digest_of
from grace_ds.files import write_atomic
from grace_ds.records import Array, IntArray, Rows

__all__ = ["N_BUCKETS", "Table", "bucket_of", "owner_of"]

SCHEMA = 1
_NAME = re.compile(r"rows-b(\d{4})-b(\d{4})\.safetensors")


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
        if (owner_of(self.ids, world) != rank).any():
            raise DataError(f"rank {rank} of {world} holds rows of samples that it does not own; gather them first")
        mine = buckets_of(rank, world)
        if not len(mine):
            return {}
        from safetensors.numpy import save

        columns = {f.name: np.ascontiguousarray(getattr(self.rows, f.name)) for f in fields(Rows)}
        data = save({**columns, "visits": self.visits, "schema": np.array([SCHEMA], np.int64)})
        name = f"rows-b{mine[0]:04d}-b{mine[-1]:04d}.safetensors"
        write_atomic(Path(directory) / name, data)
        return {name: digest_of(data)}

    @staticmethod
    def load(directory: str | os.PathLike[str], files: Mapping[str, str], rank: int, world: int, dim: int) -> Table:
        """Reads the buckets that ``rank`` of ``world`` owns, whatever the world size was that wrote them.

        Args:
            files: {file name: digest} of all ranks that took part in the save.
            dim: width of a sketch in this run.

        Raises:
            CheckpointError: a file is missing, changed, of another schema or width, or the files overlap or leave gaps.
        """
        mine = buckets_of(rank, world)
        parts = [Table.empty(dim)]
        for name, buckets in _ranges(files).items():
            if mine.start < buckets.stop and buckets.start < mine.stop:
                part = _read(Path(directory) / name, files[name], buckets, dim)
                parts.append(part._take(owner_of(part.ids, world) == rank))
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


def _ranges(files: Mapping[str, str]) -> dict[str, range]:
    """{file name: its buckets} in order; together they must be all buckets, once."""
    found = {}
    for name in files:
        match = _NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{name!r} is not a table file (rows-bXXXX-bYYYY.safetensors)")
        found[name] = range(int(match[1]), int(match[2]) + 1)
    ordered = dict(sorted(found.items(), key=lambda item: item[1].start))
    at = 0
    for name, buckets in ordered.items():
        if buckets.start != at or not len(buckets):
            what = "overlaps another file" if buckets.start < at else f"leaves buckets from {at} on to no file"
            raise CheckpointError(f"{name} {what}: the checkpoint is incomplete or mixed; load another one")
        at = buckets.stop
    if at != N_BUCKETS:
        raise CheckpointError(f"the table files hold {at} of {N_BUCKETS} buckets: the checkpoint is incomplete")
    return ordered


def _fits(column: Array, name: str, rows: int) -> bool:
    usual = np.empty(0, np.int32) if name == "visits" else getattr(Rows.empty(0), name)
    return column.dtype == usual.dtype and column.ndim == usual.ndim and len(column) == rows


def _read(path: Path, digest: str, buckets: range, dim: int) -> Table:
    """One file, verified: what is parsed is what was hashed."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        data = path.read_bytes()
    except OSError as error:
        raise DamagedState(f"{path} cannot be read: {error}; load another checkpoint") from error
    if digest_of(data) != digest:
        raise DamagedState(f"{path} has digest {digest_of(data)}, not {digest}: torn or changed; load another checkpoint")
    try:
        columns = load(data)
        schema, visits = int(columns.pop("schema")[0]), columns.pop("visits")
    except (SafetensorError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path} is not a table file ({error!r}); load another checkpoint") from error
    if schema != SCHEMA or set(columns) != {f.name for f in fields(Rows)}:
        raise CheckpointError(
            f"{path} has schema {schema} with columns {sorted(columns)}; this version reads {SCHEMA}; "
            "load it with the grace_ds that wrote it, or use another checkpoint"
        )
    rows = Rows(**columns)
    odd = [name for name, found in {**columns, "visits": visits}.items() if not _fits(found, name, len(rows))]
    if odd:
        raise CheckpointError(f"{path} has columns of another type or length: {', '.join(odd)}; load another checkpoint")
    if rows.sketch.shape[1] != dim:
        raise CheckpointError(
            f"{path} has sketches of width {rows.sketch.shape[1]}, this run harvest.dim={dim}; use the same in both"
        )
    where = bucket_of(rows.ids)
    if (np.diff(rows.ids) <= 0).any() or (where < buckets.start).any() or (where >= buckets.stop).any():
        raise CheckpointError(f"{path} repeats ids or holds ids of other buckets than its name says; load another checkpoint")
    return Table(rows, visits)
