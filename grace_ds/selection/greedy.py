"""Lazy greedy for importance-weighted facility location on a sparse graph.

Maximises F(S) = Σ_i w_i max_{j in S} sim_ij (0 where no neighbour is chosen).  F is monotone and submodular, so a gain
computed earlier bounds today's from above: only the top of a heap is ever computed anew, and the result is greedy's own,
within 1 - 1/e of the optimum (Minoux 1978; Nemhauser, Wolsey, Fisher 1978).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from grace_ds.records import Array, IntArray, Neighbours

Floats = npt.NDArray[np.float64]


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
    other = np.searchsorted(ids, neighbours.ids.reshape(-1))
    other = np.minimum(other, n - 1)
    mine = np.repeat(np.arange(n, dtype=np.int64), k)
    sim = neighbours.similarity.reshape(-1).astype(np.float64)
    good = (ids[other] == neighbours.ids.reshape(-1)) & (sim > 0) & (mine != other)
    a, b, s = mine[good], other[good], np.minimum(sim[good], 1.0)
    own = np.arange(n, dtype=np.int64)
    candidate = np.concatenate([a, b, own])
    covered = np.concatenate([b, a, own])
    value = np.concatenate([s, s, np.ones(n)])
    order = np.lexsort((-value, covered, candidate))
    candidate, covered, value = candidate[order], covered[order], value[order]
    first = np.ones(len(order), bool)
    first[1:] = (candidate[1:] != candidate[:-1]) | (covered[1:] != covered[:-1])
    candidate, covered, value = candidate[first], covered[first], value[first]
    return Coverage(np.searchsorted(candidate, np.arange(n + 1)).astype(np.int64), covered, value)


def objective(c: Coverage, weights: Array, chosen: IntArray) -> float:
    """F of the candidates ``chosen`` (positions)."""
    best = np.zeros(len(weights))
    for j in chosen:
        part = slice(c.start[j], c.start[j + 1])
        best[c.rows[part]] = np.maximum(best[c.rows[part]], c.sim[part])
    return float((best * weights).sum())


def lazy_greedy(c: Coverage, weights: Array, k: int, candidates: Array, first: IntArray) -> IntArray:
    """Positions of k candidates in the order in which greedy takes them; of equal gains the lower position first.

    Args:
        c: of n rows.
        weights: (n,) float64, not negative.
        k: how many, those of ``first`` included.
        candidates: (n,) bool, who may be taken.
        first: positions that are taken before all others.
    """
    best = np.zeros(len(weights))
    taken = list(first)

    def take(j: int) -> None:
        part = slice(c.start[j], c.start[j + 1])
        best[c.rows[part]] = np.maximum(best[c.rows[part]], c.sim[part])

    def gain(j: int) -> float:
        part = slice(c.start[j], c.start[j + 1])
        rows = c.rows[part]
        return float((np.maximum(c.sim[part] - best[rows], 0.0) * weights[rows]).sum())

    for j in taken:
        take(int(j))
    open_ = np.flatnonzero(candidates & ~np.isin(np.arange(len(weights)), first))
    gained = np.maximum(c.sim - best[c.rows], 0.0) * weights[c.rows]
    bound = np.add.reduceat(gained, c.start[:-1]) if len(gained) else np.zeros(len(weights))
    heap = [(-float(bound[j]), int(j)) for j in open_]
    heapq.heapify(heap)
    while heap and len(taken) < k:
        j = heap[0][1]
        fresh = (-gain(j), j)
        if len(heap) == 1 or fresh <= min(heap[1:3]):
            heapq.heappop(heap)
            taken.append(j)
            take(j)
        else:
            heapq.heapreplace(heap, fresh)
    return np.array(taken, np.int64)
