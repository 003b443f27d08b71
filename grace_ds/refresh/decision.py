"""Read from the schedule in force the guard's decision, the chosen samples, and whether collecting can be of use.

These are pure functions of values that are equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from grace_ds.config.schema import GraceConfig
from grace_ds.data.schedule import ScheduleBook
from grace_ds.gradients.basis import TrustedBasis
from grace_ds.records import IntArray, Role, Schedule
from grace_ds.selection.guard import Decision, from_meta


def decision_of(book: ScheduleBook) -> Decision | None:
    """Return the guard's decision for the schedule made last; None before the first, or if the guard decided nothing."""
    return from_meta(book.schedules[-1].meta.get("guard")) if book.schedules else None


def collect_every(config: GraceConfig, book: ScheduleBook) -> int:
    """Return k such that every k-th optimizer step is collected under the schedule made last."""
    return int(book.schedules[-1].meta.get("collect_every", config.collect_every)) if book.schedules else config.collect_every


def by_role(last: Schedule | None, shadow: bool) -> tuple[IntArray, IntArray | None]:
    """Return the samples that the schedule made last has chosen, and those to compare them with: (n,), (m,) int64.

    Both are empty for a uniform schedule, which chooses no sample.  In shadow mode the job trains on its own samples, so
    there are plenty that were not chosen: the second result is None, which means all others.
    """
    if last is None or last.meta.get("objective") == "uniform":
        return np.empty(0, np.int64), np.empty(0, np.int64)
    core = np.unique(last.ids[last.roles == Role.CORE])
    return core, None if shadow else np.unique(last.ids[last.roles == Role.AUDIT])


def worth_collecting(
    config: GraceConfig,
    decision: Decision | None,
    scale_frozen: bool,
    trusted: bool,
    basis: TrustedBasis | None,
    reference: Mapping[int, float],
) -> bool:
    """Return whether a gradient collected now can be of use: not while the guard does without gradients.

    Args:
        decision: of the guard.
        scale_frozen: whether the layers' scale is known; the first collected step gives it.
        trusted: whether there is a trusted set.
        basis: the trusted basis in force.
        reference: basis version → unit of influences along it; 0 if influences along it are not usable.
    """
    if decision is not None and decision.off >= {"gradients", "sketches"}:
        return False
    if any(config.learned_shares):
        return True
    if not trusted or "gradients" not in config.parts:
        return False
    return not scale_frozen or (basis is not None and reference.get(basis.version, 0.0) > 0)


def worth_reading(config: GraceConfig, decision: Decision | None) -> bool:
    """Return whether a loss read now can be of use."""
    return "loss" in config.parts and (decision is None or "loss" not in decision.off)
