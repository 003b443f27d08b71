"""The agreement of last resort: was refresh number a published or given up, when a rank's wait has run out.

The transport cannot answer once it has timed out.  The job's own c10d store can: the first rank to write decides, and
every other rank reads that decision.  A rank writes "commit" only after the refresh's last collective, which needs all
ranks, so whoever reads "commit" holds the schedule.
"""

from __future__ import annotations

import itertools
from typing import Any

_instances = itertools.count()


class Verdict:
    """One decision an attempt, the same on all ranks of the job.

    Args:
        store: a ``torch.distributed`` store shared by the ranks; None with one rank, where no agreement is needed.
    """

    def __init__(self, store: Any | None) -> None:
        self._store = store
        # Engines are built in the same order on every rank, so the running number names the same job everywhere.
        self._prefix = f"grace_ds/{next(_instances)}"

    def commit(self, attempt: int) -> bool:
        """Votes for publishing; returns what was decided."""
        return self._decide(attempt, b"commit")

    def abort(self, attempt: int) -> bool:
        """Votes against; returns what was decided (True: it had been published already)."""
        return self._decide(attempt, b"abort")

    def _decide(self, attempt: int, vote: bytes) -> bool:
        if self._store is None:
            return vote == b"commit"
        decided: bytes = self._store.compare_set(f"{self._prefix}/{attempt}", "", vote.decode())
        return decided == b"commit"


def job_store(ranks: int) -> Any | None:
    """The store behind the job's process group; None for a single rank."""
    if ranks == 1:
        return None
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()
