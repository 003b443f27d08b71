"""What a refresh knows of every sample of the window, and how it comes to know it.

First half of the refresh's own layer (the second is :mod:`grace_ds.choice`): it puts the stages' results together and
belongs to none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from grace_ds.chart import Places
from grace_ds.comm.base import Comm
from grace_ds.config.schema import GraceConfig
from grace_ds.features import ContentFeatures
from grace_ds.gather import fetch
from grace_ds.influence import influence, labels
from grace_ds.order import Order
from grace_ds.pool import Pool
from grace_ds.propagate import confidence, propagate
from grace_ds.records import Array, FloatArray, IntArray, Neighbours, Rows, Schedule
from grace_ds.schedule import Ledger
from grace_ds.selection.guard import Decision
from grace_ds.table import Table


@dataclass(frozen=True)
class Pipeline:
    """What stays the same from one refresh of a run to the next.

    Attributes:
        comm: transport between the data-parallel ranks.
        config: of the run.
        pool: the windows of the corpus.
        order: of the corpus where nothing is chosen.
        batch: samples of one optimizer step over all ranks.
        contents: content features of the window's samples that this rank owns (sorted ids in, same order out).
        include, exclude: sorted ids that every / no coreset holds.
        sources: ids (n,) → the source of each, (n,) int64; None where they are not known.
        trusted: (m, s) float32, content statistics of held-out trusted samples; None without a trusted model.
        arrange: what root does to a schedule before it is published; None: nothing.
        chart: root's map of the window's samples (sorted ids in), for ``run_dir``; None: none.
    """

    comm: Comm
    config: GraceConfig
    pool: Pool
    order: Order
    batch: int
    contents: Callable[[IntArray], ContentFeatures]
    include: IntArray
    exclude: IntArray
    trusted: FloatArray | None = None
    sources: Callable[[IntArray], IntArray] | None = None
    arrange: Callable[[Schedule], Schedule] | None = None
    chart: Callable[[IntArray], Places] | None = None


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
        reference: basis version → median influence of trusted samples at its fit; 0 where it is not to be judged by.
        decision: of the guard for the schedule in force; None before the first.
        since: optimizer steps done when the schedule in force was made.
        core: (m,) int64: samples that it has chosen; empty for a uniform one.
        audit: (m,) int64: samples that it holds unchosen; None (shadow mode): all that are not in ``core``.
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
    decision: Decision | None = None
    since: int = -1
    core: IntArray = field(default_factory=lambda: np.empty(0, np.int64))
    audit: IntArray | None = field(default_factory=lambda: np.empty(0, np.int64))
    uniform: bool = False


@dataclass(frozen=True)
class Signals:
    """What selection knows of the window's samples, sorted by id; on root: of all of them.

    Attributes:
        ids: (n,) int64.
        loss: (n,) float32, spread loss above the running mean; NaN unknown.
        align: (n,) float32, influence in robust deviations from the trusted samples'; NaN unknown.
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
    """Loss and influence of every sample of this rank, from its own harvest, its content and its harvested neighbours.

    Collective.
    """
    n, nan, g = len(own), np.float32(np.nan), p.config.graph
    at = table.lookup(own)
    known = at >= 0
    loss, label = np.full((2, n), nan, np.float32)
    loss[known] = table.rows.loss[at[known]]
    label[known] = labels(table.rows.take(at[known]), x.reference)
    staleness = np.full(n, np.inf, np.float32)
    staleness[known] = np.maximum(0, x.step - table.rows.step[at[known]])
    age = np.floor(staleness / p.config.refresh.interval_steps)  # in refreshes
    found = influence(p.comm, content, p.trusted, label, confidence(age, g.decay))
    # What goes along the edges is centred: the loss by its mean, the influence by what content tells of it already.
    centre = _exact_mean(p.comm, loss)
    rest = label - found.predicted if found is not None else np.full(n, nan, np.float32)
    values = np.stack([loss - centre, rest], 1)
    disagreement = np.full(n, nan, np.float32)
    if graph is not None:
        values, disagreement = _along(p, own, values, age, known, graph)
    align = np.full(n, nan, np.float32)
    if found is not None:
        align = found.standard(found.predicted + (np.nan_to_num(values[:, 1]) if g.residuals and graph is not None else 0))
    keep = content.keep if content.keep is not None else np.full(n, nan, np.float32)
    spread_loss = np.asarray(values[:, 0] + centre, np.float32)
    return Signals(own, spread_loss, align, content.density, keep, staleness, disagreement)


def _along(
    p: Pipeline, own: IntArray, values: FloatArray, age: FloatArray, known: Array, graph: Neighbours
) -> tuple[FloatArray, FloatArray]:
    """Centred (n, 2) values propagated over the anchors' edges, and the disagreement among them."""
    g = p.config.graph
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


def _exact_mean(comm: Comm, values: Array) -> float:
    """Mean of the finite entries of all ranks' ``values`` (n,), the same bits for any number of ranks; 0 where there is none."""
    finite = np.isfinite(values)
    grid = np.rint(np.where(finite, np.clip(values, -1e4, 1e4), 0).astype(np.float64) * 2.0**20).astype(np.int64)
    total, count = comm.allreduce(np.array([grid.sum(), finite.sum()], np.int64))
    return float(np.float32(int(total) / 2.0**20 / max(int(count), 1)))
