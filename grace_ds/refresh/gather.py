"""Exchange rows and values with the ranks that own their ids.

A row is collected on the rank that trained on the sample, and kept on the rank that owns the sample's bucket
(:mod:`grace_ds.comm.buckets`).  ``gather_rows`` sends rows to their owners; a :class:`Route` reads values from the owners.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.comm.buckets import owner_of, positions_of
from grace_ds.errors import DataError
from grace_ds.records import Array, C, Columns, IntArray


@dataclass(frozen=True)
class Sent:
    """What this rank has sent, and how many of its rows it has dropped.

    Attributes:
        bytes: passed to the exchange, those that stay on this rank included.
        out_of_range: rows with an id outside of the dataset: padding of an incomplete batch.
        not_finite: rows with NaN or infinity among their values, as after an overflow of the loss scale.
    """

    bytes: int
    out_of_range: int
    not_finite: int


def gather_rows(comm: Comm, rows: C, n_dataset: int) -> tuple[C, Sent]:
    """Send each row to the owner of its id, and return the rows that this rank owns.  Collective.

    Args:
        rows: of this rank, in any order, with repeats and padding.
        n_dataset: samples in the dataset; rows with other ids are dropped.

    Returns:
        The rows that this rank owns, from all ranks, sorted by id; and what this rank has sent and dropped.  Repeats are
        kept: rows of equal ids are sorted by step, and those of equal steps by their values, never by their sender.
    """
    inside = (rows.ids >= 0) & (rows.ids < n_dataset)
    finite = rows.finite()
    kept = np.flatnonzero(inside & finite)
    kind = _record(rows)
    packed = np.empty(len(kept), kind)
    for f in fields(rows):
        packed[f.name] = getattr(rows, f.name)[kept]
    received = np.concatenate(comm.exchange(_by_owner(_flat(packed), owner_of(rows.ids[kept], comm.size), comm.size)[0]))
    unpacked = received.reshape(-1).view(kind)
    # A sample that occurs twice in a batch may come from two ranks with two different rows (dropout).  The table keeps the
    # last one, and which one that is must not depend on the number of ranks.
    scalars = sorted(f.name for f in fields(rows) if f.name not in ("ids", "step") and unpacked[f.name].ndim == 1)
    unpacked = unpacked[np.lexsort([unpacked[name] for name in (*scalars, "step", "ids")])]
    sent = Sent(packed.nbytes, int((~inside).sum()), int((inside & ~finite).sum()))
    return type(rows)(**{f.name: np.ascontiguousarray(unpacked[f.name]) for f in fields(rows)}), sent


@dataclass(frozen=True)
class Route:
    """How values of some samples are read from their owners: computed once, used as often as the values change.

    Attributes:
        place: (q,) int32 or int64, row of each wanted sample in the result of :meth:`exchange`.
        comm: transport between the ranks.
        asked: for each rank, positions among this rank's samples that it wants; -1 for a sample that is not here.
        order: (u,) int64, row of each answer in the result of :meth:`exchange`; the answers are in rank order.
    """

    comm: Comm
    place: Array
    asked: list[IntArray]
    order: IntArray

    @staticmethod
    def of(comm: Comm, ids_wanted: IntArray, ids_here: IntArray) -> Route:
        """Return the route to ``ids_wanted``.  Collective: one exchange.

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
        asked = [positions_of(ids, ids_here) for ids in comm.exchange(parts)]
        return Route(comm, place, asked, order)

    def exchange(self, values: Array, fill: float = 0.0) -> Array:
        """Return the values of the wanted samples, each once, and a last row of ``fill``.  Collective: one exchange.

        Args:
            values: (n, ...) of this rank's samples; dtype and trailing axes the same on all ranks.
            fill: value of samples that no rank has.

        Returns:
            (u + 1, ...) in ``values``' dtype, to be indexed by :attr:`place`.
        """
        answers = [_taken(values, position, fill) for position in self.asked]
        out = np.full((len(self.order) + 1, *values.shape[1:]), fill, values.dtype)
        start = 0
        for part in self.comm.exchange(answers):
            out[self.order[start : start + len(part)]] = part
            start += len(part)
        return out


def _record(rows: Columns) -> np.dtype[np.void]:
    """Return the dtype of one packed row: all columns of ``rows`` side by side."""
    columns = [(f.name, getattr(rows, f.name)) for f in fields(rows)]
    return np.dtype([(name, column.dtype, column.shape[1:]) for name, column in columns])


def _flat(packed: Array) -> Array:
    """Return (n,) records as (n, bytes) uint8; the row width is a trailing axis, so unequal widths are detected."""
    return packed.view(np.uint8).reshape(len(packed), packed.dtype.itemsize)


def _by_owner(array: Array, owner: IntArray, world: int) -> tuple[list[Array], IntArray]:
    """Split axis 0 of ``array`` by owner, order kept within each; also return the positions in the new order."""
    order = np.argsort(owner, kind="stable")
    cuts = np.cumsum(np.bincount(owner, minlength=world))[:-1]
    return np.split(array[order], cuts), order


def _distinct(wanted: IntArray) -> tuple[IntArray, Array]:
    """Return the distinct ids of ``wanted`` and the position of each of its entries among them.

    Args:
        wanted: (q,) int64, any order, with repeats; negative ids are padding.

    Returns:
        (u,) int64, sorted, each id once, without padding; and (q,) int32 or int64 positions, u at padding.
    """
    span = int(wanted.max(initial=-1)) + 1
    if span <= min(len(wanted), 2**31 - 2) and wanted.min(initial=0) >= -1:  # some ten times faster than sorting, and no larger
        present = np.zeros(span + 1, bool)
        present[wanted] = True
        present[-1] = False  # the entry that padding (-1) refers to; no id has it
        known = np.flatnonzero(present)
        number = np.cumsum(present, dtype=np.int32)
        number[:-1] -= 1
        return known, number[wanted]
    unique = np.unique(wanted)
    place: IntArray = np.searchsorted(unique, wanted)  # less memory than np.unique's own inverse
    padding = int(np.searchsorted(unique, 0))  # number of distinct negative ids: all of them refer to the last row
    place -= padding
    known = unique[padding:]
    place[place < 0] = len(known)
    return known, place


def _taken(values: Array, position: IntArray, fill: float) -> Array:
    out = np.full((len(position), *values.shape[1:]), fill, values.dtype)
    hit = position >= 0
    out[hit] = values[position[hit]]
    return out
