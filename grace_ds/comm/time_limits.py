"""Give the job's time limit to the process groups that were made without one.

``deepspeed.init_distributed(timeout=...)`` reaches torch's default group only.  DeepSpeed makes ZeRO's groups by
``new_group(ranks)``, so they wait torch's 30 minutes for a peer whose link is cut (10 minutes over NCCL).
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

log = logging.getLogger("grace_ds")


def job_limit() -> timedelta | None:
    """Return the time limit of torch's default group; None without such a group, or if its backend gives none."""
    import torch.distributed as dist

    return _limit(dist.group.WORLD) if dist.is_initialized() else None


def adopt_job_limit() -> int:
    """Give the default group's limit to every group of this process that has torch's default; return how many changed.

    Groups that were made with a limit of their own keep it.  Not collective: a limit applies to this rank only.
    """
    limit = job_limit()
    if limit is None:
        return 0
    from torch.distributed import distributed_c10d as c10d

    changed = 0
    for group in list(c10d._world.pg_map):
        torch_default = c10d._get_default_timeout(c10d.Backend(c10d.get_backend(group)))
        if _limit(group) == torch_default != limit:
            c10d._set_pg_timeout(limit, group)
            changed += 1
    if changed:
        log.debug("%d process group(s) wait %g s now, as the job's own", changed, limit.total_seconds())
    return changed


def within_job_limit(seconds: float) -> float:
    """Return ``seconds``, or half of the job's own time limit if that limit is not longer than ``seconds``.

    While some ranks wait in a refresh, others may wait for them in the job's own collectives.  If both limits expired at the
    same time, a refresh that should only be given up would end the job.
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
        timeout = getattr(options, "_timeout", None)
        if isinstance(timeout, timedelta):
            return timeout
    return None
