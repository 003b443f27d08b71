"""Summarise what one refresh saw and decided: histograms of its signals, and a few samples with their reasons.

The summary is small enough to keep; ``grace-ds report`` draws it.  Belongs to the refresh's own layer, like
:mod:`grace_ds.refresh.choice`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.comm.statistics import by_lower_id, float_keys, highest, top, total
from grace_ds.recipes import log_importance, recipe
from grace_ds.records import Array, IntArray, Role, Schedule, Signals
from grace_ds.refresh.choice import content_of
from grace_ds.refresh.projection import ProjectedSamples, mapped
from grace_ds.refresh.signals import RefreshContext
from grace_ds.selection.gumbel import random_words

log = logging.getLogger("grace_ds")

BINS = 24
GROUPS = ("most", "least", "chosen", "passed_over")
GROUP = 40  # samples of each group
SHOWN = ("quality", "density", "loss", "influence", "crowding")  # signals of a sample that are shown
_PURPOSE = 0x9027  # of the random words that decide which samples are shown

Columns = Mapping[str, Array]


def explanation(context: RefreshContext, signals: Signals, schedule: Schedule) -> dict[str, Any] | None:
    """Return a JSON-able account of how ``schedule`` was made; on root, None elsewhere.  Collective.

    At most some hundred kilobytes for any window: the ranks add up histograms, and send root the samples that are shown.  The
    schedule does not depend on the account: an error of root's own is logged, and the result is None.

    Args:
        signals: of the samples that this rank owns.

    Returns:
        ``version``, ``step``, ``level`` (recipe of the probabilities), ``used`` (False if the order is uniform all the same),
        ``window`` (samples), ``histograms`` (name → ``edges``, ``window`` and ``core`` counts, ``unknown``) and ``samples``:
        ``id``, ``group`` (most, least, chosen, passed_over), ``chance`` relative to the most likely sample, ``factors`` whose
        product it is, ``signals`` (null if unknown), ``role``.  With ``context.chart`` also ``map``: where some of the window's
        samples lie, as ``ids``, ``x``, ``y``, ``explained``, ``chance``, ``influence``, ``loss``, ``crowding``, ``chosen``.
    """
    comm = context.comm
    level = recipe(str(schedule.meta.get("drawn_by") or schedule.meta["guard"]["level"]))
    if not level.content:  # selection is paused: explain the recipe that the guard judged
        level = content_of(context.recipe)
    parts = frozenset(schedule.meta.get("parts", ()))
    factors, log_p = level.factors(signals, parts), log_importance(level, signals, parts)
    core = np.isin(signals.ids, schedule.ids[schedule.roles == Role.CORE])
    best = highest(comm, log_p)
    window, n_core = total(comm, len(core), int(core.sum()))
    account = {
        "version": schedule.version,
        "step": schedule.meta["decided_at_step"],
        "level": level.name,
        "used": schedule.meta["objective"] != "uniform",
        "window": window,
        "core": n_core,
        "histograms": _histograms(comm, signals, log_p, core),
    }
    columns = {"chance": log_p - best, "core": core.astype(np.float64)}
    columns |= {name: np.asarray(getattr(signals, name), np.float64) for name in SHOWN}
    names = sorted({name for part in comm.allgather(_text(list(factors))) for name in json.loads(part.tobytes())})
    columns |= {f"factor {name}": np.asarray(factors.get(name, np.ones(len(core))), np.float64) for name in names}
    groups = [_gathered(comm, signals.ids, columns, which) for which in _groups(context, signals.ids, schedule, log_p, core)]
    (charted,) = total(comm, int(context.chart is not None))
    shown = _gathered(comm, signals.ids, columns, mapped(comm, context.config.seed, signals.ids)) if charted else None
    if comm.rank != 0:
        return None
    try:
        account["samples"] = _samples(groups, names, schedule)
        return account if context.chart is None or shown is None else {**account, "map": _map(context.chart(shown[0]), *shown)}
    except Exception as error:  # the account must not cost a refresh
        log.warning("refresh %d: no explanation of it can be kept (%s: %s)", schedule.version, type(error).__name__, error)
        return None


def _text(value: Any) -> Array:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _gathered(comm: Comm, ids: IntArray, columns: Columns, which: Array) -> tuple[IntArray, Columns]:
    """Return the samples of all ranks for which ``which`` (n,) holds, in order of id, with their columns; on root.  Collective.

    No samples on the other ranks.
    """
    found = comm.gather(ids[which])
    rows = comm.gather(np.stack([column[which] for column in columns.values()], 1))
    if found is None or rows is None:
        return ids[:0], {}
    order = np.argsort(np.concatenate(found))
    table = np.concatenate(rows)[order]
    return np.concatenate(found)[order], dict(zip(columns, table.T, strict=True))


def _map(places: ProjectedSamples, ids: IntArray, columns: Columns) -> dict[str, Any]:
    """Return the places with the signals of each sample; ``chance`` is its log10 relative to the likeliest of the window."""
    position = np.searchsorted(ids, places.ids)
    return {
        "ids": places.ids.tolist(),
        "x": [_number(value) for value in places.xy[:, 0]],
        "y": [_number(value) for value in places.xy[:, 1]],
        "explained": [_number(value) for value in places.explained],
        "chance": [_number(value) for value in columns["chance"][position] / np.log(10)],
        "influence": [_number(value) for value in columns["influence"][position]],
        "loss": [_number(value) for value in columns["loss"][position]],
        "crowding": [_number(value) for value in columns["crowding"][position]],
        "chosen": (columns["core"][position] > 0).tolist(),
    }


def _histograms(comm: Comm, signals: Signals, log_p: Array, core: Array) -> dict[str, Any]:
    """Return the histograms of the signals that are known of any sample.  Collective."""
    values = {
        "quality": signals.quality,
        "density": np.log2(1 + signals.density),
        "chance": log_p / np.log(10),
        "loss": signals.loss,
        "influence": signals.influence,
        "crowding": signals.crowding,
    }
    found = {name: _histogram(comm, value, core) for name, value in values.items()}
    return {name: one for name, one in found.items() if one is not None}


def _histogram(comm: Comm, values: Array, core: Array) -> dict[str, Any] | None:
    """Return the counts in ``BINS`` equal bins over the finite values, of the window and of the scheduled core."""
    known = np.isfinite(values)
    count, unknown = total(comm, int(known.sum()), int((~known).sum()))
    low, high = -highest(comm, -values[known]), highest(comm, values[known])
    if not count:
        return None
    span = (low, high if high > low else low + 1)
    edges = np.histogram_bin_edges(values[:0], BINS, span)
    # Given a span NumPy computes the bin of a value; given edges it would search.
    counts = comm.allreduce(np.stack([np.histogram(values[which], BINS, span)[0] for which in (known, known & core)]))
    return {
        "edges": [round(float(edge), 5) for edge in edges],
        "window": counts[0].tolist(),
        "core": counts[1].tolist(),
        "unknown": unknown,
    }


def _groups(context: RefreshContext, ids: IntArray, schedule: Schedule, log_p: Array, core: Array) -> list[Array]:
    """Return which of this rank's samples are in each of :data:`GROUPS`, (n,) bool each.  Collective.

    Many samples share the highest or the lowest chance, and random words decide which of them are shown.
    """
    comm, words = context.comm, random_words(context.config.seed, schedule.version, _PURPOSE, ids)
    likely, lower = float_keys(log_p), by_lower_id(ids)

    def drawn(among: Array) -> Array:
        shown = np.zeros(len(ids), bool)
        at = np.flatnonzero(among)
        shown[at] = top(comm, GROUP, words[at], by_lower_id(ids[at]))
        return shown

    most, least = (top(comm, GROUP, keys, lambda at: words[at], lower) for keys in (likely, ~likely))
    return [most, least, drawn(core), drawn(~core)]


def _samples(groups: Sequence[tuple[IntArray, Columns]], names: Sequence[str], schedule: Schedule) -> list[dict[str, Any]]:
    """Return the samples of each group; one that is in several groups in the first of them only."""
    out: list[dict[str, Any]] = []
    shown: set[int] = set()
    listed = np.isin(schedule.ids, np.concatenate([ids for ids, _ in groups]))
    roles = dict(zip(schedule.ids[listed].tolist(), schedule.roles[listed].tolist(), strict=True))
    for group, (ids, columns) in zip(GROUPS, groups, strict=True):
        for i, sample in enumerate(ids.tolist()):
            if sample in shown:
                continue
            shown.add(sample)
            role = roles.get(sample)
            out.append(
                {
                    "id": sample,
                    "group": group,
                    "chance": _number(np.exp(columns["chance"][i])),
                    "factors": {name: _number(columns[f"factor {name}"][i]) for name in names},
                    "signals": {name: _number(columns[name][i]) for name in SHOWN},
                    "role": Role(role).name.lower() if role is not None else None,
                }
            )
    return out


def _number(value: Any) -> float | None:
    return float(f"{float(value):.5g}") if np.isfinite(value) else None
