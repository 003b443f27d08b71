"""Report the progress of a running job from rank 0, for ``--progress``: values that exist already, at most twice a second.

No training step waits for it: it uses no collective and no device synchronisation, and drops reports that are not read.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import socket
import time
import weakref
from collections.abc import Callable
from typing import Any

from grace_ds.refresh import trigger
from grace_ds.utils.methods import replace_method

log = logging.getLogger("grace_ds")

VARIABLE = "GRACE_DS_PROGRESS"  # path of the datagram socket of the view, or LINES; set by ``--progress``
LINES = "lines"
DRAWN_EVERY, LINE_EVERY = 0.5, 60.0  # seconds
Facts = dict[str, Any]
Send = Callable[[Facts], None]


def follow(handle: Any) -> ProgressReporter | None:
    """Report on the job of the handle ``engine.grace_ds`` if ``--progress`` asks for it; on rank 0, None elsewhere."""
    destination = os.environ.get(VARIABLE)
    if not destination or handle.controller.comm.rank != 0:
        return None
    reporter = ProgressReporter(handle.controller, *_sender(destination))
    _reporters.add(reporter)
    reporter.report()
    return reporter


def report_off() -> None:
    """Report, on rank 0, that GRACE is off in the job's config."""
    destination = os.environ.get(VARIABLE)
    if destination and int(os.environ.get("RANK", "0")) == 0:
        _sender(destination)[0]({"off": True})


def line(facts: Facts) -> str:
    """Return the facts as one plain line."""
    if facts.get("off"):
        return "grace: off in this job's config, so there is no progress to tell"
    return "grace: " + "; ".join(part for part in (where_it_is(facts), schedule(facts), cost(facts), guard(facts)) if part)


def where_it_is(facts: Facts) -> str:
    """Return step, loss and seconds per step as text."""
    parts = [f"step {facts['step']:,}" + (f"/{facts['steps']:,}" if facts["steps"] else "")]
    parts += [f"loss {facts['loss']:.4f}"] if facts["loss"] is not None else []
    parts += [f"{facts['step_seconds']:.3g} s/step"] if facts["step_seconds"] else []
    return "  ".join(parts)


def schedule(facts: Facts) -> str:
    """Return the schedule in force, and when the next one is due, as text."""
    chosen = f"{facts['coreset']:,} of {facts['window']:,} samples" if facts["chosen"] else "the whole pool, uniform order"
    due = (
        "no further refresh"
        if facts["next"] is None
        else f"next refresh in {_steps(facts['next'])}"
        if facts["next"]
        else "refreshing now"
    )
    failed = f", {facts['failures']} given up" if facts["failures"] else ""
    return f"schedule {facts['version']}: {chosen}, {_steps(facts['age'])} old; {due}{failed}"


def cost(facts: Facts) -> str:
    """Return GRACE's share of the time so far as text."""
    both = facts["refresh_share"] + facts["collect_share"]
    return f"overhead {both:.1%} (refreshes {facts['refresh_share']:.1%}, collect {facts['collect_share']:.1%})"


def guard(facts: Facts) -> str:
    """Return the guard's last decision, and states that change its meaning (frozen, shadow mode), as text."""
    parts = ["frozen: no refresh any more"] if facts["frozen"] else []
    parts += ["shadow mode: the job's own order is trained on"] if facts["shadow"] else []
    parts += [f"guard {facts['level']}: {facts['reason']}"] if facts["level"] else []
    return "; ".join(parts)


def _steps(count: int) -> str:
    return f"{count:,} step" + ("" if count == 1 else "s")


class ProgressReporter:
    """Reads a controller between its steps, until :meth:`close`; the controller keeps it alive.

    Args:
        controller: of this rank, which is rank 0.
        send: receives the facts.
        every: seconds between two reports; a refresh is also reported at once if the reports go to a view.
    """

    def __init__(self, controller: Any, send: Send, every: float) -> None:
        self.controller, self.send, self.every = controller, send, every
        self._loss = LossReader()
        self._due = 0.0
        self._seen: tuple[float, int] | None = None  # seconds of training and step at the last report
        self._undo = [
            replace_method(controller, "after_step", self.on_step),
            replace_method(controller, "observe_loss", self.on_loss),
        ]

    def on_loss(self, original: Callable[..., Any], loss: Any) -> Any:
        """Keep the loss at each backward, and call the controller's own method."""
        self._loss.offer(loss)
        return original(loss)

    def on_step(self, original: Callable[..., Any], step: int, *args: Any, **kwargs: Any) -> Any:
        """Report around the controller's own work after an optimizer step, which may include a refresh."""
        controller = self.controller
        due = (
            trigger.is_due(controller.config, step, controller.next_refresh)
            and not controller.frozen
            and controller.config.replay is None
        )
        refreshing = due and self.every < LINE_EVERY
        if refreshing:
            self.report(step)
        result = original(step, *args, **kwargs)
        if time.monotonic() >= self._due or refreshing:
            self.report()
        return result

    def report(self, step: int | None = None) -> None:
        """Report the state of the run.

        Args:
            step: optimizer steps done, if the controller does not know them yet.
        """
        self._due = time.monotonic() + self.every
        try:
            self.send(self.facts(step))
        except Exception as error:  # a failed report must not affect the job
            self.send = _discard
            log.warning("the progress cannot be reported any more (%s: %s); training goes on", type(error).__name__, error)

    def close(self) -> None:
        """Report the state of the run for the last time.  A second call does nothing."""
        while self._undo:
            self._undo.pop()()
        self.report()
        send, self.send = self.send, _discard
        if isinstance(send, _Datagrams):
            send.close()

    def facts(self, step: int | None = None) -> Facts:
        """Return the state of the run, JSON-able; shares are of the wall time since the start, validation and saving included.

        Args:
            step: as for :meth:`report`.
        """
        controller, metrics = self.controller, self.controller.snapshot()
        current = controller.step if step is None else step
        meta = controller.book.schedules[-1].meta if controller.book.schedules else {}
        decision: dict[str, Any] = dict(meta.get("guard") or {})
        over = (
            controller.frozen
            or controller.config.replay is not None
            or 0 < controller.config.total_steps <= controller.next_refresh
        )
        total = max(metrics["train_seconds"] + metrics["refresh_seconds"], 1e-9)
        before, self._seen = self._seen, (metrics["train_seconds"], current)
        pace = (
            (metrics["train_seconds"] - before[0]) / (current - before[1]) if before is not None and current > before[1] else None
        )
        return {
            "step": current,
            "steps": controller.config.total_steps,
            "loss": self._loss.read(),
            "step_seconds": pace,
            "version": metrics["version"],
            "chosen": meta.get("objective", "uniform") != "uniform",
            "coreset": int(meta.get("coreset", 0)),
            "window": int(meta.get("window", 0)),
            "age": current - int(meta.get("decided_at_step", current)),
            "next": None if over else max(0, controller.next_refresh - current),
            "failures": metrics["refresh_failures"],
            "refresh_share": metrics["refresh_seconds"] / total,
            "collect_share": metrics["collect_seconds"] / total,
            "level": str(decision.get("level", "")),
            "reason": str(decision.get("reason", "")),
            "frozen": controller.frozen,
            "shadow": controller.config.mode == "shadow",
        }


class LossReader:
    """The loss of the last micro-batch, read without waiting for a device that has not computed it yet."""

    def __init__(self) -> None:
        self._latest: Any = None
        self._copy: Any = None  # on its way from the device
        self._done: Any = None
        self._value: float | None = None

    def offer(self, loss: Any) -> None:
        """Keep a scalar tensor without computing anything."""
        if hasattr(loss, "numel") and loss.numel() == 1:
            self._latest = loss.detach()

    def read(self) -> float | None:
        """Return the loss, or None without any.

        On a GPU it is the loss whose copy was started at an earlier call, once that copy is complete.
        """
        if self._latest is None or self._latest.device.type == "cpu":
            return self._value if self._latest is None else float(self._latest)
        if self._latest.device.type != "cuda":
            return None
        import torch

        if self._done is not None and self._done.query():
            self._value, self._done = float(self._copy), None
        if self._done is None:
            self._copy = torch.empty((), dtype=torch.float32, pin_memory=True)
            self._copy.copy_(self._latest.reshape(()).float(), non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()
        return self._value


def _sender(destination: str) -> tuple[Send, float]:
    """Return the function that receives the facts, and the seconds between two calls of it."""
    if destination == LINES or not os.path.exists(destination):  # rank 0 may run on another host than the view
        return lambda facts: print(line(facts), flush=True), LINE_EVERY
    return _Datagrams(destination), DRAWN_EVERY


class _Datagrams:
    """Sends facts to a datagram socket at the path ``destination``."""

    def __init__(self, destination: str) -> None:
        self._destination, self._sender = destination, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sender.setblocking(False)

    def __call__(self, facts: Facts) -> None:
        # If the receiver is busy or gone, the report is dropped.
        with contextlib.suppress(BlockingIOError, ConnectionRefusedError, FileNotFoundError):
            self._sender.sendto(json.dumps(facts).encode(), self._destination)

    def close(self) -> None:
        self._sender.close()


def _discard(facts: Facts) -> None:
    pass


_reporters: weakref.WeakSet[ProgressReporter] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for reporter in list(_reporters):
        reporter.close()
