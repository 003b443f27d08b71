"""Turn signals into a schedule, on root: probabilities, coreset, exploration and audit slots, order."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
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
from grace_ds.selection.guard import Decision, Remembered, Window, contrast, decide, effective_share, loss_share, prediction_skill
from grace_ds.selection.gumbel import gumbel
from grace_ds.selection.objectives import select
from grace_ds.selection.sources import Learned, by_source

log = logging.getLogger("grace_ds")

ANCHOR_SHARE = 1 / 32  # of the window: enough anchors for scores to reach the other samples over a few hops
LOGGED = 8  # sources whose shares are logged
MOST_SOURCES = 64  # most sources that a schedule's meta lists
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
    """Choose the coreset and its order, on root.

    Args:
        start: stream position of the schedule's first slot.
        estimate: root's own, for its numbers over all ranks.
        signals: of all ranks.
        edges: the graph over the window, rows in order of id; None unless the objective needs it.
        seen: influences collected since the last schedule; None if there are none to judge by.
    """
    decision = judge(context, inputs, signals, seen)
    known = int(np.isfinite(signals.influence).sum())
    details = {"guard": decision.meta(), "known_loss": int(np.isfinite(signals.loss).sum()), "known_influence": known}
    if context.config.collects:
        details |= {
            "labels": estimate.labels,
            "explained": estimate.explained,
            "collect_every": collect_every(context, inputs, estimate, len(signals.ids)),
        }
    learned = learn_shares(context, inputs, signals.ids, seen)
    if learned is not None:
        details |= {"source_factors": learned.meta()}
    # A run starts on the unfiltered pool: the varied and repetitive text that a filter rejects helps a fresh model leave its
    # first plateau.
    if decision.level == "uniform" or inputs.step < context.config.warmup_steps:
        return uniform_schedule(context, inputs, start, details)
    selection = context.config.selection
    whole = decision.level == context.recipe.name
    parts = weighed_by(context, inputs, decision)
    allowed = ~np.isin(signals.ids, context.exclude)
    k = max(1, round(context.config.budget * (len(signals.ids) - len(context.closed))))
    log_p = log_importance(recipe(decision.level), signals, parts)
    labels = context.sources(signals.ids) if context.sources is not None else None
    coreset = draw(context, inputs, signals.ids, log_p, k, edges, labels, learned)
    length = (inputs.interval + slack(context.config, inputs.interval)) * context.batch
    outside = allowed & ~np.isin(signals.ids, coreset.ids)
    # Audit slots are useful only if gradients are collected to evaluate them.  Exploration is useful in any case: should the
    # filter reject what the job is for, a few rejected samples are worth more than as many further accepted ones.
    audits = round(selection.audit * length) if whole and context.config.collects else 0
    explores = round(selection.explore * length) if registry.objectives.get(selection.objective).weighs else 0
    audit = _draw_audit(context, inputs, signals.ids[allowed], audits)
    urgency = priority(signals.staleness, signals.disagreement)
    explore = signals.ids[outside][_top(urgency[outside], signals.ids[outside], explores, context.config.seed, inputs.version)]
    if labels is not None:
        shares = source_shares(labels, labels[np.searchsorted(signals.ids, coreset.ids)])
        details |= {"sources": shares}
        if learned is not None:
            log.info("schedule %d: shares of the sources: %s", inputs.version, in_words(shares))
    meta = {
        "objective": selection.objective,
        "batch": context.batch,
        "window": len(signals.ids),
        "coreset": len(coreset.ids),
        "decided_at_step": inputs.step,
        "next_refresh_step": inputs.step + inputs.interval,
        "drawn_by": decision.level,
        "parts": sorted(parts),
        "effective_share": effective_share(log_p),
        **details,
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
    learned: Learned | None = None,
) -> Coreset:
    """Draw a coreset of ``k`` of the window's ``ids`` (n,), from each source separately if there are ``labels``.

    Args:
        log_p: (n,) log importance.
        edges: the graph over the window, for objectives that need it.
        labels: (n,) source of each sample; None if sources are not known.
        learned: of the sources' shares; None unless they are learned.
    """
    selection = context.config.selection

    def among(ids: IntArray, log_p: Array, k: int, include: IntArray, exclude: IntArray) -> Coreset:
        keywords = {"seed": context.config.seed, "version": inputs.version}
        return select(selection.objective, ids, log_p, k, **keywords, neighbours=edges, include=include, exclude=exclude)

    if labels is None or selection.shares == "free":
        return among(ids, log_p, k, context.include, context.exclude)
    # The rows of a graph are those of the whole window, so a part of it is drawn by excluding the others.
    whole = edges is not None
    return by_source(among, selection.shares, labels, ids, log_p, k, context.include, context.exclude, whole, learned)


def learn_shares(context: RefreshContext, inputs: RefreshInputs, window: IntArray, seen: Seen | None) -> Learned | None:
    """Return what is learned of the sources' shares, from the last schedule's and the influences since; None if nothing is.

    Args:
        window: ids of the window.
    """
    selection = context.config.selection
    if selection.shares != "adapt" or context.sources is None:
        return None
    last = inputs.book.schedules[-1].meta if inputs.book.schedules else {}
    learned = Learned.of(last.get("source_factors", {}), selection.least_share, selection.most_share)
    if seen is None:
        return learned
    names, counts = np.unique(context.sources(window), return_counts=True)
    given = dict(zip(names.tolist(), (counts / counts.sum()).tolist(), strict=True))
    return learned.after(given, context.sources(seen.core_ids), seen.core)


def in_words(shares: Mapping[str, list[int]]) -> str:
    """Return the shares of window and coreset, those that differ most first, for the log; from :func:`source_shares`."""
    window, coreset = (np.array(shares[key]) / max(sum(shares[key]), 1) for key in ("window", "coreset"))
    order = np.argsort(-np.abs(coreset - window), kind="stable")[:LOGGED]
    return ", ".join(f"{shares['names'][i]}: {window[i]:.3f} → {coreset[i]:.3f}" for i in order)


def source_shares(window: IntArray, coreset: IntArray) -> dict[str, list[int]]:
    """Return the number of samples of each source in the window and in the coreset.

    Only the ``MOST_SOURCES`` largest sources of the window are listed.

    Args:
        window, coreset: source of each sample of either.

    Returns:
        ``names`` of the sources, and their counts in ``window`` and ``coreset``.
    """
    names, within = np.unique(window, return_counts=True)
    chosen = np.bincount(np.searchsorted(names, coreset), minlength=len(names))
    top = np.sort(np.argsort(-within, kind="stable")[:MOST_SOURCES])
    return {"names": names[top].tolist(), "window": within[top].tolist(), "coreset": chosen[top].tolist()}


@dataclass(frozen=True)
class Seen:
    """Influences collected since the last schedule, by role, on root; finite if they could be measured.

    Attributes:
        core, audit: (n,), (m,) float32, in units of the trusted median.
        core_ids: (n,) int64, the samples of ``core``.
        predicted, measured: (l,) float32, of all of them: predictions from older ones (NaN: none), and the measured values.
    """

    core: FloatArray
    audit: FloatArray
    predicted: FloatArray
    measured: FloatArray
    core_ids: IntArray = field(default_factory=lambda: np.empty(0, np.int64))


def judge(context: RefreshContext, inputs: RefreshInputs, signals: Signals, seen: Seen | None) -> Decision:
    """Decide what this schedule may use: the recipe, or less if the guard steps down."""
    config, full = context.config, context.recipe
    share = effective_share(log_importance(content_of(full), signals, frozenset()))
    if not config.guard.enabled:
        return Decision(full.name, "the guard is off", numbers={"effective_share": share})
    # Copies do not distinguish a clean pool from a dirty one: thinning them out is useful in both.
    filters = full.trusted and np.isfinite(signals.quality).any()
    clean = config.guard.clean_share if filters or not full.content else float("inf")
    uses_losses = "loss" in config.parts and config.collects and context.trusted is not None
    losses = loss_share(signals.loss_pass[_drawn_uniformly(inputs, signals)]) if uses_losses else Remembered()
    window = Window(share, clean, losses, awaited=uses_losses and inputs.step < config.learning)
    difference = (
        contrast(seen.core, seen.audit, config.guard.confidence, config.seed + inputs.version) if seen is not None else None
    )
    skill = prediction_skill(seen.predicted, seen.measured) if seen is not None else None
    return decide(full.name, inputs.version, window, difference, inputs.decision, skill)


def _drawn_uniformly(inputs: RefreshInputs, signals: Signals) -> Array:
    """Return which of the window's samples were drawn uniformly and read since the last schedule: (n,) bool.

    These are all samples read under a uniform schedule and in shadow mode, otherwise those of the audit slots.
    """
    fresh = np.isfinite(signals.loss) & (signals.staleness <= inputs.step - inputs.since)
    return fresh if inputs.audit is None or not len(inputs.core) else fresh & np.isin(signals.ids, inputs.audit)


def collect_every(context: RefreshContext, inputs: RefreshInputs, estimate: Estimate, window: int) -> int:
    """Return k such that every k-th optimizer step is collected until the next refresh, no more often than needed.

    The estimates need enough labels to predict influences from content, and enough anchors for the graph to start from.

    Args:
        window: number of samples in the window.
    """
    shortest = context.config.collect_every
    if not estimate.labels or inputs.step < context.config.learning:
        return shortest
    longest = max(shortest, context.config.refresh.interval_steps // LEAST_COLLECTED)
    needed = max(enough_labels(estimate.explained), ANCHOR_SHARE * window)
    return int(np.clip(inputs.collect_every * estimate.labels / needed, shortest, longest)) if np.isfinite(needed) else shortest


def content_of(full: Recipe) -> Recipe:
    """Return the first recipe that ``full`` falls back to and that uses neither gradients nor a graph."""
    while full.uses and full.fallback is not None:
        full = recipe(full.fallback)
    return full


def weighed_by(context: RefreshContext, inputs: RefreshInputs, decision: Decision) -> frozenset[str]:
    """Return the parts of the recipe that make up the importance of a sample, under a decision of the guard.

    Facility location provides diversity itself, so dividing by the graph's density would count it twice.
    """
    if decision.level != context.recipe.name:
        return frozenset()
    counted_twice = {"graph"} if context.config.covers else set()
    return weighed_parts(context, inputs) - counted_twice - decision.off


def slack(config: GraceConfig, interval: int) -> int:
    """Return the optimizer steps that a schedule lasts beyond its interval."""
    configured = config.refresh.slack_steps
    return configured if configured >= 0 else max(1, interval // 4)


def uniform_schedule(
    context: RefreshContext, inputs: RefreshInputs, start: int, details: Mapping[str, Any] | None = None
) -> Schedule:
    """Return the corpus in the order of the job's own sampler, as a pure function of the position; on root.

    Args:
        details: further entries of the schedule's ``meta``.
    """
    length = (inputs.interval + slack(context.config, inputs.interval)) * context.batch
    return _in_order(context, inputs.version, inputs.step, start, length, inputs.step + inputs.interval, details or {})


def uniform_forever(context: RefreshContext, version: int, step: int, start: int) -> Schedule:
    """Return the corpus once in the order of the job's own sampler, to be repeated; for a run that chooses no more.

    A pure function of its arguments, so that every rank can make it locally.
    """
    length = context.pool.n or context.pool.size
    return _in_order(context, version, step, start, length, step + length // context.batch, {})


def _in_order(
    context: RefreshContext, version: int, step: int, start: int, length: int, due: int, details: Mapping[str, Any]
) -> Schedule:
    """Return ``length`` samples in the job sampler's order from position ``start`` on; the next refresh is at step ``due``."""
    ids = context.order(np.arange(start, start + length, dtype=np.int64))
    meta = {
        "objective": "uniform",
        "batch": context.batch,
        "window": context.pool.n or context.pool.size,
        "coreset": context.pool.n or context.pool.size,
        "decided_at_step": step,
        "next_refresh_step": due,
        **details,
    }
    roles, weights = np.full(length, Role.CORE, np.uint8), np.ones(length, np.float32)
    return Schedule(version, start, ids, roles, weights, context.config.seed, meta)


def _draw_audit(context: RefreshContext, inputs: RefreshInputs, ids: IntArray, count: int) -> IntArray:
    if not count:  # recipes without gradients need no noise for the whole window
        return ids[:0]
    noise = gumbel(context.config.seed ^ _AUDIT_SALT, inputs.version, ids)
    return ids[np.sort(np.argsort(-noise, kind="stable")[:count])]


def _top(score: Array, ids: IntArray, count: int, seed: int, version: int) -> Array:
    """Return the positions of the ``count`` largest scores; ties (the many never collected) in seeded random order."""
    return np.lexsort((gumbel(seed, version, ids), -score.astype(np.float64)))[:count]
