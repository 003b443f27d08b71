"""Handle pre-emption: on a signal, all ranks save a checkpoint and exit with a status that asks to be started again.

A scheduler warns with a signal, which may not reach every rank, nor all ranks in the same step.  So the signal only sets a
flag.  The flags of all ranks are combined after every optimizer step, and if one is set all ranks save and exit.  If no
further step comes (the engine is destroyed, or only an evaluation is left), the signal goes to its former handler.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grace_ds.comm.time_limits import job_limit
from grace_ds.errors import ConfigError
from grace_ds.utils.deferred import DeferredSignals
from grace_ds.utils.methods import replace_method

log = logging.getLogger("grace_ds")

RESUME_ME = 75  # EX_TEMPFAIL of sysexits.h: try again
VARIABLE = "GRACE_DS_PREEMPT_DIR"  # set by ``grace-ds run --preempt-dir``
SIGNALS = ("SIGTERM", "SIGUSR1")
STEP_SECONDS = 25.0  # Slurm (KillWait) and Kubernetes kill 30 s after SIGTERM


class PreemptionWatch:
    """Signal handlers of this process and one small all-reduce per optimizer step, until :meth:`close`.

    The engine keeps the watch alive, and not the other way round; ``engine.destroy()`` closes it.

    Args:
        engine: a DeepSpeed engine.
        save_dir: folder that ``engine.save_checkpoint`` writes to; the same on all ranks.
        signals: names of the signals that announce a pre-emption.
        exit_code: of every rank, after the checkpoint.
        step_seconds: time within which a step must begin after a signal, or twice the longest pause between two steps so far
            if that is longer.  After it training counts as over, and the signal goes to its former handler.

    Raises:
        ConfigError: a signal is not known, or this is not the main thread, the only one in which Python handles signals.
    """

    def __init__(
        self,
        engine: Any,
        save_dir: str | Path,
        signals: Sequence[str] = SIGNALS,
        exit_code: int = RESUME_ME,
        step_seconds: float = STEP_SECONDS,
    ) -> None:
        numbers = [_number(name) for name in signals]
        if threading.current_thread() is not threading.main_thread():
            raise ConfigError("preemption is watched from the main thread only, where Python delivers signals; call it there")
        self.save_dir, self.exit_code, self.step_seconds = Path(save_dir), exit_code, step_seconds
        self._engine = weakref.ref(engine)
        self._group, self._distributed = _cpu_group(), _is_distributed()
        self._steps, self._stepping = 0, False  # calls of engine.step, those within an accumulation included
        self._longest, self._ended = 0.0, time.monotonic()  # seconds between two steps; when the last one ended
        self._undo = [replace_method(engine, "step", self._stepped), replace_method(engine, "destroy", self._destroyed)]
        self._signals = DeferredSignals(numbers, self._progress, self._patience)

    def close(self) -> None:
        """Restore the signal handlers and the engine's methods.  A second call does nothing.

        A signal that has arrived, and that no step has handled yet, goes to its former handler.
        """
        while self._undo:
            self._undo.pop()()
        group, self._group = self._group, None
        if group is not None and _is_distributed():
            import torch.distributed as dist

            dist.destroy_process_group(group)
        self._signals.release()

    def _progress(self) -> int | None:
        return None if self._stepping else self._steps

    def _patience(self) -> float:
        if self._distributed and not _is_distributed():
            return 0.0  # without its process group the job cannot continue training
        pause = self._longest if self._steps else time.monotonic() - self._ended
        return max(self.step_seconds, 2 * pause)

    def _stepped(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        engine = self._engine()
        assert engine is not None, "its own method is being called"
        boundary = engine.is_gradient_accumulation_boundary()
        self._longest = max(self._longest, time.monotonic() - self._ended)
        self._stepping = True
        try:
            result = original(*args, **kwargs)
            if boundary:
                number = self._signal_of_any_rank()
                if number:
                    self._leave(engine, number)
            return result
        finally:
            self._ended, self._steps, self._stepping = time.monotonic(), self._steps + 1, False

    def _destroyed(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        finally:
            self.close()

    def _signal_of_any_rank(self) -> int:
        """Return the largest signal number that any rank has received; 0 for none.  Collective."""
        if self._group is None:
            return self._signals.noted
        import torch
        import torch.distributed as dist

        flag = torch.tensor([self._signals.noted], dtype=torch.int64)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return int(flag)

    def _leave(self, engine: Any, number: int) -> None:
        """Save a checkpoint on all ranks and exit.

        Args:
            number: of the signal that some rank has received.

        Raises:
            SystemExit: always, so that the script's own clean-up runs.
        """
        step = engine.global_steps
        name = signal.Signals(number).name
        log.warning("%s: saving step %d to %s, then leaving with exit status %d", name, step, self.save_dir, self.exit_code)
        engine.save_checkpoint(str(self.save_dir))
        if self._group is not None:
            import torch.distributed as dist

            dist.barrier(self._group)  # a launcher ends the other ranks as soon as one has exited
        log.warning("step %d is saved; started again, the job goes on from there", step)
        self._signals.settle()
        self.close()
        raise SystemExit(self.exit_code)


def watch_preemption(engine: Any, save_dir: str | Path, **options: Any) -> PreemptionWatch:
    """Watch for pre-emption; the options are those of :class:`PreemptionWatch`.  Collective.

    Call it after ``initialize`` on every rank.  When a rank receives SIGTERM or SIGUSR1 it finishes its optimizer step; then
    all ranks call ``engine.save_checkpoint(save_dir)`` together and exit with status 75.
    """
    return PreemptionWatch(engine, save_dir, **options)


def from_environment(engine: Any) -> PreemptionWatch | None:
    """Call :func:`watch_preemption` if ``grace-ds run --preempt-dir`` has set a folder, on all ranks; otherwise return None."""
    folder = os.environ.get(VARIABLE)
    return watch_preemption(engine, folder) if folder else None


def _number(name: str) -> signal.Signals:
    full = name if name.startswith("SIG") else f"SIG{name}"
    try:
        return signal.Signals[full]
    except KeyError:
        raise ConfigError(f"preemption signal {name!r} is not known; use names such as {', '.join(SIGNALS)}") from None


def _cpu_group() -> Any:
    """Make a group of all ranks that combines flags without waiting for an accelerator; None for one process."""
    import torch.distributed as dist

    if not _is_distributed() or dist.get_world_size() == 1:
        return None
    # The same limit with which the job itself waits for its slowest rank, in a step or in a checkpoint.
    return dist.new_group(backend="gloo", timeout=job_limit())


def _is_distributed() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()
