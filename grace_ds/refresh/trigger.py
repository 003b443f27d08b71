"""Decide when to collect, when to refresh, and at which steps a coreset is used.

These are pure functions of the config and of the number of optimizer steps done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from grace_ds.config.schema import GraceConfig


def is_due(config: GraceConfig, step: int, next_refresh: int) -> bool:
    """Return whether a refresh is made after ``step`` steps; not after the last one, whose schedule would not be used."""
    return next_refresh <= step != config.total_steps


def collected(config: GraceConfig, step: int, next_refresh: int) -> bool:
    """Return whether rows of the optimizer step after ``step`` can still be of use to a coreset."""
    return step >= config.start_step - config.refresh.interval_steps and not _ends(config, step, next_refresh)


def is_uniform(config: GraceConfig, step: int) -> bool:
    """Return whether the schedule made at ``step`` is in uniform order: before ``start_step``, and from ``stop_step`` on."""
    return step < config.start_step or _stopped(config, step)


def wants_basis(config: GraceConfig, step: int, interval: int) -> bool:
    """Return whether rows will be collected with a trusted basis fitted at ``step``, in the ``interval`` steps after it."""
    return step + interval > config.start_step - config.refresh.interval_steps and not _ends(config, step, step + interval)


def basis_due(units: Mapping[int, float], version: int) -> bool:
    """Return whether it is worth fitting a trusted basis with schedule ``version``.

    It always is while the bases are usable.  After m unusable bases in a row the next one is fitted 2^m versions after the
    last of them, so that an unhelpful basis is retried at growing intervals.

    Args:
        units: version of each basis that was judged → its unit; 0 if it was not usable.
    """
    judged = sorted(units)
    misses = next((count for count, fitted in enumerate(reversed(judged)) if units[fitted] > 0), len(judged))
    return not misses or version >= judged[-1] + 2**misses


def configured_interval(config: GraceConfig, step: int) -> int:
    """Return the optimizer steps from ``step`` to the next refresh, according to the config.

    The first coreset is made when the warm-up is over.  The warm-up of a run that uses gradients has two halves.  The first
    gives the model and the layers' scale that a trusted basis is fitted to, the second gives the first influences.
    """
    if step < config.start_step:
        return config.start_step - step
    interval = config.refresh.interval_steps
    first = config.warmup_steps or (interval if config.collects else 0)
    half = first // 2 if config.collects else 0
    return next((end - step for end in (half, first) if step < end), interval)


def stretched_interval(config: GraceConfig, step: int, refresh_seconds: float, step_seconds: float | None) -> int:
    """Return the configured interval, stretched under ``cadence: adaptive`` so that refreshes stay below ``max_overhead``.

    Args:
        refresh_seconds: duration of the last refresh on this rank.
        step_seconds: duration of an optimizer step on this rank, without refreshes; None while it is not known.
    """
    steps = configured_interval(config, step)
    if config.refresh.cadence == "fixed" or step < max(config.start_step, config.warmup_steps) or not step_seconds:
        return steps
    return max(steps, math.ceil(refresh_seconds / (config.refresh.max_overhead * step_seconds)))


def _ends(config: GraceConfig, step: int, next_refresh: int) -> bool:
    """Return whether no refresh of this run will choose by rows collected after ``step``."""
    return _stopped(config, step) or step < config.total_steps <= next_refresh


def _stopped(config: GraceConfig, step: int) -> bool:
    return 0 < config.stop_step <= step
