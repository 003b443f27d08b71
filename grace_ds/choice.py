"""From signals to a schedule, on root: probabilities, coreset, exploration and audit slots, order."""

from __future__ import annotations

import numpy as np

from grace_ds.config.schema import GraceConfig
from grace_ds.pool import Permutation
from grace_ds.propagate import priority
from grace_ds.records import Array, IntArray, Neighbours, Role, Schedule
from grace_ds.schedule import compose
from grace_ds.selection.objectives import select
from grace_ds.selection.prior import align_keep, combine, rank01
from grace_ds.selection.sample import gumbel
from grace_ds.signals import Inputs, Pipeline, Signals

_AUDIT_SALT = 0x5EED_A0D1  # keeps the audit draw apart from the coreset's


def choose(p: Pipeline, x: Inputs, start: int, s: Signals, edges: Neighbours | None) -> Schedule:
    """The coreset and its order, on root."""
    c = p.config.selection
    allowed = ~np.isin(s.ids, p.exclude)
    k = max(1, round(p.config.budget * len(s.ids)))
    log_p = log_probability(p.config, s)
    coreset = select(
        c.objective,
        s.ids,
        log_p,
        k,
        seed=p.config.seed,
        version=x.version,
        neighbours=edges,
        include=p.include,
        exclude=p.exclude,
    )
    length = (x.interval + slack(p.config, x.interval)) * p.batch
    outside = allowed & ~np.isin(s.ids, coreset.ids)
    audit = _draw_audit(p, x, s.ids[allowed], round(c.audit * length))
    wanted = priority(s.staleness, s.disagreement)
    explore = s.ids[outside][_top(wanted[outside], s.ids[outside], round(c.explore * length), p.config.seed, x.version)]
    meta = {
        "objective": c.objective,
        "batch": p.batch,
        "window": len(s.ids),
        "coreset": len(coreset.ids),
        "decided_at_step": x.step,
        "next_refresh_step": x.step + x.interval,
        "known_loss": int(np.isfinite(s.loss).sum()),
        "known_align": int(np.isfinite(s.align).sum()),
        "effective_share": effective_share(log_p),
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


def log_probability(config: GraceConfig, s: Signals) -> Array:
    """(n,) float64 log of the unnormalised selection probability (design: the two tiers multiply)."""
    c = config.selection
    keep = s.keep if c.prior and np.isfinite(s.keep).any() else None
    density = s.density if c.density else None
    tilt = rank01(s.loss) if c.loss_tilt and np.isfinite(s.loss).any() else None
    filtered = None
    if c.alignment and np.isfinite(s.align).any():
        # A sample of unknown alignment is neither kept nor dropped for it.
        filtered = np.where(np.isfinite(s.align), align_keep(s.align, 1.0), 1.0)
    return np.asarray(combine(keep, density, tilt, filtered, n=len(s.ids)))


def effective_share(log_p: Array) -> float:
    """(Σp)²/(N Σp²): 1 where every sample is equally likely, small where few carry all the probability."""
    p = np.exp(log_p - log_p.max())
    return float(p.sum() ** 2 / (len(p) * (p**2).sum()))


def slack(config: GraceConfig, interval: int) -> int:
    """Optimizer steps that a schedule lasts beyond its interval."""
    asked = config.refresh.slack_steps
    return asked if asked >= 0 else max(1, interval // 4)


def uniform_schedule(p: Pipeline, x: Inputs, start: int) -> Schedule:
    """The corpus in uniform order without replacement, as a pure function of the position; on root."""
    length = (x.interval + slack(p.config, x.interval)) * p.batch
    positions = np.arange(start, start + length, dtype=np.int64)
    ids = np.empty(length, np.int64)
    for epoch in np.unique(positions // p.pool.n):
        here = positions // p.pool.n == epoch
        ids[here] = Permutation(p.pool.n, p.config.seed + int(epoch))(positions[here] % p.pool.n)
    meta = {
        "objective": "uniform",
        "batch": p.batch,
        "window": p.pool.n,
        "coreset": p.pool.n,
        "decided_at_step": x.step,
        "next_refresh_step": x.step + x.interval,
    }
    roles = np.full(length, Role.CORE, np.uint8)
    return Schedule(x.version, start, ids, roles, np.ones(length, np.float32), p.config.seed, meta)


def _draw_audit(p: Pipeline, x: Inputs, ids: IntArray, count: int) -> IntArray:
    noise = gumbel(p.config.seed ^ _AUDIT_SALT, x.version, ids)
    return ids[np.sort(np.argsort(-noise, kind="stable")[:count])]


def _top(score: Array, ids: IntArray, count: int, seed: int, version: int) -> Array:
    """Positions of the ``count`` largest scores; equal ones (the many never harvested) in seeded random order."""
    return np.lexsort((gumbel(seed, version, ids), -score.astype(np.float64)))[:count]
