"""Pre-emption: a job that is told to go saves a checkpoint on all ranks together and says that it wants to come back.

A scheduler warns with a signal, and not every rank gets it, nor in the same step. So the signal only sets a flag; the
flags of all ranks are joined after every optimizer step, and where one is set all ranks save and leave.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from grace_ds.comm.limits import job_limit
from grace_ds.errors import ConfigError
from grace_ds.methods import replace_method

log = logging.getLogger("grace_ds")

RESUME_ME = 75  # EX_TEMPFAIL of sysexits.h: try again
VARIABLE = "GRACE_DS_PREEMPT_DIR"  # set by ``grace-ds run --preempt-dir``
SIGNALS = ("SIGTERM", "SIGUSR1")


class PreemptionWatch:
    """Signal handlers of this process and one small all-reduce an optimizer step, until :meth:`close`.

    Args:
        engine: a DeepSpeed engine.
        save_dir: folder of the checkpoint, ``engine.save_checkpoint``'s; the same on all ranks.
        signals: names of the signals that ask for it.
        exit_code: of every rank, after the checkpoint.

    Raises:
        ConfigError: a signal is not known, or this is not the main thread, where alone Python takes signals.
    """

    def __init__(self, engine: Any, save_dir: str | Path, signals: Sequence[str] = SIGNALS, exit_code: int = RESUME_ME) -> None:
        numbers = [_number(name) for name in signals]
        if threading.current_thread() is not threading.main_thread():
            raise ConfigError("preemption is watched from the main thread only, where Python delivers signals; call it there")
        self.engine, self.save_dir, self.exit_code = engine, Path(save_dir), exit_code
        self.asked = 0  # number of the signal that came; 0: none
        self._group = _cpu_group()
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        self._put_step_back = replace_method(engine, "step", self._stepped)

    def close(self) -> None:
        """Puts the signal handlers and the engine's ``step`` back.  A second call does nothing."""
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        self._put_step_back()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        # Nothing more here: a handler runs between any two bytecodes, in the middle of a collective too.
        self.asked = signum

    def _stepped(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        boundary = self.engine.is_gradient_accumulation_boundary()
        result = original(*args, **kwargs)
        if boundary:
            told = self._anybody()
            if told:
                self._leave(told)
        return result

    def _anybody(self) -> int:
        """The largest signal number that any rank was sent; 0 for none.  Collective."""
        if self._group is None:
            return self.asked
        import torch
        import torch.distributed as dist

        flag = torch.tensor([self.asked], dtype=torch.int64)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return int(flag)

    def _leave(self, told: int) -> None:
        """Saves on all ranks and ends this one.

        Raises:
            SystemExit: always, so that the script's own clean-up runs.
        """
        step = self.engine.global_steps
        name = signal.Signals(told).name
        log.warning("%s: saving step %d to %s, then leaving with exit status %d", name, step, self.save_dir, self.exit_code)
        self.engine.save_checkpoint(str(self.save_dir))
        if self._group is not None:
            import torch.distributed as dist

            dist.barrier(self._group)  # a launcher ends the others as soon as one has left
        log.warning("step %d is saved; started again, the job goes on from there", step)
        self.close()
        raise SystemExit(self.exit_code)


def watch_preemption(engine: Any, save_dir: str | Path, **options: Any) -> PreemptionWatch:
    """Watches for pre-emption: see :class:`PreemptionWatch`, whose options these are.  Collective.

    Call it after ``initialize`` on every rank. A rank that is told to go by SIGTERM or SIGUSR1 finishes its optimizer step;
    then all ranks call ``engine.save_checkpoint(save_dir)`` together and end with exit status 75.
    """
    return PreemptionWatch(engine, save_dir, **options)


def from_environment(engine: Any) -> PreemptionWatch | None:
    """:func:`watch_preemption` where ``grace-ds run --preempt-dir`` has asked for it, on all ranks; None elsewhere."""
    folder = os.environ.get(VARIABLE)
    return watch_preemption(engine, folder) if folder else None


def _number(name: str) -> signal.Signals:
    full = name if name.startswith("SIG") else f"SIG{name}"
    try:
        return signal.Signals[full]
    except KeyError:
        raise ConfigError(f"preemption signal {name!r} is not known; use names such as {', '.join(SIGNALS)}") from None


def _cpu_group() -> Any:
    """A group of all ranks that joins flags without waiting for an accelerator; None for one process."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    # As long as the job itself waits for its slowest rank, in a step or in a checkpoint.
    return dist.new_group(backend="gloo", timeout=job_limit())
