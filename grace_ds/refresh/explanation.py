"""Summarise what one refresh saw and decided: histograms of its signals, and a few samples with their reasons.

The summary is small enough to keep; ``grace-ds report`` draws it.  Belongs to the refresh's own layer, like
:mod:`grace_ds.refresh.choice`.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from grace_ds.recipes import Factors, log_importance, recipe
from grace_ds.records import Array, Role, Schedule, Signals
from grace_ds.refresh.choice import content_of
from grace_ds.refresh.projection import ProjectedSamples
from grace_ds.refresh.signals import RefreshContext

log = logging.getLogger("grace_ds")

BINS = 24
GROUP = 40  # samples of each group
_SALT = 0x9027


def explanation(context: RefreshContext, signals: Signals, schedule: Schedule) -> dict[str, Any] | None:
    """Return a JSON-able account of how ``schedule`` was made; on root.  At most some hundred kilobytes for any window.

    The schedule does not depend on it: an error here is logged, and the result is None.

    Returns:
        ``version``, ``step``, ``level`` (recipe of the probabilities), ``used`` (False if the order is uniform all the same),
        ``window`` (samples), ``histograms`` (name → ``edges``, ``window`` and ``core`` counts, ``unknown``) and ``samples``:
        ``id``, ``group`` (most, least, chosen, passed_over), ``chance`` relative to the most likely sample, ``factors`` whose
        product it is, ``signals`` (null if unknown), ``role``.  With ``context.chart`` also ``map``: where some of the window's
        samples lie, as ``ids``, ``x``, ``y``, ``explained``, ``chance``, ``influence``, ``loss``, ``crowding``, ``chosen``.
    """
    try:
        return _explanation(context, signals, schedule)
    except Exception as error:  # the account must not cost a refresh
        log.warning("refresh %d: no explanation of it can be kept (%s: %s)", schedule.version, type(error).__name__, error)
        return None


def _explanation(context: RefreshContext, signals: Signals, schedule: Schedule) -> dict[str, Any]:
    used = schedule.meta["objective"] != "uniform"
    level = recipe(str(schedule.meta.get("drawn_by") or schedule.meta["guard"]["level"]))
    if not level.content:  # selection is paused: explain the recipe that the guard judged
        level = content_of(context.recipe)
    factors = level.factors(signals, frozenset(schedule.meta.get("parts", ())))
    log_p = log_importance(level, signals, frozenset(schedule.meta.get("parts", ())))
    core = np.isin(signals.ids, schedule.ids[schedule.roles == Role.CORE])
    values = {
        "quality": signals.quality,
        "density": np.log2(1 + signals.density),
        "chance": log_p / np.log(10),
        "loss": signals.loss,
        "influence": signals.influence,
        "crowding": signals.crowding,
    }
    histograms = {name: _histogram(value, core) for name, value in values.items() if np.isfinite(value).any()}
    account = {
        "version": schedule.version,
        "step": schedule.meta["decided_at_step"],
        "level": level.name,
        "used": used,
        "window": len(signals.ids),
        "core": int(core.sum()),
        "histograms": histograms,
        "samples": _samples(context.config.seed, signals, factors, log_p, core, schedule),
    }
    return account if context.chart is None else {**account, "map": _map(context.chart(signals.ids), signals, log_p, core)}


def _map(places: ProjectedSamples, signals: Signals, log_p: Array, core: Array) -> dict[str, Any]:
    """Return the places with the signals of each sample; ``chance`` is its log10 relative to the likeliest of the window."""
    position = np.searchsorted(signals.ids, places.ids)
    return {
        "ids": places.ids.tolist(),
        "x": [_number(value) for value in places.xy[:, 0]],
        "y": [_number(value) for value in places.xy[:, 1]],
        "explained": [_number(value) for value in places.explained],
        "chance": [_number(value) for value in (log_p[position] - log_p.max()) / np.log(10)],
        "influence": [_number(value) for value in signals.influence[position]],
        "loss": [_number(value) for value in signals.loss[position]],
        "crowding": [_number(value) for value in signals.crowding[position]],
        "chosen": core[position].tolist(),
    }


def _histogram(values: Array, core: Array) -> dict[str, Any]:
    """Return the counts in ``BINS`` equal bins over the finite values, of the window and of the scheduled core."""
    known = np.isfinite(values)
    low, high = float(values[known].min()), float(values[known].max())
    span = (low, high if high > low else low + 1)
    counts, edges = np.histogram(
        values[known], BINS, span
    )  # given a span NumPy computes the bin of a value; given edges it would search
    return {
        "edges": [round(float(edge), 5) for edge in edges],
        "window": counts.tolist(),
        "core": np.histogram(values[known & core], BINS, span)[0].tolist(),
        "unknown": int((~known).sum()),
    }


def _samples(seed: int, signals: Signals, parts: Factors, log_p: Array, core: Array, schedule: Schedule) -> list[dict[str, Any]]:
    """Return the likeliest and the least likely samples, and draws from those in the schedule and those outside of it."""
    rng = np.random.Generator(np.random.Philox(key=[seed ^ _SALT, schedule.version]))
    # Many samples share the highest or the lowest chance; which of them are shown must not depend on their ids.
    tie = rng.random(len(log_p)) * 1e-9
    count = min(GROUP, len(log_p))
    groups = {
        "most": np.argpartition(-(log_p + tie), count - 1)[:count],
        "least": np.argpartition(log_p + tie, count - 1)[:count],
        "chosen": _draw(rng, np.flatnonzero(core)),
        "passed_over": _draw(rng, np.flatnonzero(~core)),
    }
    best, out, shown = float(log_p.max()), [], set()
    listed = np.isin(schedule.ids, signals.ids[np.unique(np.concatenate(list(groups.values())))])
    roles = dict(zip(schedule.ids[listed].tolist(), schedule.roles[listed].tolist(), strict=True))
    for group, positions in groups.items():
        for i in positions.tolist():
            if i in shown:
                continue
            shown.add(i)
            role = roles.get(int(signals.ids[i]))
            out.append(
                {
                    "id": int(signals.ids[i]),
                    "group": group,
                    "chance": _number(np.exp(log_p[i] - best)),
                    "factors": {name: _number(values[i]) for name, values in parts.items()},
                    "signals": {
                        name: _number(getattr(signals, name)[i])
                        for name in ("quality", "density", "loss", "influence", "crowding")
                    },
                    "role": Role(role).name.lower() if role is not None else None,
                }
            )
    return out


def _draw(rng: np.random.Generator, among: Array) -> Array:
    return rng.choice(among, min(GROUP, len(among)), replace=False) if len(among) else among


def _number(value: Any) -> float | None:
    return float(f"{float(value):.5g}") if np.isfinite(value) else None
