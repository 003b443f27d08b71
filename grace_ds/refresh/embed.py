"""The rows of the k-NN graph: a sample's content, and beside it what the model says of it.

    z_i = [sqrt(1 - b - g) content_i ; sqrt(b) sketch_i ; sqrt(g) hidden_i], unit

The learned parts are the sample's own, centred, of unit length, once rows have been collected of it.  Until then they are
what its neighbours say: the minimiser of the squared distances to its own old value and to theirs,

    (old_i + sum_j w_ij own_j) / (1 + sum_j w_ij),   w = max(cosine, 0)^4,   over the neighbours j with rows of their own,

which starts at 0, stays short where little is known, and so moves no row by much.  Belongs to the refresh's own layer.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch

from grace_ds.comm.base import Comm
from grace_ds.gradients.projection import signs
from grace_ds.graph.propagate import closeness
from grace_ds.graph.repair import KeptGraph
from grace_ds.records import HIDDEN, Array, FloatArray, IntArray, SampleRecords
from grace_ds.refresh.gather import Route
from grace_ds.refresh.table import Table

SKETCHED = 16  # numbers that a gradient sketch is projected to
_BLOCK = 1 << 14  # rows at a time, so that no second copy of all of them is made
_CACHED = 1 << 11  # likewise, where a block is gone over several times
_GRID = 2.0**14  # of the values that are summed up: exact, so equal for any number of ranks


@dataclass(frozen=True)
class Learned:
    """The learned parts of this rank's samples of the window.

    Attributes:
        ids: (n,) int64, sorted.
        step: (n,) int64, optimizer step of the row that a sample's parts are its own from; -1 where they are its neighbours'.
        values: (n, SKETCHED + HIDDEN) float32, each part of length 1 at most.
    """

    ids: IntArray
    step: IntArray
    values: FloatArray

    @staticmethod
    def empty() -> Learned:
        """Of no sample."""
        return Learned(np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, SKETCHED + HIDDEN), np.float32))


def learn(comm: Comm, before: Learned, own: IntArray, table: Table[SampleRecords], graph: KeptGraph | None, seed: int) -> Learned:
    """The learned parts of the samples ``own``, from what has been collected since.  Collective.

    Args:
        before: of the last refresh.
        own: (n,) int64, sorted, this rank's samples of the window now.
        table: this rank's rows.
        graph: of the last refresh; None before the first.
        seed: of the projection of the sketches; equal on all ranks.
    """
    step = np.full(len(own), -1, np.int64)
    values = np.zeros((len(own), SKETCHED + HIDDEN), np.float32)
    stays, there = _both(own, before.ids)
    step[stays], values[stays] = before.step[there], before.values[there]
    at = table.lookup(own)
    last = np.full(len(own), -1, np.int64)
    last[at >= 0] = table.last[at[at >= 0]]
    fresh = np.flatnonzero((at >= 0) & (step != last))
    new = _centred(comm, _collected(table.rows, at[fresh], seed))
    # A single gradient is noisy: a sample that is collected again takes the mean of what it was and what it is.
    again = np.flatnonzero(step[fresh] >= 0)
    for lo in range(0, len(again), _BLOCK):
        some = again[lo : lo + _BLOCK]
        new[some] = _unit_parts(values[fresh[some]].astype(np.float64) + new[some])
    values[fresh] = new
    step[fresh] = last[fresh]
    if graph is not None:
        values = _from_neighbours(comm, own, step, values, graph)
    return Learned(own, step, values)


def embed(content: FloatArray, learned: FloatArray, sketch_share: float, hidden_share: float) -> FloatArray:
    """(n, d + SKETCHED + HIDDEN) float32 rows of the graph, of unit length or 0, in half precision.

    Args:
        content: (n, d) float32, of unit length or 0.
        learned: (n, SKETCHED + HIDDEN), of :class:`Learned`.
    """
    weights = np.sqrt([1 - sketch_share - hidden_share, sketch_share, hidden_share]).astype(np.float32)
    width = content.shape[1]
    weight = np.repeat(weights, [width, SKETCHED, HIDDEN])
    out = np.empty((len(content), len(weight)), np.float32)
    for lo in range(0, len(out), _CACHED):
        rows = out[lo : lo + _CACHED]
        rows[:, :width], rows[:, width:] = content[lo : lo + _CACHED], learned[lo : lo + _CACHED]
        rows *= weight
        length = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
        rows /= np.where(length > 0, length, 1)[:, None]
        rows[:] = torch.from_numpy(rows).half().float().numpy()  # ten times as fast as NumPy's own
        rows += np.float32(0)  # no -0: with that the rows are on the grid of the graph's
    return out


def _collected(rows: SampleRecords, at: IntArray, seed: int) -> Array:
    """(m, SKETCHED + HIDDEN) float64 of the rows ``at`` (m,): the sketch, projected, and the hidden state."""
    project = _projection(seed, rows.sketch.shape[1])
    out = np.empty((len(at), SKETCHED + HIDDEN))
    for lo in range(0, len(at), _BLOCK):
        some = at[lo : lo + _BLOCK]
        # Half precision by powers of two, summed up in float64, is exact: the order of a product's sums follows its shape.
        out[lo : lo + _BLOCK, :SKETCHED] = rows.sketch[some].astype(np.float64) @ project
        out[lo : lo + _BLOCK, SKETCHED:] = rows.hidden[some]
    return out


@functools.lru_cache(maxsize=2)
def _projection(seed: int, width: int) -> Array:
    """(width, SKETCHED) float64, one power of two with random signs."""
    return np.ascontiguousarray(signs("embedding", seed, "sketch", (SKETCHED, width)).T, np.float64)


def _centred(comm: Comm, rows: Array) -> FloatArray:
    """``rows`` (n, SKETCHED + HIDDEN) less the mean over all ranks' rows, each part of length 1, or 0.  Collective."""
    # Parts may be of any scale: brought near 1 by the power of two that fits all of them.
    parts = (rows[:, :SKETCHED], rows[:, SKETCHED:])
    largest = comm.allreduce(np.array([max(part.max(initial=0.0), -part.min(initial=0.0)) for part in parts]), "max")
    scale = np.repeat(np.ldexp(1.0, -np.frexp(largest)[1]), [SKETCHED, HIDDEN])
    blocks = [slice(lo, lo + _BLOCK) for lo in range(0, len(rows), _BLOCK)]
    sums = np.zeros(SKETCHED + HIDDEN + 1, np.int64)
    for block in blocks:
        sums[:-1] += np.rint(rows[block] * (scale * _GRID)).astype(np.int64).sum(0)
    sums[-1] = len(rows)
    sums = comm.allreduce(sums)
    mean = sums[:-1].astype(np.float64) / _GRID / max(int(sums[-1]), 1)
    out = np.empty(rows.shape, np.float32)
    for block in blocks:
        out[block] = _unit_parts(rows[block] * scale - mean)
    return out


def _unit_parts(x: Array) -> FloatArray:
    """``x`` (n, SKETCHED + HIDDEN), each part of length 1, or 0."""
    return np.concatenate([_unit(x[:, :SKETCHED]), _unit(x[:, SKETCHED:])], axis=1)


def _unit(x: Array) -> FloatArray:
    length = np.sqrt(np.add.reduce(np.square(x), axis=1, keepdims=True))
    return np.asarray(np.divide(x, length, out=np.zeros_like(x), where=length > 1e-9), np.float32)


def _from_neighbours(comm: Comm, own: IntArray, step: IntArray, values: FloatArray, graph: KeptGraph) -> FloatArray:
    """``values`` with those of samples without a row of their own moved towards their neighbours'.  Collective."""
    edges = graph.neighbours()
    route = Route.of(comm, edges.ids.reshape(-1), own)
    table = route.exchange(np.where(step[:, None] >= 0, values, np.float32(0)))
    known = route.exchange((step >= 0).astype(np.float64))
    place = route.place.reshape(edges.ids.shape)
    asking, there = _both(own, graph.ids)
    asking, there = asking[step[asking] < 0], there[step[asking] < 0]
    mass, total = np.ones(len(asking)), values[asking].astype(np.float64)
    for j in range(edges.ids.shape[1]):  # neighbour by neighbour: the order of a sum must not depend on the rows beside it
        at = place[there, j]
        w: Array = closeness(edges.similarity[there, j]) * known[at]
        says = np.flatnonzero(w)  # few at first
        total[says] += w[says].reshape(-1, 1) * table[at[says]]
        mass += w
    out: FloatArray = values.copy()
    out[asking] = total / mass.reshape(-1, 1)
    return out


def _both(a: IntArray, b: IntArray) -> tuple[IntArray, IntArray]:
    """Positions in ``a`` and in ``b`` (both sorted, unique) of what they share."""
    _, in_a, in_b = np.intersect1d(a, b, assume_unique=True, return_indices=True)
    return in_a.astype(np.int64), in_b.astype(np.int64)
