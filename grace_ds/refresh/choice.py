"""Turn signals into a schedule: probabilities, coreset, exploration and audit slots, order.

The signals of a sample stay with the rank that owns it.  Every rank takes part in each draw with its own samples, and only the
samples that find a slot in the schedule go to root, which puts them in order.  So root holds a schedule, not the window.

What the guard and the sources' shares conclude from the influences of the last schedule is concluded on root, and told to the
other ranks: all ranks must decide alike, whatever their processors make of a logarithm.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from grace_ds import registry
from grace_ds.comm.base import Comm
from grace_ds.comm.statistics import Keys, broadcast_json, by_lower_id, float_keys, highest, int_keys, top, total
from grace_ds.config.schema import LEAST_COLLECTED, GraceConfig
from grace_ds.data.schedule import compose
from grace_ds.errors import DataError
from grace_ds.graph.propagate import priority
from grace_ds.recipes import Recipe, log_importance, recipe
from grace_ds.records import Array, Coreset, FloatArray, IntArray, Neighbours, Role, Schedule, Signals
from grace_ds.refresh.influence import enough_labels
from grace_ds.refresh.signals import Estimate, RefreshContext, RefreshInputs, weighed_parts
from grace_ds.selection.guard import (
    Decision,
    Remembered,
    Window,
    contrast,
    decide,
    effective_share,
    from_meta,
    loss_share,
    prediction_skill,
)
from grace_ds.selection.gumbel import gumbel, random_words
from grace_ds.selection.objectives import select
from grace_ds.selection.sources import Learned, by_source, source_counts

log = logging.getLogger("grace_ds")

ANCHOR_SHARE = 1 / 32  # of the window: enough anchors for scores to reach the other samples over a few hops
LOGGED = 8  # sources whose shares are logged
MOST_SOURCES = 64  # most sources that a schedule's meta lists
TRIED = 64  # samples whose factors are computed a second time, without the others
WHOLE = 1 << 14  # members of a coreset that goes to root as a whole, even if the schedule has fewer slots
_SLOTS = 3  # ``purpose`` of the random words that give slots to members; 1 and 2 are those of the objectives
_AUDIT_SALT = 0x5EED_A0D1  # keeps the audit draw apart from the coreset's


def choose(
    context: RefreshContext,
    inputs: RefreshInputs,
    start: int,
    estimate: Estimate,
    signals: Signals,
    edges: Neighbours | None,
    seen: Seen | None,
) -> Schedule | None:
    """Choose the coreset and its order.  Collective; returns the schedule on root, None on the other ranks.

    Args:
        start: stream position of the schedule's first slot.
        estimate: this rank's own, for its numbers over all ranks.
        signals: of the samples that this rank owns.
        edges: the graph of the window, the rows of these samples; None unless the objective needs it.
        seen: influences collected since the last schedule; on root, None elsewhere and if there are none to judge by.
    """
    comm, config = context.comm, context.config
    decision = judge(context, inputs, signals, seen)
    measured = (int(np.isfinite(values).sum()) for values in (signals.loss, signals.influence))
    window, loss, influence = total(comm, len(signals.ids), *measured)
    details = {"guard": decision.meta(), "known_loss": loss, "known_influence": influence}
    if config.collects:
        details |= {
            "labels": estimate.labels,
            "explained": estimate.explained,
            "collect_every": collect_every(context, inputs, estimate, window),
        }
    labels = context.sources(signals.ids) if context.sources is not None else None
    learned = learn_shares(context, inputs, labels, seen)
    if learned is not None:
        details |= {"source_factors": learned.meta()}
    # A run starts on the unfiltered pool: the varied and repetitive text that a filter rejects helps a fresh model leave its
    # first plateau.
    if decision.level == "uniform" or inputs.step < config.warmup_steps:
        return uniform_schedule(context, inputs, start, details) if comm.rank == 0 else None
    selection = config.selection
    whole = decision.level == context.recipe.name
    parts = weighed_by(context, inputs, decision)
    allowed = ~np.isin(signals.ids, context.exclude)
    k = max(1, round(config.budget * (window - len(context.closed))))
    log_p = importance(recipe(decision.level), signals, parts)
    coreset = draw(context, inputs, signals.ids, log_p, k, edges, labels, learned)
    length = (inputs.interval + slack(config, inputs.interval)) * context.batch
    outside = np.flatnonzero(allowed & ~np.isin(signals.ids, coreset.ids))
    # Audit slots are useful only if gradients are collected to evaluate them.  Exploration is useful in any case: should the
    # filter reject what the job is for, a few rejected samples are worth more than as many further accepted ones.
    audits = round(selection.audit * length) if whole and config.collects else 0
    explores = round(selection.explore * length) if registry.objectives.get(selection.objective).weighs else 0
    audit = _draw_audit(context, inputs, signals.ids[allowed], audits)
    explore = _draw_explored(context, inputs, signals, outside, explores)
    if labels is not None:
        shares = source_shares(comm, labels, labels[np.searchsorted(signals.ids, coreset.ids)])
        details |= {"sources": shares}
        if learned is not None and comm.rank == 0:
            log.info("schedule %d: shares of the sources: %s", inputs.version, in_words(shares))
    members, effective = total(comm, len(coreset.ids))[0], effective_share(log_p, comm)
    slots = scheduled(context, inputs, coreset, length)
    if slots is None or explore is None or audit is None:
        return None
    meta = {
        "objective": selection.objective,
        "batch": context.batch,
        "window": window,
        "coreset": members,
        "decided_at_step": inputs.step,
        "next_refresh_step": inputs.step + inputs.interval,
        "drawn_by": decision.level,
        "parts": sorted(parts),
        "effective_share": effective,
        **details,
    }
    drawn, visits = slots
    seed, version = config.seed, inputs.version
    return compose(drawn, length, visits=visits, explore=explore, audit=audit, seed=seed, version=version, start=start, meta=meta)


def importance(of: Recipe, signals: Signals, parts: frozenset[str]) -> Array:
    """Return the log importance of this rank's samples, (n,) float64.

    Raises:
        DataError: a sample's factor depends on which other samples this rank has.
    """
    log_p = log_importance(of, signals, parts)
    few = Signals(**{f.name: getattr(signals, f.name)[:TRIED] for f in fields(Signals)})
    if len(log_p) > TRIED and not np.array_equal(log_importance(of, few, parts), log_p[:TRIED], equal_nan=True):
        raise DataError(
            f"recipe {of.name}: the factors of a sample depend on the other samples that they are computed with, so they would "
            "change with the number of ranks; use each sample's own signals only (loss_rank and sparseness are relative to the "
            "window)"
        )
    return log_p


def scheduled(context: RefreshContext, inputs: RefreshInputs, coreset: Coreset, slots: int) -> tuple[Coreset, IntArray] | None:
    """Return the members of the coreset that find a slot, and how often each was trained on; on root, None elsewhere.

    Collective.  A coreset that is larger than its slots gives its least visited members, and of equally often visited ones
    those that a random word picks.  A small one goes to root as a whole.

    Args:
        coreset: this rank's part.
        slots: of the schedule.
    """
    comm, visits = context.comm, inputs.visits.of(coreset.ids)
    if total(comm, len(coreset.ids))[0] > max(slots, WHOLE):
        words = random_words(context.config.seed, inputs.version, _SLOTS, coreset.ids)
        stays = top(comm, slots, ~int_keys(visits), lambda at: words[at], by_lower_id(coreset.ids))
        coreset, visits = Coreset(coreset.ids[stays], coreset.weights[stays]), visits[stays]
    parts = [comm.gather(array) for array in (coreset.ids, coreset.weights, visits)]
    if comm.rank != 0:
        return None
    ids, weights, visits = (np.concatenate(part) for part in parts if part is not None)
    order = np.argsort(ids)
    return Coreset(ids[order], weights[order]), visits[order]


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
    """Draw a coreset of ``k`` samples of the window, from each source separately if there are ``labels``.  Collective.

    Args:
        ids: (n,) this rank's samples of the window.
        log_p: (n,) log importance.
        k: members over all ranks.
        edges: the graph of the window, the rows of ``ids``, for objectives that need it.
        labels: (n,) source of each sample; None if sources are not known.
        learned: of the sources' shares; None unless they are learned.

    Returns:
        The members that this rank owns.
    """
    selection, comm = context.config.selection, context.comm

    def among(ids: IntArray, log_p: Array, k: int, include: IntArray, exclude: IntArray) -> Coreset:
        bounds = {"include": include, "exclude": exclude}
        seed, version = context.config.seed, inputs.version
        return select(selection.objective, ids, log_p, k, seed=seed, version=version, neighbours=edges, comm=comm, **bounds)

    if labels is None or selection.shares == "free":
        return among(ids, log_p, k, context.include, context.exclude)
    # The rows of a graph are those of the whole window, so a part of it is drawn by excluding the others.
    whole = edges is not None
    return by_source(among, selection.shares, labels, ids, log_p, k, context.include, context.exclude, whole, learned, comm)


def learn_shares(context: RefreshContext, inputs: RefreshInputs, labels: IntArray | None, seen: Seen | None) -> Learned | None:
    """Return what is learned of the sources' shares, from the last schedule's and the influences since; None if nothing is.

    Collective; equal on all ranks.

    Args:
        labels: (n,) source of each of this rank's samples of the window; None if sources are not known.
        seen: as in :func:`choose`.
    """
    selection, comm = context.config.selection, context.comm
    if selection.shares != "adapt" or context.sources is None or labels is None:
        return None
    last = inputs.book.schedules[-1].meta if inputs.book.schedules else {}
    learned = Learned.of(last.get("source_factors", {}), selection.least_share, selection.most_share)
    names, counts = source_counts(comm, labels)
    if seen is not None:
        given = dict(zip(names.tolist(), (counts / counts.sum()).tolist(), strict=True))
        learned = learned.after(given, context.sources(seen.core_ids), seen.core)
    return Learned.of(broadcast_json(comm, learned.meta()), selection.least_share, selection.most_share)


def in_words(shares: Mapping[str, list[int]]) -> str:
    """Return the shares of window and coreset, those that differ most first, for the log; from :func:`source_shares`."""
    window, coreset = (np.array(shares[key]) / max(sum(shares[key]), 1) for key in ("window", "coreset"))
    order = np.argsort(-np.abs(coreset - window), kind="stable")[:LOGGED]
    return ", ".join(f"{shares['names'][i]}: {window[i]:.3f} → {coreset[i]:.3f}" for i in order)


def source_shares(comm: Comm, window: IntArray, coreset: IntArray) -> dict[str, list[int]]:
    """Return the number of samples of each source in the window and in the coreset.  Collective.

    Only the ``MOST_SOURCES`` largest sources of the window are listed.

    Args:
        window, coreset: source of each of this rank's samples of either.

    Returns:
        ``names`` of the sources, and their counts in ``window`` and ``coreset``.
    """
    names, within = source_counts(comm, window)
    chosen = comm.allreduce(np.bincount(np.searchsorted(names, coreset), minlength=len(names)).astype(np.int64))
    most = np.sort(np.argsort(-within, kind="stable")[:MOST_SOURCES])
    return {"names": names[most].tolist(), "window": within[most].tolist(), "coreset": chosen[most].tolist()}


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
    """Decide what this schedule may use: the recipe, or less if the guard steps down.  Collective; equal on all ranks.

    Args:
        signals: of the samples that this rank owns.
        seen: as in :func:`choose`.
    """
    config, full, comm = context.config, context.recipe, context.comm
    share = effective_share(importance(content_of(full), signals, frozenset()), comm)
    if not config.guard.enabled:
        return Decision(full.name, "the guard is off", numbers={"effective_share": share})
    # Copies do not distinguish a clean pool from a dirty one: thinning them out is useful in both.
    filters = full.trusted and total(comm, int(np.isfinite(signals.quality).any()))[0] > 0
    clean = config.guard.clean_share if filters or not full.content else float("inf")
    uses_losses = "loss" in config.parts and config.collects and context.trusted is not None
    losses = loss_share(signals.loss_pass[_drawn_uniformly(inputs, signals)], comm) if uses_losses else Remembered()
    window = Window(share, clean, losses, awaited=uses_losses and inputs.step < config.learning)
    difference = (
        contrast(seen.core, seen.audit, config.guard.confidence, config.seed + inputs.version) if seen is not None else None
    )
    skill = prediction_skill(seen.predicted, seen.measured) if seen is not None else None
    decision = decide(full.name, inputs.version, window, difference, inputs.decision, skill)
    told = from_meta(broadcast_json(comm, decision.meta()))
    return decision if comm.rank == 0 or told is None else told


def _drawn_uniformly(inputs: RefreshInputs, signals: Signals) -> Array:
    """Return which of the window's samples were drawn uniformly and read since the last schedule: (n,) bool.

    These are all samples read under a uniform schedule and in shadow mode, otherwise those of the audit slots.
    """
    fresh: Array = np.isfinite(signals.loss) & (signals.staleness <= inputs.step - inputs.since)
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


def _draw_audit(context: RefreshContext, inputs: RefreshInputs, ids: IntArray, count: int) -> IntArray | None:
    """Draw ``count`` of all ranks' ``ids`` (n,) uniformly; sorted, on root, None elsewhere.  Collective."""
    keys = np.empty(len(ids), np.uint64)
    if count:  # recipes without gradients need no noise for the whole window
        keys = float_keys(gumbel(context.config.seed ^ _AUDIT_SALT, inputs.version, ids))
    drawn = context.comm.gather(ids[top(context.comm, count, keys, by_lower_id(ids))])
    return None if drawn is None else np.sort(np.concatenate(drawn))


def _draw_explored(
    context: RefreshContext, inputs: RefreshInputs, signals: Signals, outside: IntArray, count: int
) -> IntArray | None:
    """Return the ``count`` samples of all ranks of the highest re-scoring priority, that first; on root, None elsewhere.

    Collective.  Ties (the many never collected) are in seeded random order.

    Args:
        outside: (n,) positions of this rank's samples that may be explored.
    """
    comm = context.comm
    maxima = (highest(comm, column[np.isfinite(column)], 0.0) for column in (signals.staleness, signals.disagreement))
    score = float_keys(priority(signals.staleness[outside], signals.disagreement[outside], *maxima))
    ids = signals.ids[outside]

    def early(at: IntArray) -> Keys:
        return ~float_keys(gumbel(context.config.seed, inputs.version, ids[at]))

    chosen = np.flatnonzero(top(comm, count, score, early, by_lower_id(ids)))
    parts = [comm.gather(array) for array in (ids[chosen], score[chosen], early(chosen))]
    if comm.rank != 0:
        return None
    ids, score, noise = (np.concatenate(part) for part in parts if part is not None)
    return ids[np.lexsort((ids, ~noise, ~score))]
