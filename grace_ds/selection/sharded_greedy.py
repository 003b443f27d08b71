"""Run the greedy of :mod:`grace_ds.selection.facility_location` where each rank holds only the samples that it owns.

The choices are those of one rank, to the last bit.  That module takes, at once, all candidates that come first on each of their
live rows.  Here a candidate's gain is computed by its owner, and who comes first on a row is decided by the row's owner, so a
round is a few exchanges of the edges that are still live; these shrink quickly.  Candidates that depend on one another in long
chains would take many rounds: once few edges are left, they go to one rank, which takes them one by one.

Row i of the objective covers, and is covered by, its neighbours and itself.  Each rank keeps the edges of its own candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from grace_ds.comm.base import Comm
from grace_ds.comm.buckets import owner_of, positions_of
from grace_ds.comm.statistics import by_lower_id, float_keys, float_of, kth_largest, top, total
from grace_ds.records import Array, IntArray, Neighbours
from grace_ds.selection import facility_location as one_rank
from grace_ds.selection.facility_location import BAND_ROWS, BANDS, CHAIN, Coverage, Floats

BLOCK = 1 << 22  # edges sent at once where all edges are
TAIL_EDGES = 1 << 21  # most edges that one rank takes over from all

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Members:
    """The chosen samples that this rank owns.

    Attributes:
        positions: (m,) int64, ascending, among this rank's samples.
        share: (m,) float64, the importance that each covers: of rows to which no other member is more similar.
    """

    positions: IntArray
    share: Floats


def sharded_greedy(
    comm: Comm, ids: IntArray, neighbours: Neighbours, weights: Floats, k: int, candidates: Mask, first: IntArray
) -> Members:
    """Choose k candidates of all ranks as :func:`~grace_ds.selection.facility_location.lazy_greedy` does.  Collective.

    Args:
        comm: of all ranks.
        ids: (n,) int64, sorted: the samples that this rank owns.
        neighbours: (n, k') their rows of the k-NN graph over the samples of all ranks.
        weights: (n,) float64, importance, not negative.
        k: choices over all ranks, including ``first``.
        candidates: (n,) bool, which samples may be taken.
        first: (f,) int64, ascending positions of this rank's samples that are taken before all others.
    """
    first = np.asarray(first, np.int64)
    edges = coverage_of(comm, ids, neighbours)
    state = _State(comm, ids, edges, weights, np.zeros(len(ids)), np.full(len(ids), -np.inf))
    state.cover(first)
    every = state.gains_of_all()
    state.bound[candidates] = every[candidates]
    state.bound[first] = -np.inf
    forced, available = total(comm, len(first), int(np.isfinite(state.bound).sum()))
    wanted, count = k - forced, 0
    while count < min(wanted, available):
        size = min(max(BAND_ROWS, wanted // BANDS), available - count)
        open_ = state.bound[np.isfinite(state.bound)]
        bar = float_of(kth_largest(comm, float_keys(open_), size)[0])
        _band(state, np.flatnonzero(state.bound >= bar), bar)
        (count,) = total(comm, state.count)
    taken = np.concatenate([first[:0], *state.taken])
    gained = np.concatenate([np.empty(0), *state.gained])
    among = top(comm, wanted, float_keys(gained), by_lower_id(ids[taken]))
    chosen = np.concatenate([first, taken[among]])
    order = np.argsort(chosen)
    gains = np.concatenate([np.full(len(first), np.inf), gained[among]])[order]
    return Members(chosen[order], state.shares(chosen[order], gains))


@dataclass
class _Link:
    """A list of samples (e,), with repeats, and the ranks that own them, to read values from these and to send values to them.

    Attributes:
        order: (e,) int64, the entries sorted by owner.
        counts: (ranks,) number of entries of each owner.
        asked: from each rank, the positions of the samples among those of this rank that are on its list; -1: not here.
    """

    comm: Comm
    order: IntArray
    counts: IntArray
    asked: list[IntArray]

    @staticmethod
    def of(comm: Comm, wanted: IntArray, ids_here: IntArray) -> _Link:
        """Return the link to the samples ``wanted`` (e,) of any rank.  Collective, as all methods are."""
        owner = owner_of(wanted, comm.size)
        order = np.argsort(owner, kind="stable")
        counts = np.bincount(owner, minlength=comm.size)
        received = comm.exchange(np.split(wanted[order], np.cumsum(counts)[:-1]))
        return _Link(comm, order, counts, [positions_of(ids, ids_here) for ids in received])

    def pull(self, values: Array) -> Array:
        """Return the values of the samples on the list, (e, ...); ``values`` (n, ...) are those of this rank's samples."""
        parts = self.comm.exchange([values[at] for at in self.asked])
        out = np.empty((len(self.order), *values.shape[1:]), values.dtype)
        out[self.order] = np.concatenate(parts)
        return out

    def push(self, values: Array) -> Array:
        """Send ``values`` (e, ...) to the owners; return what this rank receives, in the order of :attr:`here`."""
        parts = self.comm.exchange(np.split(values[self.order], np.cumsum(self.counts)[:-1]))
        return np.concatenate(parts)

    def answer(self, values: Array) -> Array:
        """Return to each rank this rank's answers ``values`` (h, ...), in the order of :attr:`here`: (e, ...)."""
        parts = self.comm.exchange(np.split(values, np.cumsum([len(at) for at in self.asked])[:-1]))
        out = np.empty((len(self.order), *values.shape[1:]), values.dtype)
        out[self.order] = np.concatenate(parts)
        return out

    @property
    def here(self) -> IntArray:
        """(h,) int64, the positions of this rank's samples that are on any rank's list."""
        return np.concatenate(self.asked)

    def keep(self, mask: Mask, there: Mask | None = None) -> _Link:
        """Return the link to the entries in ``mask`` (e,) alone.

        Args:
            there: the same of the entries of :attr:`here`, if this rank knows it already.
        """
        there = self.push(mask) if there is None else there
        parts = np.split(there, np.cumsum([len(at) for at in self.asked])[:-1])
        asked = [at[part] for at, part in zip(self.asked, parts, strict=True)]
        number, kept = np.cumsum(mask) - 1, mask[self.order]
        owner = np.repeat(np.arange(len(self.counts)), self.counts)
        return _Link(self.comm, number[self.order[kept]], np.bincount(owner[kept], minlength=len(self.counts)), asked)


def coverage_of(comm: Comm, ids: IntArray, neighbours: Neighbours) -> Coverage:
    """Return the rows that each of this rank's candidates covers, as :func:`~grace_ds.selection.facility_location.coverage`.

    Collective.  ``rows`` are ids, in rising order for each candidate.
    """
    n, k = neighbours.ids.shape
    row, other = np.repeat(np.arange(n, dtype=np.int64), k), neighbours.ids.reshape(-1)
    sim = neighbours.similarity.reshape(-1)
    usable = np.flatnonzero((sim > 0) & (other >= 0) & (other != ids[row]))
    row, other, sim = row[usable], other[usable], np.minimum(sim[usable], 1)
    link = _Link.of(comm, other, ids)
    known = link.answer(link.here >= 0)
    link = link.keep(known, link.here >= 0)
    row, other, sim = row[known], other[known], sim[known]
    own = np.arange(n, dtype=np.int64)
    at = np.concatenate([row, link.here, own])
    rows = np.concatenate([other, link.push(ids[row]), ids])
    value = np.concatenate([sim, link.push(sim), np.ones(n, sim.dtype)])
    order = np.lexsort((rows, at))
    at, rows, value = at[order], rows[order], value[order]
    new = np.ones(len(at), bool)
    new[1:] = (at[1:] != at[:-1]) | (rows[1:] != rows[:-1])
    begin = np.flatnonzero(new)
    value = np.maximum.reduceat(value, begin) if len(begin) else value
    return Coverage(np.searchsorted(at[begin], np.arange(n + 1)).astype(np.int64), rows[begin], value.astype(np.float64))


@dataclass
class _State:
    """State of greedy between two bands, of this rank's n samples.

    Attributes:
        ids: (n,) int64, sorted.
        edges: of this rank's candidates; ``rows`` are ids of any rank.
        weights: (n,) float64.
        best: (n,) float64, similarity of each row to what is taken.
        bound: (n,) float64, upper bound of a candidate's gain; -inf for those that are taken or may not be.
        taken, gained: positions and their gains, one array per round; their order does not matter.
        count: number of this rank's candidates that are taken.
    """

    comm: Comm
    ids: IntArray
    edges: Coverage
    weights: Floats
    best: Floats
    bound: Floats
    taken: list[IntArray] = field(default_factory=list)
    gained: list[Floats] = field(default_factory=list)
    count: int = 0

    def take(self, positions: IntArray, gains: Floats) -> None:
        """Record taken candidates; the caller has raised ``best``."""
        self.taken.append(positions)
        self.gained.append(gains)
        self.count += len(positions)
        self.bound[positions] = -np.inf

    def blocks(self, positions: IntArray) -> list[IntArray]:
        """Split ``positions`` into blocks of about :data:`BLOCK` edges: as many on every rank.  Collective."""
        size = self.edges.start[positions + 1] - self.edges.start[positions]
        number = np.cumsum(size) // BLOCK
        blocks = int(self.comm.allreduce(np.array([number.max(initial=0) + 1]), "max")[0])
        return [positions[number == block] for block in range(blocks)]

    def cover(self, positions: IntArray) -> None:
        """Raise ``best`` of all rows that these candidates of this rank cover.  Collective."""
        for block in self.blocks(positions):
            rows, sim, _ = one_rank._edges(self.edges, block)
            link = _Link.of(self.comm, rows, self.ids)
            np.maximum.at(self.best, link.here, link.push(sim))

    def gains_of_all(self) -> Floats:
        """Return the gains of all candidates of this rank, (n,).  Collective."""
        gains = np.empty(len(self.ids))
        for block in self.blocks(np.arange(len(self.ids))):
            rows, sim, member = one_rank._edges(self.edges, block)
            link = _Link.of(self.comm, rows, self.ids)
            best, weight = link.pull(np.stack([self.best, self.weights], 1)).T
            gains[block] = np.bincount(member, np.maximum(sim - best, 0.0) * weight, len(block))
        return gains

    def shares(self, chosen: IntArray, gains: Floats) -> Floats:
        """Return the importance of the rows that each of ``chosen`` covers best, (m,).  Collective.

        Of members that are equally similar to a row, the one that was taken first has it.

        Args:
            chosen: (m,) positions, ascending.
            gains: (m,) with which they were taken; infinite for those that were taken before all others.
        """
        n = len(self.ids)
        sim_at, gain_at, member_at = np.zeros(n), np.zeros(n), np.full(n, -1, np.int64)
        gain_of = np.zeros(n)
        gain_of[chosen] = gains
        for block in self.blocks(chosen):
            rows, sim, member = one_rank._edges(self.edges, block)
            link = _Link.of(self.comm, rows, self.ids)
            facts = link.push(np.stack([sim, gain_of[block[member]]], 1))
            here = np.concatenate([np.flatnonzero(member_at >= 0), link.here])
            held = here[: len(here) - len(facts)]
            sims, taken = (np.concatenate([old[held], facts[:, i]]) for i, old in enumerate((sim_at, gain_at)))
            members = np.concatenate([member_at[held], link.push(self.ids[block[member]])])
            order = np.lexsort((members, -taken, -sims, here))
            winner = order[np.flatnonzero(np.diff(here[order], prepend=-1))]
            sim_at[here[winner]], gain_at[here[winner]], member_at[here[winner]] = sims[winner], taken[winner], members[winner]
        covered = np.flatnonzero(member_at >= 0)
        link = _Link.of(self.comm, member_at[covered], self.ids)
        rows, weight = link.push(self.ids[covered]), link.push(self.weights[covered])
        order = np.argsort(rows)  # sums in the order of the ids, for any number of ranks
        return np.bincount(link.here[order], weight[order], n).astype(np.float64, copy=False)[chosen]


def _band(state: _State, members: IntArray, bar: float) -> None:
    """Take all members of all ranks that greedy takes before gains fall below ``bar``.  Collective.

    Args:
        state: changed in place.
        members: this rank's candidates whose bound reaches ``bar``.
        bar: lower end of the band.
    """
    rows, sim, member = one_rank._edges(state.edges, members)
    link = _Link.of(state.comm, rows, state.ids)
    weight = link.pull(state.weights)
    open_ = np.ones(len(members), bool)
    while True:
        rise = np.maximum(sim - link.pull(state.best), 0.0)
        gains = np.bincount(member, rise * weight, len(members)).astype(np.float64, copy=False)
        below = open_ & (gains < bar)
        state.bound[members[below]] = gains[below]
        open_ &= ~below
        live = (rise > 0) & open_[member]
        n_open, n_live = total(state.comm, int(open_.sum()), int(live.sum()))
        if not n_open:
            return
        link = link.keep(live)
        rows, sim, member, weight = rows[live], sim[live], member[live], weight[live]
        leads = open_.copy()
        leads[member[~_leading(state, link, gains[member], state.ids[members[member]])]] = False
        led = leads[member]
        raised = link.push(np.where(led, sim, 0.0))
        here = link.here
        np.maximum.at(state.best, here, raised)  # no row has two leaders
        state.take(members[leads], gains[leads])
        open_ &= ~leads
        link = link.keep(~led, raised == 0)
        rows, sim, member, weight = rows[~led], sim[~led], member[~led], weight[~led]
        n_leads, n_left = total(state.comm, int(leads.sum()), len(rows))
        if n_leads * CHAIN < n_live and n_left <= TAIL_EDGES:
            _on_one_rank(state, members, open_, gains, rows, sim, member, weight, link.pull(state.best), bar)
            return


def _leading(state: _State, link: _Link, gain: Floats, candidate: IntArray) -> Mask:
    """Return for each live edge whether its candidate comes first, by gain and then id, on its row: (e,).  Collective."""
    gains, candidates, here = link.push(gain), link.push(candidate), link.here
    highest = np.full(len(state.ids), -1.0)
    np.maximum.at(highest, here, gains)
    ties = gains == highest[here]
    winner = np.full(len(state.ids), np.iinfo(np.int64).max)
    np.minimum.at(winner, here[ties], candidates[ties])
    return link.answer(winner[here] == candidates)


def _on_one_rank(
    state: _State,
    members: IntArray,
    open_: Mask,
    gains: Floats,
    rows: IntArray,
    sim: Floats,
    member: IntArray,
    weight: Floats,
    best: Floats,
    bar: float,
) -> None:
    """Have rank 0 do the rest of a band one by one.  Collective.

    Args:
        members: as in :func:`_band`.
        open_, gains: (m,) of them: which are left, and upper bounds of their gains.
        rows, sim, member, weight, best: of each edge that is left.
    """
    comm, left = state.comm, np.flatnonzero(open_)
    kept = open_[member]
    facts = np.stack([sim, weight, best], 1)[kept]
    sent = [state.ids[members[left]], gains[left], state.ids[members[member[kept]]], rows[kept], facts]
    gathered = [comm.gather(array) for array in sent]
    taken, dropped = np.empty((2, 0), np.int64), np.empty(0, np.int64)
    gained, bounds = np.empty(0), np.empty(0)
    if comm.rank == 0:
        names, bound, of, edge_rows, edge_facts = (np.concatenate(part) for part in gathered if part is not None)
        order = np.argsort(names)
        names, bound = names[order], bound[order]
        order = np.lexsort((edge_rows, of))
        of, edge_rows, edge_facts = of[order], edge_rows[order], edge_facts[order]
        _, first, place = np.unique(edge_rows, return_index=True, return_inverse=True)
        start = np.searchsorted(of, np.append(names, np.iinfo(np.int64).max)).astype(np.int64)
        cover = Coverage(start, place.astype(np.int64), np.ascontiguousarray(edge_facts[:, 0]))
        part = one_rank._State(
            cover, edge_facts[first, 1], edge_facts[first, 2], np.full(len(names), np.nan), np.empty(0), np.empty(0, np.int64)
        )
        one_rank._one_by_one(part, np.arange(len(names)), bound, bar)
        took = np.concatenate([order[:0], *part.taken])
        fell = np.flatnonzero(part.bound < np.inf)
        fell = fell[~np.isin(fell, took)]
        taken, gained = names[took], np.concatenate([np.empty(0), *part.gained])
        dropped, bounds = names[fell], part.bound[fell]
    taken, gained, dropped, bounds = (comm.broadcast(array) for array in (taken, gained, dropped, bounds))
    mine = np.isin(taken, state.ids)
    positions = np.searchsorted(state.ids, taken[mine])
    state.cover(positions)
    state.take(positions, gained[mine])
    mine = np.isin(dropped, state.ids)
    state.bound[np.searchsorted(state.ids, dropped[mine])] = bounds[mine]
