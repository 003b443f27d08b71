"""One job's coreset: what runs at each forward, backward, step, save and load of a DeepSpeed engine.

Everything that training needs is here in the order in which it happens; :mod:`grace_ds.integrations.deepspeed` ties these
methods to an engine and takes them off again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.config.schema import GraceConfig
from grace_ds.errors import GraceError, PeerFailed, TransportError, TransportTimeout
from grace_ds.harvest import Harvester
from grace_ds.integrations.trust import TrustedProbe
from grace_ds.integrations.verdict import Verdict
from grace_ds.records import IntArray, Role, Rows, Schedule
from grace_ds.refresh import Outcome, refresh
from grace_ds.sampler import Geometry, IssuedBatch, Outstanding, StreamSampler
from grace_ds.schedule import Ledger, ScheduleBook, load_book, save_schedule
from grace_ds.signals import Inputs, Pipeline
from grace_ds.sketch.basis import TrustedBasis
from grace_ds.sketch.binding import Binding
from grace_ds.table import Table

log = logging.getLogger("grace_ds")

TrustFit = Callable[[int], tuple[TrustedBasis, float]]  # version → (basis, median alignment of held-out trusted samples)


@dataclass
class Metrics:
    """Totals of a run on this rank; ``events`` of the last refresh go to the engine's monitor as ``Grace/*``."""

    refreshes: int = 0
    refresh_failures: int = 0
    refresh_seconds: float = 0.0
    harvest_seconds: float = 0.0
    train_seconds: float = 0.0
    coreset_size: int = 0
    churn: list[float] = field(default_factory=list)
    version: int = -1
    events: dict[str, float] = field(default_factory=dict)


class Controller:
    """The state of GRACE beside one engine.

    Args:
        config: resolved and checked.
        geometry: of the job's batches.
        pipeline: of the refresh; its ``comm`` is the transport.
        harvester: with an attached sketcher; None where nothing is harvested (``replay``, uniform objectives).
        verdict: the agreement of last resort.
        trust: fits the trusted basis at a refresh; None without a trusted set.
        on_events: takes (name, value) pairs and the number of samples seen; called on rank 0 after each refresh.
    """

    def __init__(
        self,
        config: GraceConfig,
        geometry: Geometry,
        pipeline: Pipeline,
        harvester: Harvester | None,
        verdict: Verdict,
        trust: TrustedProbe | None,
        on_events: Callable[[dict[str, float], int], None],
    ) -> None:
        self.config, self.geometry, self.pipeline = config, geometry, pipeline
        self.harvester, self.verdict, self.trust, self.on_events = harvester, verdict, trust, on_events
        self.comm: Comm = pipeline.comm
        self.book = ScheduleBook()
        self.outstanding = Outstanding(geometry)
        self.sampler: StreamSampler | None = None  # None in shadow mode: the job's own sampler feeds it
        self.table = Table.empty(config.harvest.dim)
        self.ledger = Ledger()
        self.reference: dict[int, float] = {}
        self.counted = 0  # position up to which the ledger has counted
        self.cursor = 0  # position of the first sample not yet trained on
        self.step = 0
        self.next_refresh = 0
        self.frozen = False
        self.basis: TrustedBasis | None = None
        self._attempts = 0
        self._steps_timed = 0  # optimizer steps behind metrics.train_seconds
        self._last_seconds = 0.0
        self.metrics = Metrics()
        self._current: tuple[IssuedBatch, Binding | None] | None = None
        self._trained: list[tuple[IssuedBatch, Binding | None]] = []
        self._clock = time.perf_counter()

    # -- where the run stands ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Makes the first schedule (or takes up the recorded ones), before training.  Collective."""
        if self.config.replay is not None:
            # In place: the sampler holds this very book.
            self.book.schedules = load_book(self.config.replay).schedules
            log.info("replaying %d schedules from %s", len(self.book.schedules), self.config.replay)
        else:
            self.refresh()

    def begin_at(self, step: int) -> None:
        """Starts afresh at an optimizer step of a checkpoint that has no state of ours.  Collective."""
        self.stand_at(step, step * self.geometry.batch)
        self.counted = self.cursor
        if self.config.replay is None:
            self.book.schedules = []
            self.refresh()

    def stand_at(self, step: int, cursor: int) -> None:
        """Moves to a step and a position; batches that are out are forgotten."""
        self.step, self.cursor = step, cursor
        self.outstanding.clear()
        self._current, self._trained = None, []
        self._clock = time.perf_counter()
        if self.sampler is not None:
            self.sampler.frontier = self.sampler.issued = cursor // self.geometry.micro

    def snapshot(self) -> dict[str, Any]:
        """The metrics as a plain dict, with the clocks read now."""
        m = self.metrics
        if self.harvester is not None:
            m.harvest_seconds = self.harvester.total_seconds
        now = m.train_seconds + time.perf_counter() - self._clock
        return {
            **dataclasses.asdict(m),
            "train_seconds": now,
            "step": self.step,
            "cursor": self.cursor,
            "frozen": self.frozen,
        }

    def close(self) -> None:
        """Removes the layer hooks and closes the transport.  A second call does nothing."""
        self.frozen = True
        if self.harvester is not None:
            self.harvester.sketcher.detach()
        self.comm.close()

    # -- the micro-batch -----------------------------------------------------------------------------------------------

    def before_forward(self, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        """At the start of a grad-enabled training forward: recognises the batch and opens the hooks for it."""
        issued = self.outstanding.match(inputs)
        if issued is None:
            return
        if self.trust is not None and not self.trust.call.known:
            args, kwargs = inputs
            self.trust.call.learn(args, kwargs, issued.batch)
        binding = None
        if self.harvesting and len(issued.ids) and issued.ids.min() >= 0:
            assert self.harvester is not None
            binding = self.harvester.sketcher.begin(issued.ids)
        self._current = (issued, binding)

    def after_forward(self, output: Any) -> tuple[IssuedBatch, Binding | None] | None:
        """At its end: reads per-sample losses where the output holds the loss; returns what to pass to :meth:`on_backward`."""
        current, self._current = self._current, None
        if current is not None and current[1] is not None:
            assert self.harvester is not None
            self.harvester.sketcher.end()
            self.harvester.sketcher.observe_loss(output)
        return current

    def observe_loss(self, loss: Any) -> None:
        """For jobs that compute the loss outside the module: called with it before the backward."""
        if self.harvesting:
            assert self.harvester is not None
            self.harvester.sketcher.observe_loss(loss)

    def on_backward(self, current: tuple[IssuedBatch, Binding | None]) -> None:
        """When the gradient of a bound forward arrives: from here on its batch counts as trained on."""
        if any(issued is current[0] for issued, _ in self._trained):
            return
        self.outstanding.trained(current[0])
        self._trained.append(current)
        if self.sampler is not None:
            self.sampler.frontier = max(self.sampler.frontier, current[0].end)

    @property
    def harvesting(self) -> bool:
        """Whether the optimizer step in progress is harvested."""
        if self.harvester is None or self.frozen:
            return False
        first = self.config.start_step - self.config.refresh.interval_steps
        stopped = bool(self.config.stop_step) and self.step >= self.config.stop_step
        return self.step >= first and not stopped and self.harvester.wanted(self.step + 1)

    # -- the step ------------------------------------------------------------------------------------------------------

    def after_step(self, step: int, applied: bool, grad_scale: float) -> None:
        """The one commit point: after the accumulation boundary's step.

        Args:
            step: optimizer steps done, skipped ones included (``engine.global_steps``).
            applied: False where the step was skipped for an overflow: the cursor moves on, no row is kept.
            grad_scale: accumulation steps divided by the loss scale of the step.
        """
        harvested = self.harvesting
        trained, self._trained = self._trained, []
        bindings = [binding for _, binding in trained if binding is not None]
        if harvested:
            assert self.harvester is not None
            if applied:
                self.harvester.commit(bindings, step, grad_scale, self.comm)
            else:
                self.harvester.discard(bindings)
        g = self.geometry
        self.step = step
        self._steps_timed += 1
        self.cursor = self.sampler.frontier * g.micro if self.sampler is not None else self.cursor + g.batch
        if self.next_refresh <= step and not self.frozen and self.config.replay is None:
            self.refresh()

    # -- the refresh ---------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Makes and publishes the next schedule, or keeps the old one if any rank fails.  Collective."""
        started = time.perf_counter()
        self.metrics.train_seconds += started - self._clock
        version = self.metrics.version + 1
        outcome: Outcome | None = None
        try:
            outcome, take_over = self._attempt(version)
            take_over()
            self._publish(outcome)
        except PeerFailed as error:
            log.warning("step %d: %s; schedule %d stays", self.step, error, version - 1)
        except TransportError as error:
            self._retire(error)
        except Exception as error:
            trace = self.config.debug or not isinstance(error, GraceError)
            log.warning(
                "step %d: refresh %d failed on this rank (%s: %s); schedule %d stays",
                self.step,
                version,
                type(error).__name__,
                error,
                version - 1,
                exc_info=trace,
            )
            self._tell_others()
        if outcome is None:
            self.metrics.refresh_failures += 1
            self.next_refresh = self.step + self.configured_interval()
            if not self.book.schedules:
                raise GraceError(
                    "the first schedule could not be made, so there is nothing to train on; the message above says why"
                )
        seconds = time.perf_counter() - started
        self.metrics.refresh_seconds += seconds
        self._last_seconds = seconds
        self._report(seconds, outcome)
        self._clock = time.perf_counter()

    def _attempt(self, version: int) -> tuple[Outcome, Callable[[], None]]:
        """The refresh up to the agreement that it counts; returns what it made and what must be taken over."""
        self._attempts += 1
        interval = self.interval()
        fitted = self.trust(version) if self.trust is not None and self.worth_a_basis(interval) else None
        rows, mean = Rows.empty(self.config.harvest.dim), None
        if self.harvester is not None:
            rows, mean = self.harvester.pending(self.comm)
        ledger = self.counted_ledger()
        x = Inputs(rows, self.table, ledger, self.step, version, self.issued(), interval, self.reference, self.is_uniform())
        outcome = refresh(self.pipeline, x)
        self._agree()

        def take_over() -> None:
            self.table, self.ledger, self.counted = outcome.table, ledger, self.cursor
            if self.harvester is not None:
                self.harvester.drained(mean)
            if fitted is not None and self.harvester is not None:
                self.take_basis(*fitted)

        return outcome, take_over

    def _agree(self) -> None:
        """Returns when the refresh counts on every rank; raises on every rank when it does not."""
        try:
            self.comm.agree()
        except TransportTimeout as error:
            # Every rank may have come and only the answer been lost: then the others have published, and so must we.
            if not self.verdict.abort(self._attempts):
                raise
            self._retire(error)
        else:
            if not self.verdict.commit(self._attempts):
                raise TransportTimeout("another rank had given this refresh up when its wait ran out")

    def _tell_others(self) -> None:
        try:
            self.comm.abort()
        except TransportError as error:
            self._retire(error)

    def _retire(self, error: Exception) -> None:
        """The transport is finished, training is not: no further refresh, nothing more to pay."""
        self.frozen = True
        if self.harvester is not None:
            self.harvester.sketcher.detach()
        log.error("step %d: %s; GRACE is frozen: training goes on with the schedule at hand", self.step, error)

    def take_basis(self, basis: TrustedBasis, median: float) -> None:
        """Alignments are measured against ``basis`` from here on; ``median`` is its unit."""
        assert self.harvester is not None
        self.harvester.sketcher.set_basis(basis)
        self.basis = basis
        self.reference[basis.version] = median
        if median <= 0 and self.comm.rank == 0:
            log.warning(
                "step %d: trusted samples do not align with one another (median %.3f): alignment is left out",
                self.step,
                median,
            )

    def configured_interval(self) -> int:
        """Optimizer steps until the next refresh, as the config has it."""
        c = self.config
        return c.start_step - self.step if self.step < c.start_step else c.refresh.interval_steps

    def interval(self) -> int:
        """Steps until the refresh after this one: as configured, or stretched to stay below the overhead.  Collective."""
        c, m = self.config.refresh, self.metrics
        steps = self.configured_interval()
        # The first refresh reads the whole window's content, later ones do not: its cost says nothing about theirs.
        if c.cadence == "adaptive" and self.step >= self.config.start_step and m.refreshes > 1 and m.train_seconds > 0:
            a_step = m.train_seconds / max(self._steps_timed, 1)
            steps = max(steps, int(np.ceil(self._last_seconds / (c.max_overhead * a_step))))
        # Every rank has its own clock; rank 0's decides.
        return int(self.comm.broadcast(np.array([steps], np.int64))[0])

    def is_uniform(self) -> bool:
        """Whether the schedule made now is the corpus in uniform order: before ``start_step`` or from ``stop_step`` on."""
        c = self.config
        return self.step < c.start_step or (c.stop_step > 0 and self.step >= c.stop_step)

    def worth_a_basis(self, interval: int) -> bool:
        """Whether a trusted basis fitted now is of use: the layer scale is known and rows will be harvested with it."""
        c = self.config
        stopped = c.stop_step > 0 and self.step >= c.stop_step
        soon = self.step + interval > c.start_step - c.refresh.interval_steps
        return self.harvester is not None and self.harvester.sketcher.scale.frozen and not stopped and soon

    def issued(self) -> int:
        """Position up to which this rank's loader has been given samples."""
        return self.sampler.issued * self.geometry.micro if self.sampler is not None else self.cursor

    def counted_ledger(self) -> Ledger:
        """The ledger with everything up to the cursor counted; the old one is left as it was."""
        ledger = Ledger(self.ledger.ids, self.ledger.counts)
        if self.book.schedules and self.cursor > self.counted and self.config.mode == "train":
            ledger.add(self.book.slots(self.counted, self.cursor - self.counted).ids)
        return ledger

    def _publish(self, outcome: Outcome) -> None:
        schedule = outcome.schedule
        previous = self.book.schedules[-1] if self.book.schedules else None
        self.book.publish(schedule)
        self.book.prune(min(self.cursor, self.issued()))
        self.next_refresh = int(schedule.meta["next_refresh_step"])
        m = self.metrics
        m.version, m.refreshes = schedule.version, m.refreshes + 1
        m.coreset_size = int(schedule.meta["coreset"])
        if previous is not None:
            now, before = _core(schedule), _core(previous)
            m.churn.append(1.0 - float(np.isin(now, before).mean()))
        if self.config.run_dir is not None and self.comm.rank == 0:
            self._record(schedule, outcome)

    def _record(self, schedule: Schedule, outcome: Outcome) -> None:
        """Keeps the schedule for ``trace`` and ``replay``.  A full disk must not stop training."""
        try:
            folder = Path(str(self.config.run_dir)) / "schedules"
            folder.mkdir(parents=True, exist_ok=True)
            save_schedule(schedule, folder)
            line = {
                "step": self.step,
                "version": schedule.version,
                **outcome.counts,
                **dict(schedule.meta),
                "seconds": outcome.seconds,
            }
            with (folder.parent / "refreshes.jsonl").open("a") as f:
                f.write(json.dumps(line) + "\n")
        except OSError as error:
            log.warning(
                "schedule %d could not be kept in %s (%s); training goes on",
                schedule.version,
                self.config.run_dir,
                error,
            )

    def _report(self, seconds: float, outcome: Outcome | None) -> None:
        m = self.metrics
        if self.harvester is not None:
            m.harvest_seconds = self.harvester.total_seconds
        events = {
            "version": float(m.version),
            "refresh_seconds": seconds,
            "refresh_failures": float(m.refresh_failures),
            "coreset_size": float(m.coreset_size),
            "churn": m.churn[-1] if m.churn else 1.0,
        }
        if self.harvester is not None:
            events["harvest_seconds"] = m.harvest_seconds
            events["harvest_peak_bytes"] = float(self.harvester.sketcher.peak_bytes)
            events["rows_dropped"] = float(self.harvester.rows_dropped)
            events["hook_failures"] = float(self.harvester.sketcher.failures)
        if outcome is not None:
            events |= {f"stage_seconds/{name}": value for name, value in outcome.seconds.items()}
            events |= dict(outcome.counts)
            share = outcome.schedule.meta.get("effective_share")
            if share is not None:
                events["effective_share"] = float(share)
        m.events = events
        if self.comm.rank == 0:
            self.on_events({f"Grace/{name}": value for name, value in events.items()}, self.cursor)


def _core(schedule: Schedule) -> IntArray:
    return np.unique(schedule.ids[schedule.roles == Role.CORE])
