"""When: the steps that are collected, the steps between two refreshes, the steps that a coreset is asked for.

Pure functions of the config and of the number of optimizer steps done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from grace_ds.config.schema import GraceConfig


def is_due(config: GraceConfig, step: int, next_refresh: int) -> bool:
    """Whether a refresh is made after ``step`` steps; not after the last one, whose schedule nobody would train on."""
    return next_refresh <= step != config.total_steps


def collected(config: GraceConfig, step: int, next_refresh: int) -> bool:
    """Whether rows of the optimizer step after ``step`` can still be of use to a coreset."""
    return step >= config.start_step - config.refresh.interval_steps and not _ends(config, step, next_refresh)


def is_uniform(config: GraceConfig, step: int) -> bool:
    """Whether the schedule made at ``step`` is the corpus in uniform order: before ``start_step``, from ``stop_step`` on."""
    return step < config.start_step or _stopped(config, step)


def wants_basis(config: GraceConfig, step: int, interval: int) -> bool:
    """Whether rows will be collected with a trusted basis fitted at ``step``, before the refresh ``interval`` steps later."""
    return step + interval > config.start_step - config.refresh.interval_steps and not _ends(config, step, step + interval)


def basis_due(units: Mapping[int, float], version: int) -> bool:
    """Whether it is worth fitting a trusted basis with schedule ``version``.

    Always while influences can be judged by; after m bases in a row that could not, 2^m versions after the last of them:
    what does not help is looked at again, ever more rarely.

    Args:
        units: version of each basis that was judged → its unit, 0 where it could not be judged by.
    """
    judged = sorted(units)
    misses = next((m for m, v in enumerate(reversed(judged)) if units[v] > 0), len(judged))
    return not misses or version >= judged[-1] + 2**misses


def configured_interval(config: GraceConfig, step: int) -> int:
    """Optimizer steps from ``step`` to the next refresh, as the config has it.

    The first coreset comes when the warm-up is over.  A run that uses gradients opens in two halves: the first gives the model
    and the layers' scale that a trusted basis is fitted to, the second the first influences.
    """
    if step < config.start_step:
        return config.start_step - step
    interval = config.refresh.interval_steps
    first = config.warmup_steps or (interval if config.collects else 0)
    half = first // 2 if config.collects else 0
    return next((end - step for end in (half, first) if step < end), interval)


def stretched_interval(config: GraceConfig, step: int, refresh_seconds: float, step_seconds: float | None) -> int:
    """The configured interval, stretched under ``cadence: adaptive`` so that refreshes stay below ``max_overhead``.

    Args:
        refresh_seconds: that the last refresh took on this rank.
        step_seconds: of an optimizer step on this rank, refreshes left out; None while nothing can be said.
    """
    steps = configured_interval(config, step)
    if config.refresh.cadence == "fixed" or step < max(config.start_step, config.warmup_steps) or not step_seconds:
        return steps
    return max(steps, math.ceil(refresh_seconds / (config.refresh.max_overhead * step_seconds)))


def _ends(config: GraceConfig, step: int, next_refresh: int) -> bool:
    """Whether no refresh of this run will choose by what is collected after ``step``."""
    return _stopped(config, step) or step < config.total_steps <= next_refresh


def _stopped(config: GraceConfig, step: int) -> bool:
    return 0 < config.stop_step <= step
