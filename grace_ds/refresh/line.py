"""The straight line: collected rows in, the next schedule out, one statement a stage, the same on every rank.

    gather → table → content → embed → graph → propagate → select → broadcast

A refresh is a function of its inputs: it changes nothing outside.  If any rank raises, every rank leaves with an
exception and the caller keeps the old table, the old graph and the old schedule.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from grace_ds.errors import during
from grace_ds.features.content import ContentFeatures
from grace_ds.graph.repair import KeptGraph, follow
from grace_ds.records import FloatArray, IntArray, Losses, Neighbours, Rows, Schedule
from grace_ds.refresh.broadcast import activation, broadcast_schedule
from grace_ds.refresh.choice import Seen, choose, uniform_schedule
from grace_ds.refresh.embed import Learned, embed, learn
from grace_ds.refresh.explanation import portrait
from grace_ds.refresh.gather import gather_rows
from grace_ds.refresh.influence import forecast, labels
from grace_ds.refresh.signals import Inputs, Pipeline, active_parts, collect, estimate
from grace_ds.refresh.state import Kept
from grace_ds.refresh.table import Table, owner_of


@dataclass(frozen=True)
class Outcome:
    """What a refresh made.

    Attributes:
        schedule: all ranks alike.
        table, seen: this rank's.
        kept: this rank's, for the next refresh.
        seconds: by stage.
        counts: of this rank.
        portrait: how the schedule came about, for ``run_dir``; on root only, None without one or where nothing was weighed.
    """

    schedule: Schedule
    table: Table[Rows]
    seen: Table[Losses]
    kept: Kept
    seconds: dict[str, float]
    counts: dict[str, float]
    portrait: dict[str, Any] | None = None


class Stopwatch:
    """Seconds by stage, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Counts the seconds of the block under ``stage``."""
        start = time.perf_counter()
        try:
            with during(stage):
                yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def refresh(p: Pipeline, x: Inputs) -> Outcome:
    """Chooses and publishes the next schedule.  Collective.

    Raises:
        PeerFailed: another rank failed; nothing has changed.
        TransportTimeout: a peer did not come in time.
        Exception: this rank failed; the caller must tell the others by ``comm.abort()``.
    """
    clock = Stopwatch()
    with clock("gather"):
        start = activation(p.comm, x.issued, p.batch)
        received, sent = gather_rows(p.comm, x.rows, p.pool.n)
        read, sent_losses = gather_rows(p.comm, x.losses, p.pool.n)
    with clock("table"):
        window = p.pool.window_at(x.version)
        own = window[owner_of(window, p.comm.size) == p.comm.rank]
        table, latest = x.table.merge(received).keep(window), x.seen.merge(read).keep(window)
    kept, picture, counts = x.kept, None, {}
    if x.uniform:
        with clock("select"):
            schedule = uniform_schedule(p, x, start) if p.comm.rank == 0 else None
    else:
        with clock("content"):
            content = p.contents(x.kept.content, own)
        with clock("embed"):
            learned, rows = rows_of(p, x, own, content, table)
        with clock("graph"):
            graph = graph_of(p, x, own, rows)
        with clock("propagate"):
            local = estimate(p, x, own, content, table, latest, graph)
        with clock("select"):
            signals = collect(p.comm, local.signals)
            edges = edges_on_root(p, own, graph)
            seen = by_role(p, x, table, content)
            schedule = choose(p, x, start, local, signals, edges, seen) if signals is not None else None
        with clock("portrait"):
            if signals is not None and schedule is not None and p.config.run_dir is not None:
                picture = portrait(p, signals, schedule)
        kept, counts = Kept(content, learned, graph), {"propagated": float(local.reached), "graph_searched": 0.0}
        if graph is not None and p.comm.rank == 0:  # the same number on all ranks: counted once
            counts["graph_searched"] = float(graph.searched)
        if not math.isnan(content.density_ratio):
            counts["density_ratio"] = content.density_ratio if p.comm.rank == 0 else 0.0
    if p.arrange is not None and schedule is not None:
        schedule = p.arrange(schedule)
    with clock("broadcast"):
        schedule = broadcast_schedule(p.comm, schedule)
    counts |= {
        "anchors": float(len(table)),
        "received": float(len(received)),
        "losses_received": float(len(read)),
        "gathered_bytes": float(sent.bytes + sent_losses.bytes),
        "padding_dropped": float(sent.out_of_range),
        "nonfinite_dropped": float(sent.not_finite),
    }
    return Outcome(schedule, table, latest, kept, clock.seconds, counts, picture)


def rows_of(
    p: Pipeline, x: Inputs, own: IntArray, content: ContentFeatures, table: Table[Rows]
) -> tuple[Learned | None, FloatArray | None]:
    """What the model says of this rank's samples, and the rows of the one k-NN graph, for all that needs one.  Collective.

    Both are None where nothing needs a graph; the first where its rows are content alone.
    """
    wanted = "graph" in active_parts(p, x) or p.config.selection.objective == "facility_location"
    if not (wanted and p.config.builds_graph) or x.step < p.config.opening:  # while a run opens nothing is chosen
        return x.kept.learned, None
    assert content.vectors is not None  # the same parts ask for them
    shares = p.config.learned_shares
    if not any(shares):
        return None, content.vectors
    learned = learn(p.comm, x.kept.learned or Learned.empty(), own, table, x.kept.graph, p.config.seed)
    return learned, embed(content.vectors, learned.values, *shares)


def graph_of(p: Pipeline, x: Inputs, own: IntArray, rows: FloatArray | None) -> KeptGraph | None:
    """The one k-NN graph of the window over ``rows`` (n, d), for all that needs one; None without rows.  Collective."""
    if rows is None:
        return None
    return follow(p.comm, x.kept.graph, own, rows, p.config.graph, p.config.graph.drift, p.device)


def edges_on_root(p: Pipeline, own: IntArray, graph: KeptGraph | None) -> Neighbours | None:
    """The graph over all samples of the window, rows in order of id, for facility location; on root only, None elsewhere."""
    if graph is None or p.config.selection.objective != "facility_location":
        return None
    local = graph.neighbours()
    parts = [p.comm.gather(a) for a in (own, local.ids, local.similarity)]
    if p.comm.rank != 0:
        return None
    ids, neighbours, similarity = (np.concatenate(part) for part in parts if part is not None)
    order = np.argsort(ids, kind="stable")
    return Neighbours(neighbours[order], similarity[order])


def by_role(p: Pipeline, x: Inputs, table: Table[Rows], content: ContentFeatures) -> Seen | None:
    """Influences collected since the last schedule, core and audit apart, and as foretold; None but on root.  Collective.

    From the table, not from what has just come: a checkpoint in between must not change what is seen.
    """
    new = (table.last > x.since) & bool(len(x.core))
    expected = np.full(len(table), np.nan, np.float32)
    # Labels of a model's first steps mislead: the guard does not judge by what they predict.
    if p.config.guard.enabled and x.since >= p.config.learning and "gradients" in active_parts(p, x):
        expected = forecast(p.comm, content, table, ~new, x.reference)
    rows = table.rows.take(new)
    parts = [p.comm.gather(a) for a in (rows.ids, labels(rows, x.reference), expected[new])]
    if any(part is None for part in parts):
        return None
    ids, label, expected = (np.concatenate(part) for part in parts if part is not None)
    order = np.argsort(ids, kind="stable")  # the bootstrap must draw the same for any number of ranks
    ids, label, expected = ids[order], label[order], expected[order]
    core = np.isin(ids, x.core)
    audit = ~core if x.audit is None else np.isin(ids, x.audit)
    return Seen(label[core & ~audit], label[audit], expected, label)
