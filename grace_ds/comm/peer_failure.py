"""What a surviving rank says: which rank is lost, and where this one stood when it noticed.

A peer whose process has ended ends the job. In a refresh the transport fails first, and the survivors raise instead of training
on towards a collective that cannot finish; in a training step the job's own collective fails, and the process's last line says
why. A peer that only does not answer may come back: then GRACE alone is given up, and the job's own time limits decide.
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

_PATIENCE = 2.0  # seconds in which a process that has let go of its connections ends
_EXIT_SECONDS = 5  # for the end of this process, once it has said its last words
_numbers = itertools.count()
ExceptHook = Callable[[type[BaseException], BaseException, "TracebackType | None"], object]


class PeerFailureHandler:
    """Asks after the other ranks when something has failed; until :meth:`close`.

    Args:
        call: who can be asked.
        comm: the transport, whose end is not waited for once a rank is lost.
        where: what this rank is doing, in words, outside of a refresh.
    """

    def __init__(self, call: LivenessProbe, comm: Comm, where: Callable[[], str]) -> None:
        self.call, self.comm, self.where = call, comm, where
        self.number = next(_numbers)
        _Hook.add(self)

    def check(self, error: TransportError, where: str) -> None:
        """Called where the transport has failed; returns where no process is known to have ended, with a warning if one is mute.

        Raises:
            PeerLost: the process of a rank has ended.
        """
        # At a time-out everybody is as far as he will come; a connection breaks a little before its process has ended.
        missing = self.call.absent(0.0 if isinstance(error, TransportTimeout) else _PATIENCE)
        place = f"{where}{f', stage {error.stage}' if error.stage else ''}"
        if ENDED in missing.values():
            self.comm.abandon()
            raise PeerLost(self._words(missing, place)) from error
        if missing:
            log.warning(
                "no answer from %s; noticed by rank %d %s. That does not say that it has ended: the job goes on, and GRACE does "
                "as with a late rank. If it stays away, the job's next collective fails at its own time limit; check that host "
                "and the network to it",
                self.call.words(missing),
                self.call.rank,
                place,
            )

    def close(self) -> None:
        """Says nothing any more, and asks nobody."""
        _Hook.remove(self)
        self.call.close()

    def last_words(self, error: BaseException, trace: TracebackType | None) -> bool:
        """Says who is missing where ``error``, which ends this process, came out of a collective; returns whether anybody is."""
        missing = self.call.absent(_PATIENCE) if _in_a_collective(error, trace) else {}
        if missing:
            self.comm.abandon()
            sys.stderr.write(f"grace_ds: {self._words(missing, self.where())}\n")
        return bool(missing)

    def _words(self, missing: dict[int, str], where: str) -> str:
        return (
            f"lost: {self.call.words(missing)}; noticed by rank {self.call.rank} {where}. "
            "The job cannot go on: start it again from its last checkpoint"
        )


class _Hook:
    """One ``sys.excepthook`` for all open peer-failure handlers, which it does not keep alive."""

    open: ClassVar[weakref.WeakSet[PeerFailureHandler]] = weakref.WeakSet()
    current: ClassVar[_Hook | None] = None  # None: there is none, or there is nobody to speak

    def __init__(self, before: ExceptHook) -> None:
        self.before = before

    @staticmethod
    def add(peer_failures: PeerFailureHandler) -> None:
        """Takes the peer-failure handler in, and makes the hook the outermost one."""
        _Hook.open.add(peer_failures)
        if _Hook.current is None or sys.excepthook is not _Hook.current:
            _Hook.current = _Hook(sys.excepthook)  # an older one below passes on and is silent
            sys.excepthook = _Hook.current

    @staticmethod
    def remove(peer_failures: PeerFailureHandler) -> None:
        """Lets the peer-failure handler go; after the last one the hook is as before, unless somebody has put another over it."""
        _Hook.open.discard(peer_failures)
        if not _Hook.open and _Hook.current is not None:
            if sys.excepthook is _Hook.current:
                sys.excepthook = _Hook.current.before
            _Hook.current = None

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self.before(kind, error, trace)
        if self is not _Hook.current:
            return
        # The engines of one process have the same peers: the newest one that misses any says it for all.
        newest_first = sorted(_Hook.open, key=lambda peer_failures: -peer_failures.number)
        missing = any(peer_failures.last_words(error, trace) for peer_failures in newest_first)
        if isinstance(error, ProbeFailed):
            for peer_failures in newest_first:
                peer_failures.comm.abandon()  # the others wait in the job's own collective and will not come to ours
        if missing or isinstance(error, PeerLost | ProbeFailed):
            # Libraries that say good-bye to their peers at exit would wait for the one that is lost.
            sys.stderr.flush()
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(_EXIT_SECONDS)


def _in_a_collective(error: BaseException, trace: TracebackType | None) -> bool:
    """Whether an error may be another rank's doing: raised by a transport, and not by this rank's own work."""
    if isinstance(error, TransportError):
        return True
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = str(trace.tb_frame.f_globals.get("__name__", "")) if trace is not None else ""
    return isinstance(error, RuntimeError) and module.startswith(("torch.distributed", "deepspeed."))
