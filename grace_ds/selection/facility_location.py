"""Greedy, many choices at a time, for importance-weighted facility location on a sparse graph.

Maximises F(S) = Σ_i w_i max_{j in S} sim_ij (0 where no neighbour is chosen).  F is monotone and submodular, so greedy is
within 1 - 1/e of the optimum (Nemhauser, Wolsey, Fisher 1978), and a gain computed earlier bounds today's from above, so
that few gains are computed anew (lazy greedy, Minoux 1978).

The choices and their order are greedy's own, though whole arrays are worked on.  A candidate's gain depends on the rows
that it covers better than what is chosen so far: its live rows.  If it comes first, by gain and then position, among all
candidates on each of its live rows, then greedy takes it before any of them; so nothing changes its gain until then, and
taking it now is the same.  Several such candidates share no live row and do not disturb one another.  Greedy's keys only
fall, so sorting what was taken by (gain, position) is greedy's order.  Candidates are looked at in bands of falling gain:
who gains less than the band's lower end cannot come first on a row of one who gains more.

This holds to the last bit: gains are sums in the order of the edges, which rounding leaves monotone and which edges that
are not live, being zeros, do not change.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from grace_ds.records import Array, IntArray, Neighbours

Floats = npt.NDArray[np.float64]
BANDS = 6  # a band holds about this part of the choices wanted: wider ones compute gains in vain, narrower ones calls
BAND_ROWS = 256  # but no fewer candidates
SAMPLED = 8  # of so many bounds one is looked at, to find where a band should end
CHAIN = 512  # edges looked at for one choice, above which the rest of a band is taken one by one


@dataclass(frozen=True)
class Coverage:
    """Who a candidate covers, by candidate: ``rows[start[j]:start[j + 1]]`` with ``sim`` beside it, itself with 1 included."""

    start: IntArray
    rows: IntArray
    sim: Floats


def coverage(ids: IntArray, neighbours: Neighbours) -> Coverage:
    """The k-NN graph over ``ids`` (n,) sorted, made symmetric (the larger similarity of both directions), by candidate.

    Edges of similarity 0 or less, and to ids outside, cover nothing and are left out.
    """
    n, k = neighbours.ids.shape
    named = neighbours.ids.reshape(-1)
    other = np.minimum(np.searchsorted(ids, named), n - 1)
    mine = np.repeat(np.arange(n, dtype=np.int64), k)
    sim = neighbours.similarity.reshape(-1)
    good = (ids[other] == named) & (sim > 0) & (mine != other)
    a, b, s = mine[good], other[good], np.minimum(sim[good], 1)
    own = np.arange(n, dtype=np.int64)
    bits = max(n - 1, 1).bit_length()
    key = np.concatenate([(a << bits) | b, (b << bits) | a, (own << bits) | own])
    order = np.argsort(key)
    key = key[order]
    value = np.concatenate([s, s, np.ones(n, s.dtype)])[order]
    first = np.flatnonzero(np.concatenate([np.ones(min(len(key), 1), bool), key[1:] != key[:-1]]))
    value = np.maximum.reduceat(value, first) if len(first) else value
    key = key[first]
    start = np.searchsorted(key, np.arange(n + 1, dtype=np.int64) << bits).astype(np.int64)
    return Coverage(start, key & ((1 << bits) - 1), value.astype(np.float64))


def objective(coverage: Coverage, weights: Array, chosen: IntArray) -> float:
    """F of the candidates ``chosen`` (positions)."""
    best = np.zeros(len(weights))
    rows, sim, _ = _edges(coverage, np.asarray(chosen, np.int64))
    np.maximum.at(best, rows, sim)
    return float((best * weights).sum())


def lazy_greedy(coverage: Coverage, weights: Array, k: int, candidates: Array, first: IntArray) -> IntArray:
    """Positions of k candidates in the order in which greedy takes them; of equal gains the lower position first.

    Args:
        coverage: of n rows.
        weights: (n,) float64, not negative.
        k: how many, those of ``first`` included.
        candidates: (n,) bool, who may be taken.
        first: positions that are taken before all others.
    """
    first = np.asarray(first, np.int64)
    state = _State.of(coverage, np.asarray(weights, np.float64), candidates, first)
    wanted = k - len(first)
    left = int(np.isfinite(state.bound).sum())
    while state.count < min(wanted, left):
        size = min(max(BAND_ROWS, wanted // BANDS), left - state.count)
        bar = _bar(state.bound, size)
        _band(state, np.flatnonzero(state.bound >= bar), bar)
    if state.count == 0:
        return first
    taken, gained = np.concatenate(state.taken), np.concatenate(state.gained)
    return np.concatenate([first, taken[np.lexsort((taken, -gained))[: max(wanted, 0)]]])


def _bar(bound: Floats, size: int) -> float:
    """A finite bound that about ``size`` candidates (no more than there are) reach; which one is a matter of speed alone."""
    sample = bound[::SAMPLED]
    rank = len(sample) - max(1, size * len(sample) // len(bound))
    bar = float(np.partition(sample, rank)[rank])
    if np.isfinite(bar):
        return bar
    return float(np.partition(bound, len(bound) - size)[len(bound) - size])  # few are left, and none in the sample


@dataclass
class _State:
    """What greedy knows between two bands.

    Attributes:
        best: (n,) float64, similarity of each row to what is taken.
        bound: (n,) float64, no less than a candidate's gain; -inf for who is taken or no candidate.
        top, owner: (n,) scratch of a round: the largest gain on a row and who has it.
        taken, gained: positions and their gains, a round's in one array; their order does not matter.
        count: how many were taken so far.
    """

    c: Coverage
    weights: Floats
    best: Floats
    bound: Floats
    top: Floats
    owner: IntArray
    taken: list[IntArray] = field(default_factory=list)
    gained: list[Floats] = field(default_factory=list)
    count: int = 0

    @staticmethod
    def of(coverage: Coverage, weights: Floats, candidates: Array, first: IntArray) -> _State:
        """After ``first`` were taken."""
        n = len(weights)
        best = np.zeros(n)
        rows, sim, _ = _edges(coverage, first)
        np.maximum.at(best, rows, sim)
        candidate = np.repeat(np.arange(n, dtype=np.int64), np.diff(coverage.start))
        gains = np.bincount(candidate, np.maximum(coverage.sim - best[coverage.rows], 0.0) * weights[coverage.rows], n)
        bound = np.where(candidates, gains, -np.inf)
        bound[first] = -np.inf
        return _State(coverage, weights, best, bound, np.empty(n), np.empty(n, np.int64))

    def take(self, positions: IntArray, gains: Floats) -> None:
        """Notes who was taken; the caller has raised ``best``."""
        self.taken.append(positions)
        self.gained.append(gains)
        self.count += len(positions)
        self.bound[positions] = -np.inf


def _edges(coverage: Coverage, positions: IntArray) -> tuple[IntArray, Floats, IntArray]:
    """Row, similarity and index into ``positions`` of every edge of these candidates, in order."""
    begin = coverage.start[positions]
    size = coverage.start[positions + 1] - begin
    at = np.repeat(begin - (np.cumsum(size) - size), size)
    at += np.arange(len(at))
    return coverage.rows[at], coverage.sim[at], np.repeat(np.arange(len(positions), dtype=np.int64), size)


def _band(state: _State, members: IntArray, bar: float) -> None:
    """Takes all that greedy takes of ``members`` (everybody whose bound reaches ``bar``) before gains fall below ``bar``."""
    rows, sim, who = _edges(state.c, members)
    open_ = np.ones(len(members), bool)
    while True:
        rise = np.maximum(sim - state.best[rows], 0.0)
        gains = np.bincount(who, rise * state.weights[rows], len(members)).astype(np.float64, copy=False)
        below = open_ & (gains < bar)
        state.bound[members[below]] = gains[below]
        open_ &= ~below
        if not open_.any():
            return
        here = np.flatnonzero((rise > 0) & open_[who])  # most candidates have fallen below by now
        rows, sim, who = rows[here], sim[here], who[here]
        leads = _leaders(state, rows, who, gains, open_)
        mine = leads[who]
        state.best[rows[mine]] = sim[mine]  # no row has two leaders
        state.take(members[leads], gains[leads])
        open_ &= ~leads
        if np.count_nonzero(leads) * CHAIN < len(rows):
            return _one_by_one(state, members[open_], gains[open_], bar)
        rows, sim, who = rows[~mine], sim[~mine], who[~mine]


def _leaders(state: _State, rows: IntArray, who: IntArray, gains: Floats, open_: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Who of the ``open_`` comes first, by gain and then position, on each of its live rows."""
    mine = gains[who]
    state.top[rows] = -1.0
    np.maximum.at(state.top, rows, mine)
    level = np.flatnonzero(mine == state.top[rows])[::-1]
    state.owner[rows[level]] = who[level]  # of several values for a row the last one stays: that of the lowest position
    leads: npt.NDArray[np.bool_] = open_.copy()
    leads[who[state.owner[rows] != who]] = False
    return leads


def _one_by_one(state: _State, members: IntArray, bounds: Floats, bar: float) -> None:
    """The same with a heap, for what depends on one another in long chains (equal gains along a path, say)."""
    heap = list(zip((-bounds).tolist(), members.tolist(), strict=True))
    heapq.heapify(heap)
    while heap:
        j = heap[0][1]
        part = slice(state.c.start[j], state.c.start[j + 1])
        rows, sim = state.c.rows[part], state.c.sim[part]
        best = state.best[rows]
        gain = float(np.cumsum(np.maximum(sim - best, 0.0) * state.weights[rows])[-1])  # in order, as bincount adds
        fresh = (-gain, j)
        if gain < bar:
            heapq.heappop(heap)
            state.bound[j] = gain
        elif len(heap) == 1 or fresh <= min(heap[1:3]):
            heapq.heappop(heap)
            state.best[rows] = np.maximum(best, sim)
            state.take(np.array([j]), np.array([gain]))
        else:
            heapq.heapreplace(heap, fresh)
