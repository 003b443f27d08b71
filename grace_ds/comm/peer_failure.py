"""Report, from a surviving rank, which rank is lost and what this rank was doing when it noticed.

A peer whose process has ended ends the job.  In a refresh the transport fails first, and the survivors raise instead of
training towards a collective that cannot finish.  In a training step the job's own collective fails, and the process's last
line names the cause.  A peer that merely does not answer may come back: then only GRACE is given up, and the job's own time
limits decide.
"""

from __future__ import annotations

import itertools
import logging
import signal
import sys
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import ClassVar

from grace_ds.comm.base import Comm
from grace_ds.comm.liveness import ENDED, LivenessProbe
from grace_ds.errors import PeerLost, ProbeFailed, TransportError, TransportTimeout

log = logging.getLogger("grace_ds")

_PATIENCE = 2.0  # seconds within which a process that has dropped its connections ends
_EXIT_SECONDS = 5  # for the exit of this process, once it has written its last message
_numbers = itertools.count()
ExceptHook = Callable[[type[BaseException], BaseException, "TracebackType | None"], object]


class PeerFailureHandler:
    """Probes the other ranks when something has failed; until :meth:`close`.

    Args:
        liveness: probes the other ranks' processes.
        comm: the transport; its shutdown is not waited for once a rank is lost.
        where: returns in words what this rank is doing, outside of a refresh.
    """

    def __init__(self, liveness: LivenessProbe, comm: Comm, where: Callable[[], str]) -> None:
        self.liveness, self.comm, self.where = liveness, comm, where
        self.number = next(_numbers)
        _Hook.add(self)

    def check(self, error: TransportError, where: str) -> None:
        """Find out whether a failure of the transport comes from a lost rank; log a warning if a rank does not answer.

        Args:
            error: that the transport has raised.
            where: what this rank was doing, in words.

        Raises:
            PeerLost: the process of a rank has ended.
        """
        # After a time-out every process has already ended or will not; a connection breaks shortly before its process ends.
        missing = self.liveness.absent(0.0 if isinstance(error, TransportTimeout) else _PATIENCE)
        place = f"{where}{f', stage {error.stage}' if error.stage else ''}"
        if ENDED in missing.values():
            self.comm.abandon()
            raise PeerLost(self._message(missing, place)) from error
        if missing:
            log.warning(
                "no answer from %s; noticed by rank %d %s. That does not say that it has ended: the job goes on, and GRACE does "
                "as with a late rank. If it stays away, the job's next collective fails at its own time limit; check that host "
                "and the network to it",
                self.liveness.words(missing),
                self.liveness.rank,
                place,
            )

    def close(self) -> None:
        """Stop reporting and probing."""
        _Hook.remove(self)
        self.liveness.close()

    def last_words(self, error: BaseException, trace: TracebackType | None) -> bool:
        """Write which ranks are missing if ``error``, which ends this process, came out of a collective.

        Returns:
            Whether any rank is missing.
        """
        missing = self.liveness.absent(_PATIENCE) if _in_a_collective(error, trace) else {}
        if missing:
            self.comm.abandon()
            sys.stderr.write(f"grace_ds: {self._message(missing, self.where())}\n")
        return bool(missing)

    def _message(self, missing: dict[int, str], where: str) -> str:
        return (
            f"lost: {self.liveness.words(missing)}; noticed by rank {self.liveness.rank} {where}. "
            "The job cannot go on: start it again from its last checkpoint"
        )


class _Hook:
    """One ``sys.excepthook`` for all open handlers; it does not keep them alive."""

    open: ClassVar[weakref.WeakSet[PeerFailureHandler]] = weakref.WeakSet()
    current: ClassVar[_Hook | None] = None  # None: no hook is installed, or no handler is open

    def __init__(self, before: ExceptHook) -> None:
        self.before = before

    @staticmethod
    def add(peer_failures: PeerFailureHandler) -> None:
        """Register a handler, and make this hook the outermost one."""
        _Hook.open.add(peer_failures)
        if _Hook.current is None or sys.excepthook is not _Hook.current:
            _Hook.current = _Hook(sys.excepthook)  # an older hook below only calls the one before it
            sys.excepthook = _Hook.current

    @staticmethod
    def remove(peer_failures: PeerFailureHandler) -> None:
        """Unregister a handler; after the last one, restore the former hook, unless another hook was installed over this one."""
        _Hook.open.discard(peer_failures)
        if not _Hook.open and _Hook.current is not None:
            if sys.excepthook is _Hook.current:
                sys.excepthook = _Hook.current.before
            _Hook.current = None

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self.before(kind, error, trace)
        if self is not _Hook.current:
            return
        # The engines of one process have the same peers, so only the newest handler that misses a rank reports it.
        newest_first = sorted(_Hook.open, key=lambda peer_failures: -peer_failures.number)
        missing = any(peer_failures.last_words(error, trace) for peer_failures in newest_first)
        if isinstance(error, ProbeFailed):
            for peer_failures in newest_first:
                peer_failures.comm.abandon()  # the other ranks wait in the job's own collective and will not join GRACE's
        if missing or isinstance(error, PeerLost | ProbeFailed):
            # Libraries that synchronise with their peers at exit would wait for the lost rank.
            sys.stderr.flush()
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(_EXIT_SECONDS)


def _in_a_collective(error: BaseException, trace: TracebackType | None) -> bool:
    """Return whether another rank may have caused the error: a transport raised it, not this rank's own work."""
    if isinstance(error, TransportError):
        return True
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = str(trace.tb_frame.f_globals.get("__name__", "")) if trace is not None else ""
    return isinstance(error, RuntimeError) and module.startswith(("torch.distributed", "deepspeed."))
