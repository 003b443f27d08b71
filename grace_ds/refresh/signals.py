"""Compute the signals of every sample of the window from the results of the refresh's stages.

This is the first half of the refresh's own layer (the second is :mod:`grace_ds.refresh.choice`), which combines the stages'
results and belongs to none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.comm.statistics import quantile, rank01
from grace_ds.config.schema import GraceConfig
from grace_ds.data.order import Order
from grace_ds.data.pool import Windows
from grace_ds.data.schedule import ScheduleBook, VisitCounts
from grace_ds.features.content import ContentFeatures
from grace_ds.features.limits import Limits
from grace_ds.graph.propagate import Propagated, confidence, crowding, propagate
from grace_ds.graph.repair import KeptGraph
from grace_ds.recipes import Recipe, recipe
from grace_ds.recipes.weights import SPARSE, uncrowded
from grace_ds.records import Array, C, FloatArray, IntArray, Losses, SampleRecords, Schedule, Signals
from grace_ds.refresh.gather import Route
from grace_ds.refresh.influence import labels, predict_influence
from grace_ds.refresh.projection import ProjectedSamples
from grace_ds.refresh.state import RefreshState
from grace_ds.refresh.table import Table
from grace_ds.selection.guard import Decision
from grace_ds.utils.arrays import device_memory, to_device, to_host


@dataclass(frozen=True)
class RefreshContext:
    """What stays the same from one refresh of a run to the next.

    Attributes:
        comm: transport between the data-parallel ranks.
        config: of the run.
        pool: the windows of the corpus.
        order: of the corpus, used wherever nothing is chosen.
        batch: samples of one optimizer step over all ranks.
        contents: (features of the last refresh or None, sorted ids) → content features in the order of the ids, of the
            window's samples that this rank owns.
        include, exclude: sorted ids that every / no coreset holds.
        sources: ids (n,) → the source of each, (n,) int64; None if they are not known.
        trusted: (m, s) float32, content statistics of held-out trusted samples; None without a trusted model.
        arrange: applied by root to a schedule before it is published; None: nothing.
        chart: sorted ids of the window → map of some of them, on root, for ``run_dir``; None: no map.
        device: of the job's model, as torch names it; the graph is searched and scores are spread there if possible.
        closed: ids of the window, sorted, that are not chosen any more and do not count for the budget.
    """

    comm: Comm
    config: GraceConfig
    pool: Windows
    order: Order
    batch: int
    contents: Callable[[ContentFeatures | None, IntArray], ContentFeatures]
    include: IntArray
    exclude: IntArray
    trusted: FloatArray | None = None
    sources: Callable[[IntArray], IntArray] | None = None
    arrange: Callable[[Schedule], Schedule] | None = None
    chart: Callable[[IntArray], ProjectedSamples] | None = None
    device: str = "cpu"
    closed: IntArray = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def recipe(self) -> Recipe:
        """The most that a selection of this run may use."""
        return recipe(self.config.recipe)


@dataclass(frozen=True)
class RefreshInputs:
    """What one refresh starts from, on this rank.

    Attributes:
        rows, losses: collected, and read, since the last refresh, in the order of the steps.
        table, seen: the latest rows and losses of earlier refreshes, of the samples that this rank owns.
        visits: uses of each sample so far (equal on all ranks).
        step: optimizer steps done.
        version: of the schedule to be made.
        issued: samples over all ranks that this rank's loader has been given.
        interval: optimizer steps until the next refresh.
        reference: basis version → median influence of trusted samples at its fit; 0 if it is not usable.
        loss_limits: fitted to trusted samples' losses less the running mean; None if losses are not weighed or cannot be read.
        decision: of the guard for the schedule in force; None before the first.
        since: optimizer steps done when the schedule in force was made.
        core: (m,) int64: samples that it has chosen; empty for a uniform schedule.
        audit: (m,) int64: samples that it holds without having chosen them; None (shadow mode): all that are not in ``core``.
        uniform: make a schedule of the whole corpus in uniform order (before ``start_step``, after ``stop_step``).
        kept: state left by the previous refresh.
        collect_every: k if every k-th optimizer step was collected since.
        book: the published schedules that positions still refer to.
    """

    rows: SampleRecords
    losses: Losses
    table: Table[SampleRecords]
    seen: Table[Losses]
    visits: VisitCounts
    step: int
    version: int
    issued: int
    interval: int
    reference: Mapping[int, float] = field(default_factory=dict)
    loss_limits: Limits | None = None
    decision: Decision | None = None
    since: int = -1
    core: IntArray = field(default_factory=lambda: np.empty(0, np.int64))
    audit: IntArray | None = field(default_factory=lambda: np.empty(0, np.int64))
    uniform: bool = False
    kept: RefreshState = field(default_factory=RefreshState)
    collect_every: int = 1
    book: ScheduleBook = field(default_factory=ScheduleBook)


def active_parts(context: RefreshContext, inputs: RefreshInputs) -> frozenset[str]:
    """Return the parts of the recipe that this refresh computes: those of the schedule in force, or all if the guard retests."""
    return context.config.parts - (inputs.decision.unpaid(inputs.version) if inputs.decision is not None else frozenset())


def weighed_parts(context: RefreshContext, inputs: RefreshInputs) -> frozenset[str]:
    """Return the active parts that may weigh a sample: not gradients and losses of a fresh model's first steps, which mislead."""
    early = {"gradients", "loss"} if inputs.step < context.config.learning else set()
    return active_parts(context, inputs) - early


def estimate(
    context: RefreshContext,
    inputs: RefreshInputs,
    own: IntArray,
    content: ContentFeatures,
    table: Table[SampleRecords],
    seen: Table[Losses],
    graph: KeptGraph | None,
) -> Estimate:
    """Estimate loss, influence and crowding of every sample of this rank.  Collective.

    The estimates use the sample's own rows, its content, and its neighbours in the graph.

    Args:
        own: (n,) int64, sorted, this rank's samples of the window.
        content: features of these samples.
        table, seen: the latest row and loss of each sample, those of this refresh included.
        graph: over the window; None: estimate without one.
    """
    n, nan, settings = len(own), np.float32(np.nan), context.config.graph
    loss, label = np.full((2, n), nan, np.float32)
    measured_at, stale = found_in(table, own, inputs.step)
    if "gradients" in context.config.parts:  # nothing is known of parts that are switched off
        label[measured_at >= 0] = labels(table.rows, inputs.reference)[measured_at[measured_at >= 0]]
    seen_at, unread = found_in(seen if "loss" in context.config.parts else Table(Losses.empty()), own, inputs.step)
    loss[seen_at >= 0] = seen.rows.loss[seen_at[seen_at >= 0]]
    ages = np.floor(np.stack([unread, stale], 1) / context.config.refresh.interval_steps)  # in refreshes
    centre = _exact_mean(context.comm, loss)
    predicted = predict_influence(context.comm, content, context.trusted, label, confidence(ages[:, 1], settings.decay))
    # Values that spread along the edges are centred: the loss by its mean, the influence by its prediction from content.
    rest = label - predicted.fit.predicted if predicted is not None else np.full(n, nan, np.float32)
    values, crowded, disagreement = np.stack([loss - centre, rest], 1), np.full(n, nan, np.float32), np.full(n, nan, np.float32)
    reached = 0
    if graph is not None:
        edges = graph.neighbours()
        similarity, route = edges.similarity, Route.of(context.comm, edges.ids.reshape(-1), own)
        del edges  # the route replaces its ids
        result = _along(context, route, values, ages, similarity)
        # A signal that was measured of no sample stays unknown: there is no mean to shrink it to.
        unseen = context.comm.allreduce(np.isfinite(values).sum(0).astype(np.int64)) == 0
        values, disagreement = to_host(result.values), to_host(result.disagreement)
        values[:, unseen] = np.nan
        crowded, reached = crowding(similarity), int((to_host(result.reached) & (measured_at < 0) & (seen_at < 0)).sum())
    influence = np.full(n, nan, np.float32)
    if predicted is not None:
        influence = predicted.standard(predicted.fit.predicted + (np.nan_to_num(values[:, 1]) if graph is not None else 0))
    quality = content.quality if content.quality is not None else np.full(n, nan, np.float32)
    spread_loss = np.asarray(values[:, 0] + centre, np.float32)
    loss_pass = np.full(n, nan, np.float32)
    if inputs.loss_limits is not None:
        loss_pass = inputs.loss_limits.quality(spread_loss[:, None].astype(np.float64)).astype(np.float32)
    since = np.minimum(stale, unread)
    columns = (spread_loss, influence, content.density, quality, loss_pass, crowded, since, disagreement)
    signals = Signals(own, *columns, *relative(context.comm, spread_loss, crowded))
    if predicted is None:
        return Estimate(signals, reached)
    return Estimate(signals, reached, predicted.fit.labels, predicted.fit.explained)


def found_in(table: Table[C], own: IntArray, step: int) -> tuple[IntArray, FloatArray]:
    """Return the positions of the samples ``own`` (n,) in a table, and the optimizer steps since they were measured.

    Returns:
        (n,) int64, -1 for samples that the table lacks; and (n,) float32, infinity for those.
    """
    position = table.lookup(own)
    since = np.full(len(own), np.inf, np.float32)
    since[position >= 0] = np.maximum(0, step - table.rows.step[position[position >= 0]])
    return position, since


def _along(context: RefreshContext, route: Route, values: FloatArray, ages: Array, similarity: FloatArray) -> Propagated:
    """Return ``values`` (n, s) of these ages spread along the graph, as arrays on the device of the run.  Collective."""
    graph = context.config.graph

    def exchange(facts: Array) -> Any:
        return to_device(route.exchange(to_host(facts)), context.device)

    arrays = (values, ages, route.place.reshape(similarity.shape), similarity)
    with device_memory(context.device):
        own_values, own_ages, place, close = (to_device(array, context.device) for array in arrays)
        return propagate(own_values, own_ages, place, close, exchange, hops=graph.hops, shrink=graph.shrink, decay=graph.decay)


@dataclass(frozen=True)
class Estimate:
    """The estimated signals of this rank's samples.

    Attributes:
        signals: of all of them.
        reached: number of samples that were never measured and got a loss or an influence along the graph.
        labels: effective number of measured influences, over all ranks; 0 without any.
        explained: share of their variance that content predicts.
    """

    signals: Signals
    reached: int
    labels: float = 0.0
    explained: float = 0.0


def relative(comm: Comm, loss: FloatArray, crowding: FloatArray) -> tuple[Array, Array]:
    """Return the signals that are relative to the whole window: ``loss_rank`` and ``sparseness`` of :class:`Signals`, (n,) each.

    Collective; the same bits for any number of ranks.
    """
    c = quantile(comm, crowding, SPARSE)
    return rank01(comm, loss), np.full(len(crowding), np.nan) if c is None else uncrowded(crowding, c)


def _exact_mean(comm: Comm, values: Array) -> float:
    """Return the mean of the finite entries of all ranks' ``values`` (n,); 0 if there are none.

    Collective; the same bits for any number of ranks.
    """
    finite = np.isfinite(values)
    grid = np.rint(np.where(finite, np.clip(values, -1e4, 1e4), 0).astype(np.float64) * 2.0**20).astype(np.int64)
    total, count = comm.allreduce(np.array([grid.sum(), finite.sum()], np.int64))
    return float(np.float32(int(total) / 2.0**20 / max(int(count), 1)))
