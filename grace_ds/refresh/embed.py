"""Compute the rows of the k-NN graph: a sample's content, extended by features from the model.

    z_i = [sqrt(1 - b - g) content_i ; sqrt(b) sketch_i ; sqrt(g) hidden_i], unit

The learned parts (sketch and hidden state) are the sample's own, centred and of unit length, once rows of it have been
collected.  Until then they follow from its neighbours.  They are the minimiser of the squared distances to the sample's own
old value and to the neighbours' values,

    (old_i + sum_j w_ij own_j) / (1 + sum_j w_ij),   w = max(cosine, 0)^4,   over the neighbours j with rows of their own,

which starts at 0 and stays short while little is known, so that it moves no row by much.  Belongs to the refresh's own layer.
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
_BLOCK = 1 << 14  # rows at a time, to avoid a second copy of all of them
_CACHED = 1 << 11  # likewise, for a block that is processed several times
_GRID = 2.0**14  # sums are over multiples of 1 / _GRID: exact, so equal for any number of ranks


@dataclass(frozen=True)
class Learned:
    """The learned parts of this rank's samples of the window.

    Attributes:
        ids: (n,) int64, sorted.
        step: (n,) int64, optimizer step of the row that a sample's parts come from; -1 if they come from its neighbours.
        values: (n, SKETCHED + HIDDEN) float32, each part of length 1 at most.
    """

    ids: IntArray
    step: IntArray
    values: FloatArray

    @staticmethod
    def empty() -> Learned:
        """Return the learned parts of no sample."""
        return Learned(np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, SKETCHED + HIDDEN), np.float32))


def learn(comm: Comm, before: Learned, own: IntArray, table: Table[SampleRecords], graph: KeptGraph | None, seed: int) -> Learned:
    """Return the learned parts of the samples ``own``, updated by the rows collected since the last refresh.  Collective.

    Args:
        before: the learned parts at the last refresh.
        own: (n,) int64, sorted, this rank's samples of the window now.
        table: this rank's rows.
        graph: of the last refresh; None before the first.
        seed: of the projection of the sketches; equal on all ranks.
    """
    step = np.full(len(own), -1, np.int64)
    values = np.zeros((len(own), SKETCHED + HIDDEN), np.float32)
    stays, previous = _both(own, before.ids)
    step[stays], values[stays] = before.step[previous], before.values[previous]
    position = table.lookup(own)
    last = np.full(len(own), -1, np.int64)
    last[position >= 0] = table.last[position[position >= 0]]
    fresh = np.flatnonzero((position >= 0) & (step != last))
    new = _centred(comm, _collected(table.rows, position[fresh], seed))
    # A single gradient is noisy: a sample that is collected again takes the mean of its old and its new value.
    again = np.flatnonzero(step[fresh] >= 0)
    for start in range(0, len(again), _BLOCK):
        block = again[start : start + _BLOCK]
        new[block] = _unit_parts(values[fresh[block]].astype(np.float64) + new[block])
    values[fresh] = new
    step[fresh] = last[fresh]
    if graph is not None:
        values = _from_neighbours(comm, own, step, values, graph)
    return Learned(own, step, values)


def embed(content: FloatArray, learned: FloatArray, sketch_share: float, hidden_share: float) -> FloatArray:
    """Return the rows of the graph: (n, d + SKETCHED + HIDDEN) float32, of unit length or 0, rounded to half precision.

    Args:
        content: (n, d) float32, of unit length or 0.
        learned: (n, SKETCHED + HIDDEN), of :class:`Learned`.
        sketch_share, hidden_share: shares of the two learned parts in a row's squared length.
    """
    weights = np.sqrt([1 - sketch_share - hidden_share, sketch_share, hidden_share]).astype(np.float32)
    width = content.shape[1]
    weight = np.repeat(weights, [width, SKETCHED, HIDDEN])
    out = np.empty((len(content), len(weight)), np.float32)
    for start in range(0, len(out), _CACHED):
        rows = out[start : start + _CACHED]
        rows[:, :width], rows[:, width:] = content[start : start + _CACHED], learned[start : start + _CACHED]
        rows *= weight
        length = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
        rows /= np.where(length > 0, length, 1)[:, None]
        rows[:] = torch.from_numpy(rows).half().float().numpy()  # ten times as fast as NumPy's own conversion
        rows += np.float32(0)  # turns -0 into 0, so that the rows are on the grid of the graph's rows
    return out


def _collected(rows: SampleRecords, at: IntArray, seed: int) -> Array:
    """Return the projected sketch and the hidden state of the rows ``at`` (m,): (m, SKETCHED + HIDDEN) float64."""
    project = _projection(seed, rows.sketch.shape[1])
    out = np.empty((len(at), SKETCHED + HIDDEN))
    for start in range(0, len(at), _BLOCK):
        block = at[start : start + _BLOCK]
        # Half-precision values times powers of two have exact sums in float64; otherwise the result would depend on the
        # order of summation, which follows the shape of the product.
        out[start : start + _BLOCK, :SKETCHED] = rows.sketch[block].astype(np.float64) @ project
        out[start : start + _BLOCK, SKETCHED:] = rows.hidden[block]
    return out


@functools.lru_cache(maxsize=2)
def _projection(seed: int, width: int) -> Array:
    """Return the projection of sketches: (width, SKETCHED) float64, one power of two with random signs."""
    return np.ascontiguousarray(signs("embedding", seed, "sketch", (SKETCHED, width)).T, np.float64)


def _centred(comm: Comm, rows: Array) -> FloatArray:
    """Return ``rows`` (n, SKETCHED + HIDDEN) less the mean of all ranks' rows, each part of length 1, or 0.  Collective."""
    # Parts may be of any scale: a common power of two brings them near 1.
    parts = (rows[:, :SKETCHED], rows[:, SKETCHED:])
    largest = comm.allreduce(np.array([max(part.max(initial=0.0), -part.min(initial=0.0)) for part in parts]), "max")
    scale = np.repeat(np.ldexp(1.0, -np.frexp(largest)[1]), [SKETCHED, HIDDEN])
    blocks = [slice(start, start + _BLOCK) for start in range(0, len(rows), _BLOCK)]
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
    """Return ``x`` (n, SKETCHED + HIDDEN) with each part scaled to length 1, or 0."""
    return np.concatenate([_unit(x[:, :SKETCHED]), _unit(x[:, SKETCHED:])], axis=1)


def _unit(x: Array) -> FloatArray:
    length = np.sqrt(np.add.reduce(np.square(x), axis=1, keepdims=True))
    return np.asarray(np.divide(x, length, out=np.zeros_like(x), where=length > 1e-9), np.float32)


def _from_neighbours(comm: Comm, own: IntArray, step: IntArray, values: FloatArray, graph: KeptGraph) -> FloatArray:
    """Return ``values`` with those of samples without a row of their own moved towards their neighbours'.  Collective."""
    edges = graph.neighbours()
    route = Route.of(comm, edges.ids.reshape(-1), own)
    table = route.exchange(np.where(step[:, None] >= 0, values, np.float32(0)))
    known = route.exchange((step >= 0).astype(np.float64))
    place = route.place.reshape(edges.ids.shape)
    unknown, in_graph = _both(own, graph.ids)
    unknown, in_graph = unknown[step[unknown] < 0], in_graph[step[unknown] < 0]
    mass, total = np.ones(len(unknown)), values[unknown].astype(np.float64)
    for j in range(edges.ids.shape[1]):  # neighbour by neighbour: the order of a sum must not depend on the other rows
        position = place[in_graph, j]
        weight: Array = closeness(edges.similarity[in_graph, j]) * known[position]
        weighted = np.flatnonzero(weight)  # few at first
        total[weighted] += weight[weighted].reshape(-1, 1) * table[position[weighted]]
        mass += weight
    out: FloatArray = values.copy()
    out[unknown] = total / mass.reshape(-1, 1)
    return out


def _both(a: IntArray, b: IntArray) -> tuple[IntArray, IntArray]:
    """Return the positions in ``a`` and in ``b`` (both sorted, unique) of the ids that they share."""
    _, in_a, in_b = np.intersect1d(a, b, assume_unique=True, return_indices=True)
    return in_a.astype(np.int64), in_b.astype(np.int64)
