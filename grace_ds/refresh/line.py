"""Run a refresh, from collected rows to the next schedule: one statement per stage, the same on every rank.

    gather → table → content → embed → graph → propagate → select → broadcast

A refresh is a function of its inputs and changes nothing else.  If any rank raises, every rank leaves with an exception, and
the caller keeps the old table, the old graph and the old schedule.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.comm.traffic import Traffic
from grace_ds.data.pool import Placed, joined
from grace_ds.errors import DataError, during
from grace_ds.features.content import ContentFeatures
from grace_ds.graph.repair import KeptGraph, follow
from grace_ds.records import FloatArray, IntArray, Losses, SampleRecords, Schedule
from grace_ds.refresh.broadcast import activation, broadcast_schedule
from grace_ds.refresh.choice import Seen, choose, uniform_schedule
from grace_ds.refresh.embed import Learned, embed, learn
from grace_ds.refresh.explanation import explanation
from grace_ds.refresh.gather import gather_rows
from grace_ds.refresh.influence import forecast, labels
from grace_ds.refresh.signals import RefreshContext, RefreshInputs, active_parts, estimate
from grace_ds.refresh.state import RefreshState
from grace_ds.refresh.table import Table, owner_of


@dataclass(frozen=True)
class RefreshResult:
    """The result of a refresh.

    Attributes:
        schedule: equal on all ranks.
        table, seen: this rank's rows and losses.
        kept: this rank's state for the next refresh.
        seconds: by stage.
        traffic: what this rank has sent, by stage.
        counts: of this rank.
        explanation: how the schedule was made, for ``run_dir``; on root only, None without it or if nothing was weighed.
    """

    schedule: Schedule
    table: Table[SampleRecords]
    seen: Table[Losses]
    kept: RefreshState
    seconds: dict[str, float]
    traffic: dict[str, Traffic]
    counts: dict[str, float]
    explanation: dict[str, Any] | None = None


class Stopwatch:
    """Seconds, and what is sent over ``comm``, by stage, in order."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        self.seconds: dict[str, float] = {}
        self.traffic: dict[str, Traffic] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add what the block takes and sends to ``stage``, and name the stage in errors that leave the block."""
        start, before = time.perf_counter(), self.comm.traffic.copy()
        try:
            with during(stage):
                yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
            self.traffic.setdefault(stage, Traffic()).add(self.comm.traffic.since(before))


def refresh(context: RefreshContext, inputs: RefreshInputs) -> RefreshResult:
    """Choose and publish the next schedule.  Collective.

    Raises:
        PeerFailed: another rank failed; nothing has changed.
        TransportTimeout: a peer did not join in time.
        Exception: this rank failed; the caller must inform the other ranks by ``comm.abort()``.
    """
    clock = Stopwatch(context.comm)
    with clock("gather"):
        start = activation(context.comm, inputs.issued, context.batch)
        received, sent = gather_rows(context.comm, inputs.rows, context.pool.limit)
        read, sent_losses = gather_rows(context.comm, inputs.losses, context.pool.limit)
    with clock("table"):
        context, placed = place(context, inputs, start)
        own = joined(block[owner_of(block, context.comm.size) == context.comm.rank] for block in placed.blocks())
        table, latest = inputs.table.merge(received).keep(own), inputs.seen.merge(read).keep(own)
    kept, signals, account, counts = inputs.kept, None, None, {}
    if inputs.uniform:
        with clock("select"):
            schedule = uniform_schedule(context, inputs, start) if context.comm.rank == 0 else None
    else:
        with clock("content"):
            content = context.contents(inputs.kept.content, own)
        with clock("embed"):
            learned, rows = rows_of(context, inputs, own, content, table)
        with clock("graph"):
            graph = graph_of(context, inputs, own, rows)
        with clock("propagate"):
            local = estimate(context, inputs, own, content, table, latest, graph)
        with clock("select"):
            seen = by_role(context, inputs, table, content)
            edges = graph.neighbours() if graph is not None and context.config.covers else None
            schedule = choose(context, inputs, start, local, local.signals, edges, seen)
        signals = local.signals
        kept, counts = RefreshState(content, learned, graph), {"propagated": float(local.reached), "graph_searched": 0.0}
        if graph is not None and context.comm.rank == 0:  # equal on all ranks, so it is counted once
            counts["graph_searched"] = float(graph.searched)
        if not math.isnan(content.density_ratio):
            counts["density_ratio"] = content.density_ratio if context.comm.rank == 0 else 0.0
    if schedule is not None and placed.meta:
        schedule = dataclasses.replace(schedule, meta={**schedule.meta, **placed.meta})
    if context.arrange is not None and schedule is not None:
        schedule = context.arrange(schedule)
    with clock("broadcast"):
        schedule = broadcast_schedule(context.comm, schedule)
    if signals is not None and context.config.run_dir is not None:
        with clock("explanation"):
            account = explanation(context, signals, schedule)
    counts |= {
        "anchors": float(len(table)),
        "received": float(len(received)),
        "losses_received": float(len(read)),
        "gathered_bytes": float(sent.bytes + sent_losses.bytes),
        "padding_dropped": float(sent.out_of_range),
        "nonfinite_dropped": float(sent.not_finite),
    }
    return RefreshResult(schedule, table, latest, kept, clock.seconds, clock.traffic, counts, account)


def place(context: RefreshContext, inputs: RefreshInputs, start: int) -> tuple[RefreshContext, Placed]:
    """Return the context and the window of a schedule that begins at position ``start``.  Collective.

    Raises:
        DataError: the ranks read other samples from a stream; on every rank.
    """
    placed = context.pool.place(inputs.version, start, inputs.book, inputs.visits.ids)
    if not placed.meta:
        return context, placed
    digest = np.frombuffer(hashlib.blake2b(json.dumps(dict(placed.meta)).encode(), digest_size=8).digest(), np.int64)
    low, high = (int(context.comm.allreduce(digest, op)[0]) for op in ("min", "max"))
    if low != high:
        raise DataError(
            f"the ranks read different samples from the stream, in the window of schedule {inputs.version}; let every rank read "
            "all of it in one order, not split by rank (split_dataset_by_node, get_rank), and with a fixed seed of its shuffle"
        )
    order, exclude = placed.order or context.order, np.union1d(context.exclude, placed.closed)
    return dataclasses.replace(context, order=order, exclude=exclude, closed=placed.closed), placed


def rows_of(
    context: RefreshContext, inputs: RefreshInputs, own: IntArray, content: ContentFeatures, table: Table[SampleRecords]
) -> tuple[Learned | None, FloatArray | None]:
    """Return the learned features of this rank's samples, and the rows of the k-NN graph.  Collective.

    Without any use for a graph the rows are None, and the learned features are those of the last refresh.  If the rows
    consist of content only, the learned features are None.
    """
    needed = "graph" in active_parts(context, inputs) or context.config.covers
    # During the warm-up nothing is chosen, so no graph is needed.
    if not (needed and context.config.builds_graph) or inputs.step < context.config.warmup_steps:
        return inputs.kept.learned, None
    assert content.vectors is not None  # whatever needs the graph needs them too
    shares = context.config.learned_shares
    if not any(shares):
        return None, content.vectors
    learned = learn(context.comm, inputs.kept.learned or Learned.empty(), own, table, inputs.kept.graph, context.config.seed)
    return learned, embed(content.vectors, learned.values, *shares)


def graph_of(context: RefreshContext, inputs: RefreshInputs, own: IntArray, rows: FloatArray | None) -> KeptGraph | None:
    """Return the k-NN graph of the window over ``rows`` (n, d), which all its users share; None without rows.  Collective."""
    if rows is None:
        return None
    return follow(context.comm, inputs.kept.graph, own, rows, context.config.graph, context.config.graph.drift, context.device)


def by_role(context: RefreshContext, inputs: RefreshInputs, table: Table[SampleRecords], content: ContentFeatures) -> Seen | None:
    """Return the influences collected since the last schedule, by role, and their predictions.  Collective.

    On root; None on the other ranks.  They are read from the table, not from the rows just received, because a checkpoint in
    between must not change them.
    """
    new = (table.last > inputs.since) & bool(len(inputs.core))
    expected = np.full(len(table), np.nan, np.float32)
    # Labels of a model's first steps are misleading: the guard does not use predictions from them.
    if context.config.guard.enabled and inputs.since >= context.config.learning and "gradients" in active_parts(context, inputs):
        expected = forecast(context.comm, content, table, ~new, inputs.reference)
    rows = table.rows.take(new)
    parts = [context.comm.gather(array) for array in (rows.ids, labels(rows, inputs.reference), expected[new])]
    if any(part is None for part in parts):
        return None
    ids, label, expected = (np.concatenate(part) for part in parts if part is not None)
    order = np.argsort(ids, kind="stable")  # the bootstrap must draw the same for any number of ranks
    ids, label, expected = ids[order], label[order], expected[order]
    core = np.isin(ids, inputs.core)
    audit = ~core if inputs.audit is None else np.isin(ids, inputs.audit)
    return Seen(label[core & ~audit], label[audit], expected, label, ids[core & ~audit])
