"""What a surviving rank says: which rank is lost, and where this one stood when it noticed.

A lost peer ends the job. In a refresh the transport fails first, and the survivors raise instead of training on towards a
collective that cannot finish; in a training step the job's own collective fails, and the process's last line says why.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import TracebackType

from grace_ds.comm.base import Comm
from grace_ds.comm.rollcall import RollCall
from grace_ds.errors import PeerLost, ProbeFailed, TransportError, TransportTimeout

_PATIENCE = 2.0  # seconds in which a process that has let go of its connections ends
_EXIT_SECONDS = 5  # for the end of this process, once it has said its last words


class Lookout:
    """Asks after the other ranks when something has failed; until :meth:`close`.

    Args:
        call: who can be asked.
        comm: the transport, whose end is not waited for once a rank is lost.
        where: what this rank is doing, in words, outside of a refresh.
    """

    def __init__(self, call: RollCall, comm: Comm, where: Callable[[], str]) -> None:
        self.call, self.comm, self.where = call, comm, where
        self._before, self._ours = sys.excepthook, self._last_words
        sys.excepthook = self._ours

    def check(self, error: TransportError, where: str) -> None:
        """Called where the transport has failed; returns where every rank is still there.

        Raises:
            PeerLost: some are not.
        """
        # At a time-out everybody is as far as he will come; a connection breaks a little before its process has ended.
        missing = self.call.absent(0.0 if isinstance(error, TransportTimeout) else _PATIENCE)
        if missing:
            self.comm.abandon()
            raise PeerLost(self._words(missing, f"{where}{f', stage {error.stage}' if error.stage else ''}")) from error

    def close(self) -> None:
        """Takes the hook off again, and asks nobody any more."""
        if sys.excepthook == self._ours:
            sys.excepthook = self._before
        self.call.close()

    def _words(self, missing: dict[int, str], where: str) -> str:
        return (
            f"lost: {self.call.words(missing)}; noticed by rank {self.call.rank} {where}. "
            "The job cannot go on: start it again from its last checkpoint"
        )

    def _last_words(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self._before(kind, error, trace)
        missing = self.call.absent(_PATIENCE) if _in_a_collective(error, trace) else {}
        if missing:
            self.comm.abandon()
            sys.stderr.write(f"grace_ds: {self._words(missing, self.where())}\n")
        if isinstance(error, ProbeFailed):
            self.comm.abandon()  # the others wait in the job's own collective and will not come to ours
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
