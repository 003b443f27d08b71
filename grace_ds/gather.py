"""Rows and values travel to the ranks that own their ids.

Rows are harvested wherever a sample was trained on, and kept where its bucket lives (:mod:`grace_ds.buckets`).
``gather_rows`` brings them home; ``fetch`` reads a value of any sample from its owner.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from grace_ds.buckets import owner_of
from grace_ds.comm.base import Comm
from grace_ds.errors import DataError
from grace_ds.records import Array, IntArray, Rows


@dataclass(frozen=True)
class Dropped:
    """Rows of this rank that were not sent to anyone.

    Attributes:
        out_of_range: id outside of the dataset: padding of an incomplete batch.
        not_finite: NaN or infinity in the sketch or its norm, as after an overflow of the loss scale.
    """

    out_of_range: int
    not_finite: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.out_of_range + self.not_finite


def gather_rows(comm: Comm, rows: Rows, n_dataset: int) -> tuple[Rows, Dropped]:
    """Sends each row to the owner of its id.  Collective.

    Args:
        rows: this rank's harvest, any order, with repeats and padding.
        n_dataset: samples in the dataset; other ids are dropped.

    Returns:
        The rows that this rank owns, from all ranks: sorted by id, repeats kept (of equal ids by step, and of equal
        steps by what the rows say, never by who harvested them); and what this rank has dropped.
    """
    inside = (rows.ids >= 0) & (rows.ids < n_dataset)
    finite = np.isfinite(rows.sketch).all(axis=1) & np.isfinite(rows.norm)
    dropped = Dropped(int((~inside).sum()), int((inside & ~finite).sum()))
    kept = np.flatnonzero(inside & finite)
    kind = _record(rows)
    packed = np.empty(len(kept), kind)
    for f in fields(Rows):
        packed[f.name] = getattr(rows, f.name)[kept]
    got = np.concatenate(comm.exchange(_by_owner(_flat(packed), owner_of(rows.ids[kept], comm.size), comm.size)[0]))
    back = got.reshape(-1).view(kind)
    # A sample that stands twice in a batch may come from two ranks with two rows (dropout), of which the table keeps the
    # last: which one that is must not depend on the number of ranks.
    back = back[np.lexsort([back[name] for name in ("align", "loss", "norm", "step", "ids")])]
    return Rows(**{f.name: np.ascontiguousarray(back[f.name]) for f in fields(Rows)}), dropped


def fetch(comm: Comm, ids_wanted: IntArray, ids_here: IntArray, values: Array, fill: float) -> Array:
    """Reads values of arbitrary samples from their owners.  Collective: two exchanges.

    Args:
        ids_wanted: (q,) int64, any order, with repeats; negative ids are padding and get ``fill``.
        ids_here: (n,) int64, sorted, unique; samples that this rank owns and has a value for.
        values: (n, ...) their values; dtype and trailing axes the same on all ranks.
        fill: value of samples that nobody has.

    Returns:
        (q, ...) in ``values``' dtype, aligned with ``ids_wanted``.

    Raises:
        DataError: ``ids_here`` is not sorted, not aligned with ``values``, or holds ids of another owner.
    """
    if len(ids_here) != len(values) or (np.diff(ids_here) <= 0).any():
        raise DataError(f"fetch needs sorted unique ids, a value each; got {len(ids_here)} ids, {len(values)} values")
    if (owner_of(ids_here, comm.size) != comm.rank).any():
        raise DataError(f"fetch: rank {comm.rank} of {comm.size} offers values of ids that it does not own")
    unique, place = np.unique(np.asarray(ids_wanted, np.int64), return_inverse=True)
    known = np.flatnonzero(unique >= 0)
    asked, order = _by_owner(unique[known], owner_of(unique[known], comm.size), comm.size)
    answers = [_look_up(ids, ids_here, values, fill) for ids in comm.exchange(asked)]
    out = np.full((len(unique), *values.shape[1:]), fill, values.dtype)
    out[known[order]] = np.concatenate(comm.exchange(answers))
    return np.asarray(out[place])


def _record(rows: Rows) -> np.dtype[np.void]:
    """One packed row: all columns of ``rows`` side by side."""
    columns = [(f.name, getattr(rows, f.name)) for f in fields(Rows)]
    return np.dtype([(name, column.dtype, column.shape[1:]) for name, column in columns])


def _flat(packed: Array) -> Array:
    """(n,) records as (n, bytes) uint8; the row width travels as a trailing axis, so unequal dims are caught."""
    return packed.view(np.uint8).reshape(len(packed), packed.dtype.itemsize)


def _by_owner(x: Array, owner: IntArray, world: int) -> tuple[list[Array], IntArray]:
    """Splits axis 0 of ``x`` by owner, order kept within each; also the positions in the new order."""
    order = np.argsort(owner, kind="stable")
    cuts = np.cumsum(np.bincount(owner, minlength=world))[:-1]
    return np.split(x[order], cuts), order


def _look_up(ids: IntArray, ids_here: IntArray, values: Array, fill: float) -> Array:
    out = np.full((len(ids), *values.shape[1:]), fill, values.dtype)
    if len(ids_here):
        at = np.minimum(np.searchsorted(ids_here, ids), len(ids_here) - 1)
        hit = ids_here[at] == ids
        out[hit] = values[at[hit]]
    return out
