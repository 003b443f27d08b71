"""From signals to a schedule, on root: probabilities, coreset, exploration and audit slots, order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from grace_ds import registry
from grace_ds.config.schema import LEAST_COLLECTED, GraceConfig
from grace_ds.data.schedule import compose
from grace_ds.graph.propagate import priority
from grace_ds.recipes import Recipe, log_importance, recipe
from grace_ds.records import Array, Coreset, FloatArray, IntArray, Neighbours, Role, Schedule, Signals
from grace_ds.refresh.influence import enough_labels
from grace_ds.refresh.signals import Estimate, RefreshContext, RefreshInputs, weighed_parts
from grace_ds.selection.guard import Decision, Remembered, Window, contrast, decide, effective_share, heard, prediction_skill
from grace_ds.selection.gumbel import gumbel
from grace_ds.selection.objectives import select
from grace_ds.selection.sources import by_source

ANCHOR_SHARE = 1 / 32  # of the window: anchors from which scores reach the other samples over a few hops
SOURCES_TOLD = 64  # in a schedule's own account
_AUDIT_SALT = 0x5EED_A0D1  # keeps the audit draw apart from the coreset's


def choose(
    context: RefreshContext,
    inputs: RefreshInputs,
    start: int,
    estimate: Estimate,
    signals: Signals,
    edges: Neighbours | None,
    seen: Seen | None,
) -> Schedule:
    """The coreset and its order, on root.

    Args:
        estimate: root's own, for what it tells of all ranks.
        signals: of all ranks.
    """
    decision = judge(context, inputs, signals, seen)
    known = int(np.isfinite(signals.influence).sum())
    told = {"guard": decision.meta(), "known_loss": int(np.isfinite(signals.loss).sum()), "known_influence": known}
    if context.config.collects:
        told |= {
            "labels": estimate.labels,
            "explained": estimate.explained,
            "collect_every": collect_every(context, inputs, estimate, len(signals.ids)),
        }
    # A run opens on the pool as it is: the varied and repetitive text that a filter leaves out helps a fresh model off its
    # first plateau.
    if decision.level == "uniform" or inputs.step < context.config.warmup_steps:
        return uniform_schedule(context, inputs, start, told)
    c = context.config.selection
    whole = decision.level == context.recipe.name
    parts = weighed_by(context, inputs, decision)
    allowed = ~np.isin(signals.ids, context.exclude)
    k = max(1, round(context.config.budget * len(signals.ids)))
    log_p = log_importance(recipe(decision.level), signals, parts)
    labels = context.sources(signals.ids) if context.sources is not None else None
    coreset = draw(context, inputs, signals.ids, log_p, k, edges, labels)
    length = (inputs.interval + slack(context.config, inputs.interval)) * context.batch
    outside = allowed & ~np.isin(signals.ids, coreset.ids)
    # Audit slots pay only where gradients are collected to look at them.  Exploration pays in any case: a few samples of what
    # the filter leaves out are worth more than as many more of what it keeps, wherever it leaves out what the job is for.
    audits = round(c.audit * length) if whole and context.config.collects else 0
    explores = round(c.explore * length) if registry.objectives.get(c.objective).weighs else 0
    audit = _draw_audit(context, inputs, signals.ids[allowed], audits)
    wanted = priority(signals.staleness, signals.disagreement)
    explore = signals.ids[outside][_top(wanted[outside], signals.ids[outside], explores, context.config.seed, inputs.version)]
    if labels is not None:
        told |= {"sources": shares_told(labels, labels[np.searchsorted(signals.ids, coreset.ids)])}
    meta = {
        "objective": c.objective,
        "batch": context.batch,
        "window": len(signals.ids),
        "coreset": len(coreset.ids),
        "decided_at_step": inputs.step,
        "next_refresh_step": inputs.step + inputs.interval,
        "drawn_by": decision.level,
        "parts": sorted(parts),
        "effective_share": effective_share(log_p),
        **told,
    }
    return compose(
        coreset,
        length,
        visits=inputs.visits.of(coreset.ids),
        explore=explore,
        audit=audit,
        seed=context.config.seed,
        version=inputs.version,
        start=start,
        meta=meta,
    )


def draw(
    context: RefreshContext,
    inputs: RefreshInputs,
    ids: IntArray,
    log_p: Array,
    k: int,
    edges: Neighbours | None,
    labels: IntArray | None,
) -> Coreset:
    """A coreset of ``k`` of the window's ``ids`` (n,), sources of the blend apart where ``labels`` (n,) tell them."""
    c = context.config.selection

    def among(ids: IntArray, log_p: Array, k: int, include: IntArray, exclude: IntArray) -> Coreset:
        asked = {"seed": context.config.seed, "version": inputs.version}
        return select(c.objective, ids, log_p, k, **asked, neighbours=edges, include=include, exclude=exclude)

    if labels is None or c.shares == "free":
        return among(ids, log_p, k, context.include, context.exclude)
    # The rows of a graph are those of the whole window: a part of it is then drawn by excluding the others.
    return by_source(among, c.shares, labels, ids, log_p, k, context.include, context.exclude, whole=edges is not None)


def shares_told(window: IntArray, coreset: IntArray) -> dict[str, list[int]]:
    """How many samples each source has, from the labels of both; of the ``SOURCES_TOLD`` largest in the window."""
    names, within = np.unique(window, return_counts=True)
    chosen = np.bincount(np.searchsorted(names, coreset), minlength=len(names))
    top = np.sort(np.argsort(-within, kind="stable")[:SOURCES_TOLD])
    return {"names": names[top].tolist(), "window": within[top].tolist(), "coreset": chosen[top].tolist()}


@dataclass(frozen=True)
class Seen:
    """Influences collected since the last schedule, by role, on root; finite where they could be measured.

    Attributes:
        core, audit: (n,), (m,) float32, in units of the trusted median.
        predicted, measured: (l,) float32, of all of them: what older ones say of them (NaN: nothing), and what came.
    """

    core: FloatArray
    audit: FloatArray
    predicted: FloatArray
    measured: FloatArray


def judge(context: RefreshContext, inputs: RefreshInputs, signals: Signals, seen: Seen | None) -> Decision:
    """What this schedule may use: the recipe, or less where the guard says so."""
    config, most = context.config, context.recipe
    share = effective_share(log_importance(content_of(most), signals, frozenset()))
    if not config.guard.enabled:
        return Decision(most.name, "the guard is off", numbers={"effective_share": share})
    # Copies alone do not tell clean from dirty: they are worth thinning out in either.
    filters = most.trusted and np.isfinite(signals.quality).any()
    clean = config.guard.clean_share if filters or not most.content else float("inf")
    listens = "loss" in config.parts and config.collects and context.trusted is not None
    losses = heard(signals.loss_pass[_drawn_uniformly(inputs, signals)]) if listens else Remembered()
    window = Window(share, clean, losses, awaited=listens and inputs.step < config.learning)
    found = contrast(seen.core, seen.audit, config.guard.confidence, config.seed + inputs.version) if seen is not None else None
    known = prediction_skill(seen.predicted, seen.measured) if seen is not None else None
    return decide(most.name, inputs.version, window, found, inputs.decision, known)


def _drawn_uniformly(inputs: RefreshInputs, signals: Signals) -> Array:
    """(n,) bool: of the window's samples those read since the last schedule and drawn uniformly.

    All of them under a uniform schedule and in shadow mode, else the audit slots.
    """
    fresh = np.isfinite(signals.loss) & (signals.staleness <= inputs.step - inputs.since)
    return fresh if inputs.audit is None or not len(inputs.core) else fresh & np.isin(signals.ids, inputs.audit)


def collect_every(context: RefreshContext, inputs: RefreshInputs, estimate: Estimate, window: int) -> int:
    """Each how many optimizer steps one is to be collected until the next refresh: no more than the estimates need.

    They need enough labels for what content predicts of an influence, and anchors for the graph to start from.
    """
    least = context.config.collect_every
    if not estimate.labels or inputs.step < context.config.learning:
        return least
    most = max(least, context.config.refresh.interval_steps // LEAST_COLLECTED)
    needed = max(enough_labels(estimate.explained), ANCHOR_SHARE * window)
    return int(np.clip(inputs.collect_every * estimate.labels / needed, least, most)) if np.isfinite(needed) else least


def content_of(most: Recipe) -> Recipe:
    """What is left of a recipe without gradients and graph: the first that it falls back to and that uses neither."""
    while most.uses and most.fallback is not None:
        most = recipe(most.fallback)
    return most


def weighed_by(context: RefreshContext, inputs: RefreshInputs, decision: Decision) -> frozenset[str]:
    """The parts of the recipe that the importance of a sample is made of, under a decision of the guard.

    Facility location sees to diversity itself, so that dividing by the graph's density would count it twice.
    """
    if decision.level != context.recipe.name:
        return frozenset()
    twice = {"graph"} if context.config.covers else set()
    return weighed_parts(context, inputs) - twice - decision.off


def slack(config: GraceConfig, interval: int) -> int:
    """Optimizer steps that a schedule lasts beyond its interval."""
    asked = config.refresh.slack_steps
    return asked if asked >= 0 else max(1, interval // 4)


def uniform_schedule(
    context: RefreshContext, inputs: RefreshInputs, start: int, told: Mapping[str, Any] | None = None
) -> Schedule:
    """The corpus as the job's own sampler would give it, as a pure function of the position; on root."""
    length = (inputs.interval + slack(context.config, inputs.interval)) * context.batch
    return _in_order(context, inputs.version, inputs.step, start, length, inputs.step + inputs.interval, told or {})


def uniform_forever(context: RefreshContext, version: int, step: int, start: int) -> Schedule:
    """The corpus once in the order of the job's own sampler, then over and over; for a run that chooses no more.

    A pure function of its arguments, so that every rank makes it by itself.
    """
    return _in_order(context, version, step, start, context.pool.n, step + context.pool.n // context.batch, {})


def _in_order(
    context: RefreshContext, version: int, step: int, start: int, length: int, due: int, told: Mapping[str, Any]
) -> Schedule:
    """``length`` samples in the order of the job's own sampler from position ``start`` on; the next refresh at step ``due``."""
    ids = context.order(np.arange(start, start + length, dtype=np.int64))
    meta = {
        "objective": "uniform",
        "batch": context.batch,
        "window": context.pool.n,
        "coreset": context.pool.n,
        "decided_at_step": step,
        "next_refresh_step": due,
        **told,
    }
    roles, weights = np.full(length, Role.CORE, np.uint8), np.ones(length, np.float32)
    return Schedule(version, start, ids, roles, weights, context.config.seed, meta)


def _draw_audit(context: RefreshContext, inputs: RefreshInputs, ids: IntArray, count: int) -> IntArray:
    if not count:  # recipes without gradients: no noise for the whole window
        return ids[:0]
    noise = gumbel(context.config.seed ^ _AUDIT_SALT, inputs.version, ids)
    return ids[np.sort(np.argsort(-noise, kind="stable")[:count])]


def _top(score: Array, ids: IntArray, count: int, seed: int, version: int) -> Array:
    """Positions of the ``count`` largest scores; equal ones (the many never collected) in seeded random order."""
    return np.lexsort((gumbel(seed, version, ids), -score.astype(np.float64)))[:count]
