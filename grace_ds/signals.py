"""What a refresh knows of every sample of the window, and how it comes to know it.

First half of the refresh's own layer (the second is :mod:`grace_ds.choice`): it puts the stages' results together and
belongs to none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.config.schema import GraceConfig
from grace_ds.features import ContentFeatures
from grace_ds.gather import fetch
from grace_ds.pool import Pool
from grace_ds.propagate import propagate
from grace_ds.records import Array, FloatArray, IntArray, Neighbours, Rows
from grace_ds.schedule import Ledger
from grace_ds.table import Table


@dataclass(frozen=True)
class Pipeline:
    """What stays the same from one refresh of a run to the next.

    Attributes:
        comm: transport between the data-parallel ranks.
        config: of the run.
        pool: the windows of the corpus.
        batch: samples of one optimizer step over all ranks.
        contents: content features of the window's samples that this rank owns (sorted ids in, same order out).
        include, exclude: sorted ids that every / no coreset holds.
    """

    comm: Comm
    config: GraceConfig
    pool: Pool
    batch: int
    contents: Callable[[IntArray], ContentFeatures]
    include: IntArray
    exclude: IntArray


@dataclass(frozen=True)
class Inputs:
    """What one refresh starts from, on this rank.

    Attributes:
        rows: harvested since the last refresh, in harvest order.
        table: rows of earlier refreshes that this rank owns.
        ledger: uses of each sample so far (all ranks alike).
        step: optimizer steps done.
        version: of the schedule to be made.
        issued: samples over all ranks that this rank's loader has been given.
        interval: optimizer steps until the next refresh.
        reference: basis version → median alignment of trusted samples under it; above 0.
        uniform: make a schedule of the whole corpus in uniform order (before ``start_step``, after ``stop_step``).
    """

    rows: Rows
    table: Table
    ledger: Ledger
    step: int
    version: int
    issued: int
    interval: int
    reference: Mapping[int, float] = field(default_factory=dict)
    uniform: bool = False


@dataclass(frozen=True)
class Signals:
    """What selection knows of the window's samples, sorted by id; on root: of all of them.

    Attributes:
        ids: (n,) int64.
        loss: (n,) float32, spread loss above the running mean; NaN unknown.
        align: (n,) float32, spread alignment in units of the trusted median; NaN unknown.
        density: (n,) float32 near-duplicates of the sample.
        keep: (n,) float32 prior; NaN without one.
        staleness: (n,) float32, optimizer steps since the sample's harvest; inf where it never was.
        disagreement: (n,) float32, spread of its harvested neighbours' losses; NaN without any.
    """

    ids: IntArray
    loss: FloatArray
    align: FloatArray
    density: FloatArray
    keep: FloatArray
    staleness: FloatArray
    disagreement: FloatArray


def spread(p: Pipeline, x: Inputs, own: IntArray, content: ContentFeatures, table: Table, graph: Neighbours | None) -> Signals:
    """Loss and alignment of every sample of this rank, from its own harvest and its harvested neighbours.  Collective."""
    n, nan = len(own), np.float32(np.nan)
    at = table.lookup(own)
    known = at >= 0
    values = np.full((n, 2), nan, np.float32)
    values[known, 0] = table.rows.loss[at[known]]
    values[known, 1] = _in_units_of(table.rows.align[at[known]], table.rows.basis[at[known]], x.reference)
    staleness = np.full(n, np.inf, np.float32)
    staleness[known] = np.maximum(0, x.step - table.rows.step[at[known]])
    centre = _exact_mean(p.comm, values)
    values -= centre
    disagreement = np.full(n, nan, np.float32)
    if graph is not None:
        values, disagreement = _along(p, own, values, staleness, known, graph)
    keep = content.keep if content.keep is not None else np.full(n, nan, np.float32)
    density = content.density if content.density is not None else np.zeros(n, np.float32)
    values += centre
    return Signals(own, values[:, 0], values[:, 1], density, keep, staleness, disagreement)


def _along(
    p: Pipeline, own: IntArray, values: FloatArray, staleness: FloatArray, known: Array, graph: Neighbours
) -> tuple[FloatArray, FloatArray]:
    """Centred (n, 2) values propagated over the anchors' edges, and the disagreement among them."""
    g = p.config.graph
    age = np.floor(staleness / p.config.refresh.interval_steps)  # in refreshes
    facts = np.concatenate([values, age[:, None]], 1)[known]
    around = fetch(p.comm, graph.ids.reshape(-1), own[known], facts, np.nan).reshape(*graph.ids.shape, 3)
    ages = np.where(np.isnan(around[..., 2]), np.inf, around[..., 2])
    result = propagate(values, age, around[..., :2], ages, graph.similarity, shrink=g.shrink, decay=g.decay)
    # A signal that nobody was harvested with stays unknown: shrinking it to a mean of nothing would invent it.
    unseen = p.comm.allreduce(np.isfinite(values).sum(0).astype(np.int64)) == 0
    result.values[:, unseen] = np.nan
    return result.values, result.disagreement


def collect(comm: Comm, s: Signals) -> Signals | None:
    """All ranks' signals on root, sorted by id; None on the other ranks."""
    ids = comm.gather(s.ids)
    columns = comm.gather(np.stack([s.loss, s.align, s.density, s.keep, s.staleness, s.disagreement], 1).astype(np.float32))
    if ids is None or columns is None:
        return None
    order = np.argsort(np.concatenate(ids), kind="stable")
    table = np.concatenate(columns)[order]
    return Signals(np.concatenate(ids)[order], *(np.ascontiguousarray(table[:, i]) for i in range(6)))


def _in_units_of(align: FloatArray, basis: Array, reference: Mapping[int, float]) -> FloatArray:
    """Alignments divided by the trusted median of their basis; NaN where that median is unknown or not positive."""
    out = np.full(len(align), np.nan, np.float32)
    for version, median in reference.items():
        if median > 0:
            out[basis == version] = align[basis == version] / np.float32(median)
    return out


def _exact_mean(comm: Comm, values: Array) -> FloatArray:
    """(s,) float32 mean of each column's finite entries over all ranks, the same bits for any number of ranks."""
    finite = np.isfinite(values)
    grid = np.rint(np.where(finite, np.clip(values, -1e4, 1e4), 0).astype(np.float64) * 2.0**20).astype(np.int64)
    total, count = np.split(comm.allreduce(np.concatenate([grid.sum(0), finite.sum(0).astype(np.int64)])), 2)
    return np.asarray(total / 2.0**20 / np.maximum(count, 1), np.float32)
