"""What rank 0 tells while a job runs, for ``--progress``: values that exist already, at most twice a second.

Nothing of a step waits for it: no collective, no device synchronisation, and what nobody takes is dropped.
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

from grace_ds.refresh import trigger as cadence
from grace_ds.utils.methods import replace_method

log = logging.getLogger("grace_ds")

VARIABLE = "GRACE_DS_PROGRESS"  # path of a datagram socket that draws, or LINES; set by ``--progress``
LINES = "lines"
DRAWN_EVERY, LINE_EVERY = 0.5, 60.0  # seconds
Facts = dict[str, Any]
Say = Callable[[Facts], None]


def follow(handle: Any) -> ProgressReporter | None:
    """Tells of the job behind the handle ``engine.grace_ds``, where ``--progress`` asks for it; on rank 0, None elsewhere."""
    where = os.environ.get(VARIABLE)
    if not where or handle.controller.comm.rank != 0:
        return None
    teller = ProgressReporter(handle.controller, *_speaker(where))
    _tellers.add(teller)
    teller.tell()
    return teller


def say_off() -> None:
    """Says that the job's config has no GRACE to tell of."""
    where = os.environ.get(VARIABLE)
    if where and int(os.environ.get("RANK", "0")) == 0:
        _speaker(where)[0]({"off": True})


def line(facts: Facts) -> str:
    """One plain line."""
    if facts.get("off"):
        return "grace: off in this job's config, so there is no progress to tell"
    return "grace: " + "; ".join(part for part in (where_it_is(facts), schedule(facts), cost(facts), guard(facts)) if part)


def where_it_is(facts: Facts) -> str:
    """Step, loss, pace."""
    parts = [f"step {facts['step']:,}" + (f"/{facts['steps']:,}" if facts["steps"] else "")]
    parts += [f"loss {facts['loss']:.4f}"] if facts["loss"] is not None else []
    parts += [f"{facts['step_seconds']:.3g} s/step"] if facts["step_seconds"] else []
    return "  ".join(parts)


def schedule(facts: Facts) -> str:
    """The schedule in force, and when the next one comes."""
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
    """GRACE's share of the time so far."""
    both = facts["refresh_share"] + facts["collect_share"]
    return f"overhead {both:.1%} (refreshes {facts['refresh_share']:.1%}, collect {facts['collect_share']:.1%})"


def guard(facts: Facts) -> str:
    """The guard's last decision, and states that change what all of it means."""
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
        say: takes the facts.
        every: seconds between two of them; where they are drawn, a refresh is told at once.
    """

    def __init__(self, controller: Any, say: Say, every: float) -> None:
        self.controller, self.say, self.every = controller, say, every
        self._loss = LossReader()
        self._due = 0.0
        self._seen: tuple[float, int] | None = None  # seconds of training and step at the last telling
        self._undo = [
            replace_method(controller, "after_step", self.stepped),
            replace_method(controller, "observe_loss", self.heard),
        ]

    def heard(self, original: Callable[..., Any], loss: Any) -> Any:
        """At each backward."""
        self._loss.offer(loss)
        return original(loss)

    def stepped(self, original: Callable[..., Any], step: int, *args: Any, **kwargs: Any) -> Any:
        """Around the controller's own work after an optimizer step, refreshes among it."""
        c = self.controller
        due = cadence.is_due(c.config, step, c.next_refresh) and not c.frozen and c.config.replay is None
        refreshing = due and self.every < LINE_EVERY
        if refreshing:
            self.tell(step)
        result = original(step, *args, **kwargs)
        if time.monotonic() >= self._due or refreshing:
            self.tell()
        return result

    def tell(self, step: int | None = None) -> None:
        """Says how the run stands; ``step``: done, where the controller does not know it yet."""
        self._due = time.monotonic() + self.every
        try:
            self.say(self.facts(step))
        except Exception as error:  # never the job's affair
            self.say = _nobody
            log.warning("the progress cannot be told any more (%s: %s); training goes on", type(error).__name__, error)

    def close(self) -> None:
        """Says how the run stands for the last time.  A second call does nothing."""
        while self._undo:
            self._undo.pop()()
        self.tell()
        say, self.say = self.say, _nobody
        if isinstance(say, _Datagrams):
            say.close()

    def facts(self, step: int | None = None) -> Facts:
        """JSON-able; shares are of the wall time since the start, validation and saving included."""
        c, m = self.controller, self.controller.snapshot()
        at = c.step if step is None else step
        meta = c.book.schedules[-1].meta if c.book.schedules else {}
        told: dict[str, Any] = dict(meta.get("guard") or {})
        over = c.frozen or c.config.replay is not None or 0 < c.config.total_steps <= c.next_refresh
        total = max(m["train_seconds"] + m["refresh_seconds"], 1e-9)
        before, self._seen = self._seen, (m["train_seconds"], at)
        pace = (m["train_seconds"] - before[0]) / (at - before[1]) if before is not None and at > before[1] else None
        return {
            "step": at,
            "steps": c.config.total_steps,
            "loss": self._loss.read(),
            "step_seconds": pace,
            "version": m["version"],
            "chosen": meta.get("objective", "uniform") != "uniform",
            "coreset": int(meta.get("coreset", 0)),
            "window": int(meta.get("window", 0)),
            "age": at - int(meta.get("decided_at_step", at)),
            "next": None if over else max(0, c.next_refresh - at),
            "failures": m["refresh_failures"],
            "refresh_share": m["refresh_seconds"] / total,
            "collect_share": m["collect_seconds"] / total,
            "level": str(told.get("level", "")),
            "reason": str(told.get("reason", "")),
            "frozen": c.frozen,
            "shadow": c.config.mode == "shadow",
        }


class LossReader:
    """The loss of the last micro-batch, read without waiting for a device that has not computed it yet."""

    def __init__(self) -> None:
        self._latest: Any = None
        self._copy: Any = None  # on its way from the device
        self._done: Any = None
        self._value: float | None = None

    def offer(self, loss: Any) -> None:
        """Keeps a scalar tensor; nothing is computed."""
        if hasattr(loss, "numel") and loss.numel() == 1:
            self._latest = loss.detach()

    def read(self) -> float | None:
        """The loss: on a GPU the one that was asked for at the reading before, once its copy has come; None without any."""
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


def _speaker(where: str) -> tuple[Say, float]:
    """What takes the facts, and how often."""
    if where == LINES or not os.path.exists(where):  # rank 0 may run on another host than what draws
        return lambda facts: print(line(facts), flush=True), LINE_EVERY
    return _Datagrams(where), DRAWN_EVERY


class _Datagrams:
    """Sends facts to a datagram socket at the path ``where``."""

    def __init__(self, where: str) -> None:
        self._where, self._sender = where, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sender.setblocking(False)

    def __call__(self, facts: Facts) -> None:
        # Where it is busy, or gone, the next word will do.
        with contextlib.suppress(BlockingIOError, ConnectionRefusedError, FileNotFoundError):
            self._sender.sendto(json.dumps(facts).encode(), self._where)

    def close(self) -> None:
        self._sender.close()


def _nobody(facts: Facts) -> None:
    pass


_tellers: weakref.WeakSet[ProgressReporter] = weakref.WeakSet()


@atexit.register
def _tell_the_end() -> None:
    for teller in list(_tellers):
        teller.close()
