"""Rows and values travel to the ranks that own their ids.

Rows are collected wherever a sample was trained on, and kept where its bucket lives (:mod:`grace_ds.comm.buckets`).
``gather_rows`` brings them home; a :class:`Route` reads values of any samples from their owners.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.comm.buckets import owner_of
from grace_ds.errors import DataError
from grace_ds.records import Array, C, Columns, IntArray


@dataclass(frozen=True)
class Sent:
    """What this rank has sent, and which of its rows it has dropped.

    Attributes:
        bytes: handed to the exchange, those that stay on this rank included.
        out_of_range: id outside of the dataset: padding of an incomplete batch.
        not_finite: NaN or infinity in what they tell, as after an overflow of the loss scale.
    """

    bytes: int
    out_of_range: int
    not_finite: int


def gather_rows(comm: Comm, rows: C, n_dataset: int) -> tuple[C, Sent]:
    """Sends each row to the owner of its id.  Collective.

    Args:
        rows: of this rank, any order, with repeats and padding.
        n_dataset: samples in the dataset; other ids are dropped.

    Returns:
        The rows that this rank owns, from all ranks: sorted by id, repeats kept (of equal ids by step, and of equal
        steps by what the rows say, never by who has sent them); and what this rank has sent and dropped.
    """
    inside = (rows.ids >= 0) & (rows.ids < n_dataset)
    finite = rows.finite()
    kept = np.flatnonzero(inside & finite)
    kind = _record(rows)
    packed = np.empty(len(kept), kind)
    for f in fields(rows):
        packed[f.name] = getattr(rows, f.name)[kept]
    got = np.concatenate(comm.exchange(_by_owner(_flat(packed), owner_of(rows.ids[kept], comm.size), comm.size)[0]))
    back = got.reshape(-1).view(kind)
    # A sample that stands twice in a batch may come from two ranks with two rows (dropout), of which the table keeps the
    # last: which one that is must not depend on the number of ranks.
    scalars = sorted(f.name for f in fields(rows) if f.name not in ("ids", "step") and back[f.name].ndim == 1)
    back = back[np.lexsort([back[name] for name in (*scalars, "step", "ids")])]
    sent = Sent(packed.nbytes, int((~inside).sum()), int((inside & ~finite).sum()))
    return type(rows)(**{f.name: np.ascontiguousarray(back[f.name]) for f in fields(rows)}), sent


@dataclass(frozen=True)
class Route:
    """How values of some samples are read from their owners: worked out once, used as often as the values change.

    Attributes:
        place: (q,) int32 or int64, where each wanted sample stands in what :meth:`exchange` returns.
        comm: between the ranks.
        asked: of each rank, positions among this rank's samples that it wants; -1 for one that is not here.
        order: (u,) int64, of the answers in rank order, their places.
    """

    comm: Comm
    place: Array
    asked: list[IntArray]
    order: IntArray

    @staticmethod
    def of(comm: Comm, ids_wanted: IntArray, ids_here: IntArray) -> Route:
        """Collective: one exchange.

        Args:
            ids_wanted: (q,) int64, any order, with repeats; negative ids are padding.
            ids_here: (n,) int64, sorted, unique; samples that this rank owns and has values for.

        Raises:
            DataError: ``ids_here`` is not sorted, or holds ids of another owner.
        """
        if (np.diff(ids_here) <= 0).any():
            raise DataError(f"a route needs sorted unique ids; got {len(ids_here)} ids in another order")
        if (owner_of(ids_here, comm.size) != comm.rank).any():
            raise DataError(f"rank {comm.rank} of {comm.size} offers values of ids that it does not own")
        wanted = np.asarray(ids_wanted, np.int64)
        known, place = _distinct(wanted)
        parts, order = _by_owner(known, owner_of(known, comm.size), comm.size)
        asked = [_positions(ids, ids_here) for ids in comm.exchange(parts)]
        return Route(comm, place, asked, order)

    def exchange(self, values: Array, fill: float = 0.0) -> Array:
        """The values of the wanted samples, each once, and a last row of ``fill``.  Collective: one exchange.

        Args:
            values: (n, ...) of this rank's samples; dtype and trailing axes the same on all ranks.
            fill: of samples that nobody has.

        Returns:
            (u + 1, ...) in ``values``' dtype, to be read at :attr:`place`.
        """
        answers = [_taken(values, at, fill) for at in self.asked]
        out = np.full((len(self.order) + 1, *values.shape[1:]), fill, values.dtype)
        start = 0
        for part in self.comm.exchange(answers):
            out[self.order[start : start + len(part)]] = part
            start += len(part)
        return out


def _record(rows: Columns) -> np.dtype[np.void]:
    """One packed row: all columns of ``rows`` side by side."""
    columns = [(f.name, getattr(rows, f.name)) for f in fields(rows)]
    return np.dtype([(name, column.dtype, column.shape[1:]) for name, column in columns])


def _flat(packed: Array) -> Array:
    """(n,) records as (n, bytes) uint8; the row width travels as a trailing axis, so unequal dims are caught."""
    return packed.view(np.uint8).reshape(len(packed), packed.dtype.itemsize)


def _by_owner(x: Array, owner: IntArray, world: int) -> tuple[list[Array], IntArray]:
    """Splits axis 0 of ``x`` by owner, order kept within each; also the positions in the new order."""
    order = np.argsort(owner, kind="stable")
    cuts = np.cumsum(np.bincount(owner, minlength=world))[:-1]
    return np.split(x[order], cuts), order


def _distinct(wanted: IntArray) -> tuple[IntArray, Array]:
    """(u,) int64, the ids of ``wanted`` (q,), sorted, each once, without padding; (q,) where each stands there, u at padding."""
    span = int(wanted.max(initial=-1)) + 1
    if span <= min(len(wanted), 2**31 - 2) and wanted.min(initial=0) >= -1:  # some ten times faster than sorting, and no larger
        there = np.zeros(span + 1, bool)
        there[wanted] = True
        there[-1] = False  # which no id has: where padding looks
        known = np.flatnonzero(there)
        number = np.cumsum(there, dtype=np.int32)
        number[:-1] -= 1
        return known, number[wanted]
    unique = np.unique(wanted)
    place: IntArray = np.searchsorted(unique, wanted)  # less memory than np.unique's own inverse
    padding = int(np.searchsorted(unique, 0))  # at most one entry is left after these: all of them become the last row
    place -= padding
    known = unique[padding:]
    place[place < 0] = len(known)
    return known, place


def _positions(ids: IntArray, ids_here: IntArray) -> IntArray:
    """(q,) int64, where each of ``ids`` stands in ``ids_here``; -1 where it does not."""
    if not len(ids_here):
        return np.full(len(ids), -1, np.int64)
    at = np.minimum(np.searchsorted(ids_here, ids), len(ids_here) - 1)
    return np.where(ids_here[at] == ids, at, -1).astype(np.int64)


def _taken(values: Array, at: IntArray, fill: float) -> Array:
    out = np.full((len(at), *values.shape[1:]), fill, values.dtype)
    hit = at >= 0
    out[hit] = values[at[hit]]
    return out
