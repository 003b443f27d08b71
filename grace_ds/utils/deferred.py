"""Defer signals without losing them: record them for a while, then deliver them to the former handlers."""

from __future__ import annotations

import _thread
import logging
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

log = logging.getLogger("grace_ds")


class DeferredSignals:
    """Handlers that record some signals until :meth:`release`.

    Python calls them through a weak reference: after this object is deleted, signals go to their former handlers.

    Args:
        numbers: of the signals.
        progress: returns a number that changes whenever the work proceeds; None while the work must not be interrupted.
        patience: returns the seconds after a signal within which the work should proceed; if it does not, it is assumed to
            be over, and the signal is delivered.  0: it is over already.  Called in a signal handler, so it must take no lock.

    Attributes:
        noted: number of the first signal received; 0: none.

    Raises:
        ValueError: this is not the main thread.
    """

    def __init__(self, numbers: Sequence[int], progress: Callable[[], int | None], patience: Callable[[], float]) -> None:
        self.noted = 0
        self.progress, self.patience = progress, patience
        self.released = self.overdue = False
        self._handler = _Handler(weakref.ref(self))
        for number in numbers:
            self._handler.former[number] = signal.signal(number, self._handler)

    def settle(self) -> None:
        """Clear the recorded signal: it was handled and need not be delivered."""
        self.noted = 0

    def release(self) -> None:
        """Restore the former handlers, and deliver a recorded signal to them.  A second call does nothing."""
        if self.released or sys.is_finalizing():
            return
        self.released = True  # the handler passes signals on from here, even if it cannot be removed
        in_main_thread = threading.current_thread() is threading.main_thread()
        for number, former in self._handler.former.items():
            if in_main_thread and signal.getsignal(number) is self._handler:  # else another handler has replaced it
                signal.signal(number, _settable(former))
        noted, self.noted = self.noted, 0
        if noted:
            _send(noted)

    def note(self, number: int) -> None:
        """Record a signal; called between any two bytecodes of the main thread: in a collective, or while a lock is held."""
        if self.overdue and self.progress() is not None:
            self.release()
        elif not self.noted:
            self.noted, seconds = number, self.patience()
            if seconds > 0:
                # ``threading.Thread`` takes locks that the interrupted code may hold.
                _thread.start_new_thread(_wait, (weakref.ref(self), number, seconds))
            else:
                self.release()


class _Handler:
    """The handler that Python calls at a signal."""

    def __init__(self, owner: weakref.ref[DeferredSignals]) -> None:
        self.owner = owner
        self.former: dict[int, Any] = {}  # by number of the signal; None: installed by C code

    def __call__(self, number: int, frame: FrameType | None) -> None:
        owner, former = self.owner(), self.former[number]
        if owner is not None and not owner.released:
            owner.note(number)
        elif callable(former):
            former(number, frame)
        elif former is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def _settable(former: Any) -> Any:
    """Return a handler that Python can install.

    A handler that C code has installed cannot be restored from Python: the default replaces it.
    """
    return signal.SIG_DFL if former is None else former


def _send(number: int) -> None:
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, number)  # a signal to the process might interrupt another thread, and leave the main one asleep


def _wait(ref: weakref.ref[DeferredSignals], number: int, seconds: float) -> None:
    """Wait in a separate thread; deliver a recorded signal once the work has not proceeded for ``seconds``."""
    while True:
        owner = ref()
        if owner is None or not owner.noted:
            return
        before = owner.progress()
        del owner
        time.sleep(seconds)
        owner = ref()
        if owner is None or not owner.noted:
            return
        if before is not None and owner.progress() == before:
            name = signal.Signals(number).name
            log.warning(
                "%s came %.0f s ago, and no optimizer step has begun since: training is taken to be over, and the signal goes to "
                "the handler that was there before; pass a larger step_seconds to watch_preemption where steps lie further apart",
                name,
                seconds,
            )
            owner.overdue = True
            _send(number)
            return
