"""The job's time limit, given to the groups that were made without one.

``deepspeed.init_distributed(timeout=...)`` reaches torch's default group only: DeepSpeed makes ZeRO's groups by
``new_group(ranks)``, and so they wait torch's 30 minutes for a peer whose link is cut (10 minutes over NCCL).
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

log = logging.getLogger("grace_ds")


def job_limit() -> timedelta | None:
    """Time limit of torch's default group; None without one, or over a backend that tells none."""
    import torch.distributed as dist

    return _limit(dist.group.WORLD) if dist.is_initialized() else None


def adopt_job_limit() -> int:
    """Gives every group of this process that waits torch's default time the default group's limit; returns how many.

    Groups that were made with a limit of their own keep it.  Not collective: a limit is this rank's affair.
    """
    limit = job_limit()
    if limit is None:
        return 0
    from torch.distributed import distributed_c10d as c10d

    changed = 0
    for group in list(c10d._world.pg_map):
        usual = c10d._get_default_timeout(c10d.Backend(c10d.get_backend(group)))
        if _limit(group) == usual != limit:
            c10d._set_pg_timeout(limit, group)
            changed += 1
    if changed:
        log.debug("%d process group(s) wait %g s now, as the job's own", changed, limit.total_seconds())
    return changed


def within_job_limit(seconds: float) -> float:
    """``seconds``, or half of the job's own time limit where that is not longer.

    Ranks that wait in a refresh may be waited for by others in the job's own collectives.  If both limits ran out together,
    the job would end of a refresh that was only to be given up.
    """
    limit = job_limit()
    if limit is None or seconds < limit.total_seconds():
        return seconds
    import torch.distributed as dist

    half = limit.total_seconds() / 2
    if dist.get_rank() == 0:
        log.warning(
            "refresh.timeout_seconds: %g is not below the job's own time limit of %g s: a refresh waits %g s at most; set it "
            "lower, or raise the job's (deepspeed.init_distributed(timeout=...))",
            seconds,
            limit.total_seconds(),
            half,
        )
    return half


def _limit(group: Any) -> timedelta | None:
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        found = getattr(options, "_timeout", None)
        if isinstance(found, timedelta):
            return found
    return None
