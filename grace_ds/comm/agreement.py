"""Make decisions that are the same on all ranks even when their transport has failed: publish a refresh, freeze GRACE.

The transport cannot carry a decision once it has timed out, but the job's own c10d store can.  The first rank that writes an
answer to a question decides it, and every other rank reads that answer.  Code that branches on "frozen" must call
:meth:`Agreement.frozen_by_any` first, so that no rank enters a collective which another rank leaves out.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from grace_ds.comm.base import Comm

log = logging.getLogger("grace_ds")

_instances = itertools.count()
_ANSWER_SECONDS = 3.0  # for one question to the store, which answers in milliseconds where its host can be reached
_COMMIT, _ABORT, _YES, _NO = "commit", "abort", "yes", "no"


class Agreement:
    """The decisions of one job, the same on all of its ranks.

    Args:
        store: a ``torch.distributed`` store shared by the ranks; None with one rank, which needs no agreement.
        ranks: number of ranks that take part.
        limit: seconds that a vote waits for the other ranks.

    Attributes:
        frozen: reason why GRACE is frozen, as far as this rank knows; empty if this rank does not know of a freeze.
    """

    def __init__(self, store: Any | None, ranks: int = 1, limit: float = 600.0) -> None:
        self.frozen = ""
        self._store, self._ranks, self._limit = store, ranks, limit
        # Engines are built in the same order on every rank, so the running number names the same job everywhere.
        self._prefix = f"grace_ds/{next(_instances)}"
        self._votes = itertools.count()
        self._unresponsive = False  # the store has failed to answer in time

    # -- a refresh ------------------------------------------------------------------------------------------------------

    def commit(self, attempt: int) -> bool:
        """Vote for publishing refresh number ``attempt`` and return the decision (True: publish).

        Call this after the refresh's last collective.  That collective needs all ranks, so every rank that reads "commit"
        holds the schedule.
        """
        return self._first_answer(f"refresh/{attempt}", _COMMIT) == _COMMIT

    def abort(self, attempt: int) -> bool:
        """Vote against publishing and return the decision (True: it had already been published)."""
        return self._first_answer(f"refresh/{attempt}", _ABORT) == _COMMIT

    # -- frozen ---------------------------------------------------------------------------------------------------------

    def freeze(self, why: str) -> None:
        """Record for this rank and all others that GRACE is frozen.  Not collective; a second call changes nothing."""
        if not self.frozen:
            self.frozen = why
            self._ask_store(lambda store: store.compare_set(f"{self._prefix}/frozen", "", why))

    def frozen_by_any(self) -> str:
        """Return why GRACE is frozen on this rank or on any other; empty if it is not frozen.  Not collective.

        Every rank gets the same answer if a collective of the job lies between the freeze and this call.  Between two
        refreshes the training step is such a collective.
        """
        if not self.frozen:
            key = f"{self._prefix}/frozen"
            reason = self._ask_store(lambda store: store.get(key).decode() if store.check([key]) else "")
            self.frozen = reason or ""
        return self.frozen

    def all_agree(self, mine: bool) -> bool:
        """Return whether every rank votes yes.  Collective, over the store.

        The answer is the same on all ranks, even if one of them is late.

        Args:
            mine: this rank's vote.
        """
        if self._store is None:
            return mine
        key = f"vote/{next(self._votes)}"
        if mine and self._ask_store(lambda store: store.add(f"{self._prefix}/{key}/yes", 1)) == self._ranks:
            return bool(self._ask_store(lambda _: self._first_answer(key, _YES)) == _YES)
        if mine:
            self._wait_for(key)
        return bool(self._ask_store(lambda _: self._first_answer(key, _NO)) == _YES)  # "no" if none was made in time

    # -- the store ------------------------------------------------------------------------------------------------------

    def _first_answer(self, key: str, vote: str) -> str:
        """Return the answer to ``key``: ``vote``, unless another rank has already answered."""
        if self._store is None:
            return vote
        decided: bytes = self._store.compare_set(f"{self._prefix}/{key}", "", vote)
        return decided.decode()

    def _wait_for(self, key: str) -> None:
        """Return once ``key`` has an answer, or once the limit has passed."""
        # store.wait would hold the store, which the job's own communicators use too.
        until, pause = time.monotonic() + self._limit, 1e-3
        while self._ask_store(lambda store: store.check([f"{self._prefix}/{key}"])) is False and time.monotonic() < until:
            time.sleep(pause)
            pause = min(2 * pause, 0.1)

    def _ask_store(self, ask: Callable[[Any], Any]) -> Any:
        """Return ``ask(store)``; None if there is no store, or if it does not answer in time because its host may be lost.

        The store's own calls wait for an unreachable host as long as the network does, so ``ask`` runs in a thread.
        """
        if self._store is None or self._unresponsive:
            return None
        answer: list[Any] = []

        def work() -> None:
            try:
                answer.append(ask(self._store))
            except RuntimeError as error:  # torch's DistStoreError and its kin
                log.debug("the job's store does not answer: %s", error)
                answer.append(None)

        worker = threading.Thread(target=work, daemon=True, name="grace_ds store")
        worker.start()
        worker.join(min(_ANSWER_SECONDS, self._limit))
        self._unresponsive = worker.is_alive()  # the next call would wait behind this one
        return answer[0] if answer else None


def agreement_of(comm: Comm) -> Agreement:
    """Return an agreement among the ranks of ``comm``, over the store of the job's default process group."""
    if comm.size == 1:
        return Agreement(None)
    from torch.distributed import distributed_c10d

    return Agreement(distributed_c10d._get_default_store(), comm.size, comm.timeout)
