"""From signals to a schedule, on root: probabilities, coreset, exploration and audit slots, order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from grace_ds.config.schema import LEAST_COLLECTED, GraceConfig
from grace_ds.data.schedule import compose
from grace_ds.graph.propagate import priority
from grace_ds.recipes import Recipe, log_importance, recipe
from grace_ds.records import Array, Coreset, FloatArray, IntArray, Neighbours, Role, Schedule, Signals
from grace_ds.refresh.influence import enough_labels
from grace_ds.refresh.signals import Estimate, Inputs, Pipeline, weighed_parts
from grace_ds.selection.guard import Decision, Remembered, Window, contrast, decide, effective_share, foretold, heard
from grace_ds.selection.gumbel import gumbel
from grace_ds.selection.objectives import select
from grace_ds.selection.sources import by_source

ANCHOR_SHARE = 1 / 32  # of the window: anchors from which scores reach the other samples over a few hops
SOURCES_TOLD = 64  # in a schedule's own account
_AUDIT_SALT = 0x5EED_A0D1  # keeps the audit draw apart from the coreset's


def choose(p: Pipeline, x: Inputs, start: int, e: Estimate, s: Signals, edges: Neighbours | None, seen: Seen | None) -> Schedule:
    """The coreset and its order, on root.

    Args:
        e: root's own, for what it tells of all ranks.
        s: of all ranks.
    """
    decision = judge(p, x, s, seen)
    known = int(np.isfinite(s.align).sum())
    told = {"guard": decision.meta(), "known_loss": int(np.isfinite(s.loss).sum()), "known_align": known}
    if p.config.collects:
        told |= {"labels": e.labels, "explained": e.explained, "collect_every": collect_every(p, x, e, len(s.ids))}
    # A run opens on the pool as it is: the varied and repetitive text that a filter leaves out helps a fresh model off its
    # first plateau.
    if decision.level == "uniform" or x.step < p.config.opening:
        return uniform_schedule(p, x, start, told)
    c = p.config.selection
    whole = decision.level == p.recipe.name
    parts = weighed_by(p, x, decision)
    allowed = ~np.isin(s.ids, p.exclude)
    k = max(1, round(p.config.budget * len(s.ids)))
    log_p = log_importance(recipe(decision.level), s, parts)
    labels = p.sources(s.ids) if p.sources is not None else None
    coreset = draw(p, x, s.ids, log_p, k, edges, labels)
    length = (x.interval + slack(p.config, x.interval)) * p.batch
    outside = allowed & ~np.isin(s.ids, coreset.ids)
    # Audit slots pay only where gradients are collected to look at them.  Exploration pays in any case: a few samples of what
    # the filter leaves out are worth more than as many more of what it keeps, wherever it leaves out what the job is for.
    audits = round(c.audit * length) if whole and p.config.collects else 0
    explores = round(c.explore * length) if c.objective not in ("uniform", "rs2") else 0
    audit = _draw_audit(p, x, s.ids[allowed], audits)
    wanted = priority(s.staleness, s.disagreement)
    explore = s.ids[outside][_top(wanted[outside], s.ids[outside], explores, p.config.seed, x.version)]
    if labels is not None:
        told |= {"sources": shares_told(labels, labels[np.searchsorted(s.ids, coreset.ids)])}
    meta = {
        "objective": c.objective,
        "batch": p.batch,
        "window": len(s.ids),
        "coreset": len(coreset.ids),
        "decided_at_step": x.step,
        "next_refresh_step": x.step + x.interval,
        "drawn_by": decision.level,
        "parts": sorted(parts),
        "effective_share": effective_share(log_p),
        **told,
    }
    return compose(
        coreset,
        length,
        visits=x.ledger.of(coreset.ids),
        explore=explore,
        audit=audit,
        seed=p.config.seed,
        version=x.version,
        start=start,
        meta=meta,
    )


def draw(
    p: Pipeline, x: Inputs, ids: IntArray, log_p: Array, k: int, edges: Neighbours | None, labels: IntArray | None
) -> Coreset:
    """A coreset of ``k`` of the window's ``ids`` (n,), sources of the blend apart where ``labels`` (n,) tell them."""
    c = p.config.selection

    def among(ids: IntArray, log_p: Array, k: int, include: IntArray, exclude: IntArray) -> Coreset:
        asked = {"seed": p.config.seed, "version": x.version}
        return select(c.objective, ids, log_p, k, **asked, neighbours=edges, include=include, exclude=exclude)

    if labels is None or c.shares == "free":
        return among(ids, log_p, k, p.include, p.exclude)
    # The rows of a graph are those of the whole window: a part of it is then drawn by excluding the others.
    return by_source(among, c.shares, labels, ids, log_p, k, p.include, p.exclude, whole=edges is not None)


def shares_told(window: IntArray, coreset: IntArray) -> dict[str, list[int]]:
    """How many samples each source has, from the labels of both; of the ``SOURCES_TOLD`` largest in the window."""
    names, within = np.unique(window, return_counts=True)
    chosen = np.bincount(np.searchsorted(names, coreset), minlength=len(names))
    top = np.sort(np.argsort(-within, kind="stable")[:SOURCES_TOLD])
    return {"names": names[top].tolist(), "window": within[top].tolist(), "coreset": chosen[top].tolist()}


@dataclass(frozen=True)
class Seen:
    """Influences harvested since the last schedule, by role, on root; finite where they could be measured.

    Attributes:
        core, audit: (n,), (m,) float32, in units of the trusted median.
        predicted, measured: (l,) float32, of all of them: what older ones say of them (NaN: nothing), and what came.
    """

    core: FloatArray
    audit: FloatArray
    predicted: FloatArray
    measured: FloatArray


def judge(p: Pipeline, x: Inputs, s: Signals, seen: Seen | None) -> Decision:
    """What this schedule may use: the recipe, or less where the guard says so."""
    config, most = p.config, p.recipe
    share = effective_share(log_importance(content_of(most), s, frozenset()))
    if not config.guard.enabled:
        return Decision(most.name, "the guard is off", numbers={"effective_share": share})
    # Copies alone do not tell clean from dirty: they are worth thinning out in either.
    filters = most.trusted and np.isfinite(s.keep).any()
    clean = config.guard.clean_share if filters or not most.content else float("inf")
    listens = "loss" in config.parts and config.collects and p.trusted is not None
    losses = heard(s.loss_pass[_drawn_uniformly(x, s)]) if listens else Remembered()
    window = Window(share, clean, losses, awaited=listens and x.step < config.learning)
    found = contrast(seen.core, seen.audit, config.guard.confidence, config.seed + x.version) if seen is not None else None
    known = foretold(seen.predicted, seen.measured) if seen is not None else None
    return decide(most.name, x.version, window, found, x.decision, known)


def _drawn_uniformly(x: Inputs, s: Signals) -> Array:
    """(n,) bool: of the window's samples those read since the last schedule and drawn uniformly.

    All of them under a uniform schedule and in shadow mode, else the audit slots.
    """
    fresh = np.isfinite(s.loss) & (s.staleness <= x.step - x.since)
    return fresh if x.audit is None or not len(x.core) else fresh & np.isin(s.ids, x.audit)


def collect_every(p: Pipeline, x: Inputs, e: Estimate, window: int) -> int:
    """Each how many optimizer steps one is to be collected until the next refresh: no more than the estimates need.

    They need enough labels for what content predicts of an influence, and anchors for the graph to start from.
    """
    least = p.config.collect_every
    if not e.labels or x.step < p.config.learning:
        return least
    most = max(least, p.config.refresh.interval_steps // LEAST_COLLECTED)
    needed = max(enough_labels(e.explained), ANCHOR_SHARE * window)
    return int(np.clip(x.collect_every * e.labels / needed, least, most)) if np.isfinite(needed) else least


def content_of(most: Recipe) -> Recipe:
    """What is left of a recipe without gradients and graph: the first that it falls back to and that uses neither."""
    while most.uses and most.fallback is not None:
        most = recipe(most.fallback)
    return most


def weighed_by(p: Pipeline, x: Inputs, decision: Decision) -> frozenset[str]:
    """The parts of the recipe that the importance of a sample is made of, under a decision of the guard.

    Facility location sees to diversity itself, so that dividing by the graph's density would count it twice.
    """
    if decision.level != p.recipe.name:
        return frozenset()
    twice = {"graph"} if p.config.selection.objective == "facility_location" else set()
    return weighed_parts(p, x) - twice - decision.off


def slack(config: GraceConfig, interval: int) -> int:
    """Optimizer steps that a schedule lasts beyond its interval."""
    asked = config.refresh.slack_steps
    return asked if asked >= 0 else max(1, interval // 4)


def uniform_schedule(p: Pipeline, x: Inputs, start: int, told: Mapping[str, Any] | None = None) -> Schedule:
    """The corpus as the job's own sampler would give it, as a pure function of the position; on root."""
    length = (x.interval + slack(p.config, x.interval)) * p.batch
    return _in_order(p, x.version, x.step, start, length, x.step + x.interval, told or {})


def uniform_forever(p: Pipeline, version: int, step: int, start: int) -> Schedule:
    """The corpus once in the order of the job's own sampler, then over and over; for a run that chooses no more.

    A pure function of its arguments, so that every rank makes it by itself.
    """
    return _in_order(p, version, step, start, p.pool.n, step + p.pool.n // p.batch, {})


def _in_order(p: Pipeline, version: int, step: int, start: int, length: int, due: int, told: Mapping[str, Any]) -> Schedule:
    """``length`` samples in the order of the job's own sampler from position ``start`` on; the next refresh at step ``due``."""
    ids = p.order(np.arange(start, start + length, dtype=np.int64))
    meta = {
        "objective": "uniform",
        "batch": p.batch,
        "window": p.pool.n,
        "coreset": p.pool.n,
        "decided_at_step": step,
        "next_refresh_step": due,
        **told,
    }
    roles, weights = np.full(length, Role.CORE, np.uint8), np.ones(length, np.float32)
    return Schedule(version, start, ids, roles, weights, p.config.seed, meta)


def _draw_audit(p: Pipeline, x: Inputs, ids: IntArray, count: int) -> IntArray:
    if not count:  # recipes without gradients: no noise for the whole window
        return ids[:0]
    noise = gumbel(p.config.seed ^ _AUDIT_SALT, x.version, ids)
    return ids[np.sort(np.argsort(-noise, kind="stable")[:count])]


def _top(score: Array, ids: IntArray, count: int, seed: int, version: int) -> Array:
    """Positions of the ``count`` largest scores; equal ones (the many never harvested) in seeded random order."""
    return np.lexsort((gumbel(seed, version, ids), -score.astype(np.float64)))[:count]
