"""What all ranks must decide alike although their transport may be gone: is a refresh published, is GRACE frozen.

The transport cannot answer once it has timed out.  The job's own c10d store can: of each question the first rank to write an
answer decides it, and every other rank reads that answer.  Whatever branches on "frozen" asks here first, so that no rank
enters a collective which another one leaves out.
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
        store: a ``torch.distributed`` store shared by the ranks; None with one rank, where no agreement is needed.
        ranks: that take part.
        limit: seconds that a vote waits for the others.

    Attributes:
        frozen: why this rank knows that GRACE is frozen; empty where it does not.
    """

    def __init__(self, store: Any | None, ranks: int = 1, limit: float = 600.0) -> None:
        self.frozen = ""
        self._store, self._ranks, self._limit = store, ranks, limit
        # Engines are built in the same order on every rank, so the running number names the same job everywhere.
        self._prefix = f"grace_ds/{next(_instances)}"
        self._votes = itertools.count()
        self._mute = False  # the store has not answered in time

    # -- a refresh ------------------------------------------------------------------------------------------------------

    def commit(self, attempt: int) -> bool:
        """Votes for publishing refresh number ``attempt``; returns what was decided.

        To be called after the refresh's last collective, which needs all ranks: whoever reads "commit" holds the schedule.
        """
        return self._first(f"refresh/{attempt}", _COMMIT) == _COMMIT

    def abort(self, attempt: int) -> bool:
        """Votes against; returns what was decided (True: it had been published already)."""
        return self._first(f"refresh/{attempt}", _ABORT) == _COMMIT

    # -- frozen ---------------------------------------------------------------------------------------------------------

    def freeze(self, why: str) -> None:
        """Notes, here and for the other ranks, that GRACE is frozen.  Not collective; a second call changes nothing."""
        if not self.frozen:
            self.frozen = why
            self._quietly(lambda store: store.compare_set(f"{self._prefix}/frozen", "", why))

    def frozen_by_any(self) -> str:
        """Why GRACE is frozen on this rank or on any other, empty where it is not.  Not collective.

        Every rank gets the same answer wherever a collective of the job lies between the freezing and the question, as a
        training step does between two refreshes.
        """
        if not self.frozen:
            key = f"{self._prefix}/frozen"
            told = self._quietly(lambda store: store.get(key).decode() if store.check([key]) else "")
            self.frozen = told or ""
        return self.frozen

    def all_agree(self, mine: bool) -> bool:
        """Whether every rank votes yes; the same answer on all ranks, also where one is late.  Collective, over the store.

        Args:
            mine: this rank's vote.
        """
        if self._store is None:
            return mine
        key = f"vote/{next(self._votes)}"
        if mine and self._quietly(lambda store: store.add(f"{self._prefix}/{key}/yes", 1)) == self._ranks:
            return bool(self._quietly(lambda _: self._first(key, _YES)) == _YES)
        if mine:
            self._wait_for(key)
        return bool(self._quietly(lambda _: self._first(key, _NO)) == _YES)  # what was decided; no, where nothing was in time

    # -- the store ------------------------------------------------------------------------------------------------------

    def _first(self, key: str, vote: str) -> str:
        """The answer to ``key``: ``vote``, unless another rank has answered before."""
        if self._store is None:
            return vote
        decided: bytes = self._store.compare_set(f"{self._prefix}/{key}", "", vote)
        return decided.decode()

    def _wait_for(self, key: str) -> None:
        """Returns once ``key`` has an answer, or the limit has passed."""
        # Not by store.wait: that holds the store, which the job's own communicators use too.
        until, pause = time.monotonic() + self._limit, 1e-3
        while self._quietly(lambda store: store.check([f"{self._prefix}/{key}"])) is False and time.monotonic() < until:
            time.sleep(pause)
            pause = min(2 * pause, 0.1)

    def _quietly(self, ask: Callable[[Any], Any]) -> Any:
        """``ask(store)``; None where there is no store, or it does not answer in time: it lies on a host that may be lost.

        The store's own calls wait for a host that is cut off for as long as the network does, so a thread asks.
        """
        if self._store is None or self._mute:
            return None
        answer: list[Any] = []

        def work() -> None:
            try:
                answer.append(ask(self._store))
            except RuntimeError as error:  # torch's DistStoreError and its kin
                log.debug("the job's store does not answer: %s", error)
                answer.append(None)

        asking = threading.Thread(target=work, daemon=True, name="grace_ds store")
        asking.start()
        asking.join(min(_ANSWER_SECONDS, self._limit))
        self._mute = asking.is_alive()  # whoever asks next would wait behind it
        return answer[0] if answer else None


def agreement_of(comm: Comm) -> Agreement:
    """Over the store behind the job's process group, among the ranks of ``comm``."""
    if comm.size == 1:
        return Agreement(None)
    from torch.distributed import distributed_c10d

    return Agreement(distributed_c10d._get_default_store(), comm.size, comm.timeout)
