"""The straight line: harvested rows in, the next schedule out, one statement a stage, the same on every rank.

    gather → table → features → graph → propagate → select → broadcast

A refresh is a function of its inputs: it changes nothing outside.  If any rank raises, every rank leaves with an
exception and the caller keeps the old table and the old schedule.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from grace_ds.broadcast import activation, broadcast_schedule
from grace_ds.choice import Seen, choose, uniform_schedule
from grace_ds.comm.base import Comm
from grace_ds.config.schema import GraceConfig
from grace_ds.errors import during
from grace_ds.features import ContentFeatures
from grace_ds.gather import gather_rows
from grace_ds.graph.build import knn
from grace_ds.influence import labels
from grace_ds.portrait import portrait
from grace_ds.records import IntArray, Neighbours, Rows, Schedule
from grace_ds.signals import Inputs, Pipeline, collect, spread
from grace_ds.table import Table, owner_of


@dataclass(frozen=True)
class Outcome:
    """What a refresh made.

    Attributes:
        schedule: all ranks alike.
        table: this rank's.
        seconds: by stage.
        counts: of this rank.
        portrait: how the schedule came about, for ``run_dir``; on root only, None without one or where nothing was weighed.
    """

    schedule: Schedule
    table: Table
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
        received, dropped = gather_rows(p.comm, x.rows, p.pool.n)
    with clock("table"):
        window = p.pool.window_at(x.version)
        own = window[owner_of(window, p.comm.size) == p.comm.rank]
        table = x.table.merge(received).keep(window)
    picture = None
    if x.uniform:
        with clock("select"):
            schedule = uniform_schedule(p, x, start) if p.comm.rank == 0 else None
    else:
        with clock("features"):
            content = p.contents(own)
        with clock("graph"):
            graph = anchors_of(p, own, content, table)
        with clock("propagate"):
            local = spread(p, x, own, content, table, graph)
        with clock("select"):
            edges = window_graph(p, own, content) if p.config.selection.objective == "facility_location" else None
            signals = collect(p.comm, local)
            seen = by_role(p.comm, x, table)
            schedule = choose(p, x, start, signals, edges, seen) if signals is not None else None
        with clock("portrait"):
            if signals is not None and schedule is not None and p.config.run_dir is not None:
                picture = portrait(p.config, signals, schedule, p.chart)
    if p.arrange is not None and schedule is not None:
        schedule = p.arrange(schedule)
    with clock("broadcast"):
        schedule = broadcast_schedule(p.comm, schedule)
    counts = {
        "anchors": float(len(table)),
        "received": float(len(received)),
        "padding_dropped": float(dropped.out_of_range),
        "nonfinite_dropped": float(dropped.not_finite),
    }
    return Outcome(schedule, table, clock.seconds, counts, picture)


def anchors_of(p: Pipeline, own: IntArray, content: ContentFeatures, table: Table) -> Neighbours | None:
    """For every sample of this rank its k nearest harvested samples of all ranks.

    None where nothing is harvested yet, or where nothing is to be carried along the edges.
    """
    if content.vectors is None or not carries(p.config):
        return None
    anchor = table.lookup(own) >= 0
    return knn(p.comm, own, content.vectors, own[anchor], content.vectors[anchor], p.config.graph)


def carries(config: GraceConfig) -> bool:
    """Whether a refresh carries anything from harvested samples to others along the k-NN graph."""
    return config.graph.residuals or config.selection.loss_tilt


def window_graph(p: Pipeline, own: IntArray, content: ContentFeatures) -> Neighbours | None:
    """The k-NN graph over all samples of the window, rows in order of id; on root only, None elsewhere."""
    assert content.vectors is not None  # the config check asks for features
    local = knn(p.comm, own, content.vectors, own, content.vectors, p.config.graph)
    assert local is not None
    parts = [p.comm.gather(a) for a in (own, local.ids, local.similarity)]
    if p.comm.rank != 0:
        return None
    ids, neighbours, similarity = (np.concatenate(part) for part in parts if part is not None)
    order = np.argsort(ids, kind="stable")
    return Neighbours(neighbours[order], similarity[order])


def by_role(comm: Comm, x: Inputs, table: Table) -> Seen | None:
    """Influences of the samples harvested since the last schedule, core and audit apart; None but on root.  Collective.

    From the table, not from what has just come: a checkpoint in between must not change what is seen.
    """
    rows = table.rows.take(table.rows.step > x.since) if len(x.core) else Rows.empty(table.dim)
    parts = [comm.gather(a) for a in (rows.ids, labels(rows, x.reference))]
    if parts[0] is None or parts[1] is None:
        return None
    ids, label = np.concatenate(parts[0]), np.concatenate(parts[1])
    order = np.argsort(ids, kind="stable")  # the bootstrap must draw the same for any number of ranks
    ids, label = ids[order], label[order]
    core = np.isin(ids, x.core)
    audit = ~core if x.audit is None else np.isin(ids, x.audit)
    return Seen(label[core & ~audit], label[audit])
