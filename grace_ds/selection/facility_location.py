"""Run greedy, many choices at a time, for importance-weighted facility location on a sparse graph.

Maximises F(S) = Σ_i w_i max_{j in S} sim_ij (0 if no neighbour is chosen).  F is monotone and submodular, so greedy is
within 1 - 1/e of the optimum (Nemhauser, Wolsey, Fisher 1978).  An earlier gain bounds the current one from above, so that
few gains are computed again (lazy greedy, Minoux 1978).

The choices and their order are greedy's own, although whole arrays are processed.  A candidate's gain depends on the rows
that it covers better than what is chosen so far: its live rows.  If it comes first, by gain and then position, among all
candidates on each of its live rows, then greedy takes it before any of them.  So nothing changes its gain until then, and
taking it now is the same.  Several such candidates share no live row and do not affect one another.  Greedy's keys only
fall, so sorting the taken candidates by (gain, position) gives greedy's order.  Candidates are processed in bands of falling
gain: one that gains less than the band's lower end cannot come first on a row of one that gains more.

This holds to the last bit.  Gains are sums in the order of the edges.  Rounding keeps such sums monotone, and edges that are
not live are zeros and do not change them.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from grace_ds.records import Array, IntArray, Neighbours

Floats = npt.NDArray[np.float64]
BANDS = 6  # a band holds about one part in BANDS of the choices: wider bands waste gains, narrower ones need more calls
BAND_ROWS = 256  # minimum candidates of a band
SAMPLED = 8  # one bound in SAMPLED is read to find where a band should end
CHAIN = 512  # edges read per choice above which the rest of a band is taken one by one


@dataclass(frozen=True)
class Coverage:
    """Rows that candidate j covers: ``rows[start[j]:start[j + 1]]`` with similarities ``sim``; itself is included with 1."""

    start: IntArray
    rows: IntArray
    sim: Floats


def coverage(ids: IntArray, neighbours: Neighbours) -> Coverage:
    """Return the coverage by the k-NN graph over ``ids`` (n,) sorted, made symmetric by the larger similarity of both directions.

    Edges of similarity 0 or less, and to ids outside, cover nothing and are left out.
    """
    n, k = neighbours.ids.shape
    neighbour_ids = neighbours.ids.reshape(-1)
    other = np.minimum(np.searchsorted(ids, neighbour_ids), n - 1)
    row = np.repeat(np.arange(n, dtype=np.int64), k)
    sim = neighbours.similarity.reshape(-1)
    usable = (ids[other] == neighbour_ids) & (sim > 0) & (row != other)
    a, b, s = row[usable], other[usable], np.minimum(sim[usable], 1)
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
    """Return F of the candidates ``chosen`` (positions)."""
    best = np.zeros(len(weights))
    rows, sim, _ = _edges(coverage, np.asarray(chosen, np.int64))
    np.maximum.at(best, rows, sim)
    return float((best * weights).sum())


def lazy_greedy(coverage: Coverage, weights: Array, k: int, candidates: Array, first: IntArray) -> IntArray:
    """Return the positions of k candidates in the order in which greedy takes them; the lower position first for equal gains.

    Args:
        coverage: of n rows.
        weights: (n,) float64, not negative.
        k: number of choices, including ``first``.
        candidates: (n,) bool, which rows may be taken.
        first: positions that are taken before all others.
    """
    first = np.asarray(first, np.int64)
    state = _State.of(coverage, np.asarray(weights, np.float64), candidates, first)
    wanted = k - len(first)
    available = int(np.isfinite(state.bound).sum())
    while state.count < min(wanted, available):
        size = min(max(BAND_ROWS, wanted // BANDS), available - state.count)
        bar = _bar(state.bound, size)
        _band(state, np.flatnonzero(state.bound >= bar), bar)
    if state.count == 0:
        return first
    taken, gained = np.concatenate(state.taken), np.concatenate(state.gained)
    return np.concatenate([first, taken[np.lexsort((taken, -gained))[: max(wanted, 0)]]])


def _bar(bound: Floats, size: int) -> float:
    """Return a finite bound that about ``size`` candidates (at most all) reach; its exact value affects only speed."""
    sample = bound[::SAMPLED]
    rank = len(sample) - max(1, size * len(sample) // len(bound))
    bar = float(np.partition(sample, rank)[rank])
    if np.isfinite(bar):
        return bar
    return float(np.partition(bound, len(bound) - size)[len(bound) - size])  # few are left, none of them in the sample


@dataclass
class _State:
    """State of greedy between two bands.

    Attributes:
        best: (n,) float64, similarity of each row to what is taken.
        bound: (n,) float64, upper bound of a candidate's gain; -inf for rows that are taken or not candidates.
        top, owner: (n,) scratch of a round: the largest gain on a row and the candidate that has it.
        taken, gained: positions and their gains, one array per round; their order does not matter.
        count: number taken so far.
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
        """Build the state after ``first`` were taken."""
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
        """Record taken candidates; the caller has raised ``best``."""
        self.taken.append(positions)
        self.gained.append(gains)
        self.count += len(positions)
        self.bound[positions] = -np.inf


def _edges(coverage: Coverage, positions: IntArray) -> tuple[IntArray, Floats, IntArray]:
    """Return row, similarity and index into ``positions`` of every edge of these candidates, in order."""
    begin = coverage.start[positions]
    size = coverage.start[positions + 1] - begin
    edge = np.repeat(begin - (np.cumsum(size) - size), size)
    edge += np.arange(len(edge))
    return coverage.rows[edge], coverage.sim[edge], np.repeat(np.arange(len(positions), dtype=np.int64), size)


def _band(state: _State, members: IntArray, bar: float) -> None:
    """Take all members that greedy takes before gains fall below ``bar``.

    Args:
        state: changed in place.
        members: all candidates whose bound reaches ``bar``.
        bar: lower end of the band.
    """
    rows, sim, member = _edges(state.c, members)
    open_ = np.ones(len(members), bool)
    while True:
        rise = np.maximum(sim - state.best[rows], 0.0)
        gains = np.bincount(member, rise * state.weights[rows], len(members)).astype(np.float64, copy=False)
        below = open_ & (gains < bar)
        state.bound[members[below]] = gains[below]
        open_ &= ~below
        if not open_.any():
            return
        live = np.flatnonzero((rise > 0) & open_[member])  # most candidates have fallen below by now
        rows, sim, member = rows[live], sim[live], member[live]
        leads = _leaders(state, rows, member, gains, open_)
        led = leads[member]
        state.best[rows[led]] = sim[led]  # no row has two leaders
        state.take(members[leads], gains[leads])
        open_ &= ~leads
        if np.count_nonzero(leads) * CHAIN < len(rows):
            return _one_by_one(state, members[open_], gains[open_], bar)
        rows, sim, member = rows[~led], sim[~led], member[~led]


def _leaders(
    state: _State, rows: IntArray, member: IntArray, gains: Floats, open_: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Return which of the ``open_`` come first, by gain and then position, on each of their live rows."""
    gain = gains[member]
    state.top[rows] = -1.0
    np.maximum.at(state.top, rows, gain)
    ties = np.flatnonzero(gain == state.top[rows])[::-1]
    state.owner[rows[ties]] = member[ties]  # the last of several values for a row stays: that of the lowest position
    leads: npt.NDArray[np.bool_] = open_.copy()
    leads[member[state.owner[rows] != member]] = False
    return leads


def _one_by_one(state: _State, members: IntArray, bounds: Floats, bar: float) -> None:
    """Do the same with a heap, for members that depend on one another in long chains (equal gains along a path, say)."""
    heap = list(zip((-bounds).tolist(), members.tolist(), strict=True))
    heapq.heapify(heap)
    while heap:
        j = heap[0][1]
        part = slice(state.c.start[j], state.c.start[j + 1])
        rows, sim = state.c.rows[part], state.c.sim[part]
        best = state.best[rows]
        gain = float(np.cumsum(np.maximum(sim - best, 0.0) * state.weights[rows])[-1])  # in order, as bincount adds
        key = (-gain, j)
        if gain < bar:
            heapq.heappop(heap)
            state.bound[j] = gain
        elif len(heap) == 1 or key <= min(heap[1:3]):
            heapq.heappop(heap)
            state.best[rows] = np.maximum(best, sim)
            state.take(np.array([j]), np.array([gain]))
        else:
            heapq.heapreplace(heap, key)
