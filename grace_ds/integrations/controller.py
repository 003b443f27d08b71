"""Run one job's coreset: what happens at each forward, backward, step, save and load of a DeepSpeed engine.

The methods are in the order in which training calls them; :mod:`grace_ds.integrations.handle` attaches them to an engine
and detaches them again.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import uuid
from collections.abc import Sequence
from typing import Any

from grace_ds.comm.agreement import Agreement
from grace_ds.comm.base import Comm
from grace_ds.comm.liveness import LivenessProbe
from grace_ds.comm.peer_failure import PeerFailureHandler
from grace_ds.config.schema import GraceConfig
from grace_ds.data.in_flight import InFlightBatches, IssuedBatch, attention_of
from grace_ds.data.sampler import Geometry, Stream
from grace_ds.data.schedule import ScheduleBook, VisitCounts, load_book
from grace_ds.errors import ConfigError, GraceError, TransportError
from grace_ds.gradients.basis import TrustedBasis
from grace_ds.gradients.capture import LossCapture, MicroBatchCapture
from grace_ds.gradients.collector import GradientCollector
from grace_ds.gradients.influence_probe import InfluenceProbe
from grace_ds.gradients.job_call import refuse
from grace_ds.integrations.step_watch import StepWatch
from grace_ds.monitor.metrics import EventWriter, Metrics, Preview, Recorder, keep_config
from grace_ds.records import Losses, SampleRecords
from grace_ds.refresh import trigger
from grace_ds.refresh.choice import slack
from grace_ds.refresh.decision import by_role, collect_every, decision_of, worth_collecting, worth_reading
from grace_ds.refresh.runner import AgreedRefresh, RefreshRunner
from grace_ds.refresh.signals import RefreshContext, RefreshInputs
from grace_ds.refresh.state import RefreshState
from grace_ds.refresh.table import Table
from grace_ds.utils.rng import undisturbed_rng

log = logging.getLogger("grace_ds")

# The batch of a training forward, and the capture that its backward is read into.
Seen = tuple[IssuedBatch, MicroBatchCapture | LossCapture | None]


class Controller:
    """The state of GRACE for one engine.

    Args:
        config: resolved and checked.
        geometry: of the job's batches.
        context: of the refresh; its ``comm`` is the transport.
        collector: with an attached sketcher; None if nothing is collected (``replay``, uniform objectives).
        agreement: decides what must be the same on all ranks when the transport has failed.
        liveness: probes whether the other ranks' processes are alive.
        influence_probe: fits the trusted basis at a refresh; None without a trusted set.
        write_events: called on rank 0 after each refresh.
        preview: what the dataset shows of a sample, for ``run_dir``.
        fallback: recipe to continue with if probes cannot be made; None: that is an error.
    """

    def __init__(
        self,
        config: GraceConfig,
        geometry: Geometry,
        context: RefreshContext,
        collector: GradientCollector | None,
        agreement: Agreement,
        liveness: LivenessProbe,
        influence_probe: InfluenceProbe | None,
        write_events: EventWriter,
        preview: Preview | None = None,
        fallback: str | None = None,
    ) -> None:
        self.config, self.geometry, self.context = config, geometry, context
        self.collector, self.influence_probe, self.fallback = collector, influence_probe, fallback
        self.comm: Comm = context.comm
        self.peer_failures = PeerFailureHandler(liveness, self.comm, lambda: f"in training step {self.step + 1}")
        self.agreement = agreement
        self.runner = RefreshRunner(context, collector, influence_probe, agreement, self.peer_failures)
        self.recorder = Recorder(config.run_dir, write_events, preview) if self.comm.rank == 0 else Recorder(None, None)
        self.run = uuid.uuid4().hex  # of this process; see _take_over
        self.book = ScheduleBook()
        self.in_flight = InFlightBatches(geometry)
        self.watch = StepWatch()
        self.sampler: Stream | None = None  # None in shadow mode: the job's own sampler feeds the engine
        self.table = Table(SampleRecords.empty(config.collect.dim))
        self.seen = Table(Losses.empty())
        self.kept = RefreshState()
        self.visits = VisitCounts()
        self.reference: dict[int, float] = {}
        self.counted = 0  # position up to which the visits are counted
        self.cursor = 0  # position of the first sample not yet trained on
        self.lead = 0  # most samples by which the loaders have run ahead of the cursor
        self.step = 0
        self.next_refresh = 0
        self._closed = False
        self.basis: TrustedBasis | None = None
        self._steps_timed = 0  # optimizer steps behind metrics.train_seconds
        self._last_seconds = 0.0
        self.metrics = Metrics()
        self._current: Seen | None = None
        self.weighed: IssuedBatch | None = None  # the batch of the last training forward
        self._trained: list[Seen] = []
        self._unwatched: list[Seen] = []  # forwards of the step whose output holds no tensor that requires a gradient
        self._last_frontier, self._ramped = 0, False  # micro-batches at the last step; the batch has changed in this one
        self._clock = time.perf_counter()

    @property
    def frozen(self) -> bool:
        """Whether refreshes have ended: the transport has failed, as far as this rank knows, or GRACE is detached."""
        return self._closed or bool(self.agreement.frozen)

    # -- state of the run ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Make the first schedule, or load the recorded ones, before training.  Collective."""
        if self.config.replay is not None:
            schedules = load_book(self.config.replay).schedules
            self.context.pool.check(schedules)
            self.book.replace(schedules)
            log.info("replaying %d schedules from %s", len(self.book.schedules), self.config.replay)
        else:
            self.refresh()

    def begin_at(self, step: int, cursor: int) -> None:
        """Make a first schedule at a step and a position, after a checkpoint that holds none.  Collective."""
        self.stand_at(step, cursor)
        self.counted, self.lead, self.kept = cursor, 0, RefreshState()
        if self.config.replay is None:
            self.book.replace([])
            self.refresh()

    def stand_at(self, step: int, cursor: int) -> None:
        """Move to a step and a position; forget the batches in flight."""
        self.step, self.cursor = step, cursor
        self.in_flight.clear()
        self._current, self._trained, self._unwatched = None, [], []
        self.recorder.forget()
        self._clock = time.perf_counter()
        self.watch.restart(cursor)
        self.context.pool.hold(self.book.schedules)
        self._last_frontier = cursor // self.geometry.micro
        if self.sampler is not None:
            self.sampler.frontier = self.sampler.issued = self._last_frontier

    def snapshot(self) -> dict[str, Any]:
        """Return the metrics as a plain dict, with the clocks read now."""
        metrics = self.metrics
        if self.collector is not None:
            metrics.collect_seconds = self.collector.total_seconds
        train_seconds = metrics.train_seconds + time.perf_counter() - self._clock
        return {
            **dataclasses.asdict(metrics),
            **self.watch.counts(),
            "unrecognised": self.in_flight.unrecognised,
            "transport": self.comm.name,
            "probe_samples": self.influence_probe.probed if self.influence_probe is not None else 0,
            "train_seconds": train_seconds,
            "step": self.step,
            "cursor": self.cursor,
            "frozen": self.frozen,
        }

    def close(self, collective: bool = True) -> None:
        """Remove the layer hooks and close the transport.  A second call does nothing.

        Args:
            collective: whether the other ranks do so now too.
        """
        self._closed = True
        if self.collector is not None:
            self.collector.sketcher.detach()
        self.peer_failures.close()
        self.recorder.close()
        self.comm.close(collective)

    # -- the micro-batch -----------------------------------------------------------------------------------------------

    def before_forward(self, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        """Recognise the batch at the start of a grad-enabled training forward, and open the hooks for it."""
        issued = self.in_flight.match(inputs)
        if issued is None:
            return
        self.weighed = issued
        if self.influence_probe is not None:
            self.influence_probe.passes.saw(*inputs, issued)
        capture: MicroBatchCapture | LossCapture | None = None
        if self.collector is not None and len(issued.ids) and issued.ids.min() >= 0:
            sketcher = self.collector.sketcher
            if self.collecting:
                capture = sketcher.begin(issued.ids)
                capture.attention = attention_of(inputs, len(issued.ids))
            elif self.reading:
                capture = sketcher.read(issued.ids)
        self._current = (issued, capture)

    def after_forward(self, output: Any) -> Seen | None:
        """End the forward: read per-sample losses if the output holds the loss; return the argument of :meth:`on_backward`."""
        current, self._current = self._current, None
        if current is not None and self.influence_probe is not None:
            self.influence_probe.passes.returned(output)
        if current is not None and current[1] is not None:
            assert self.collector is not None
            self.collector.sketcher.end()
            self.collector.sketcher.observe_loss(output)
        return current

    def leave_unwatched(self, current: Seen) -> None:
        """Note a forward without an output to watch: it counts as trained at the loss's backward, or else at the step."""
        self._unwatched.append(current)

    def observe_loss(self, loss: Any) -> None:
        """Read the loss before its backward, for jobs that compute it outside of the module."""
        for current in self._unwatched:
            self.on_backward(current)
        self._unwatched = []
        if self.collector is not None and (self.collecting or self.reading):
            self.collector.sketcher.observe_loss(loss)

    def on_backward(self, current: Seen) -> None:
        """Count the batch of a forward as trained on; called when that forward's gradient arrives."""
        if any(issued is current[0] for issued, _ in self._trained):
            return
        self.in_flight.trained(current[0])
        self.watch.trained(current[0], self.geometry)
        self._trained.append(current)
        if self.sampler is not None:
            self.sampler.frontier = max(self.sampler.frontier, current[0].end)

    @property
    def forward_end(self) -> int:
        """Number of the micro-batch of the forward in progress plus one; 0 if it is not one of the schedule."""
        return self._current[0].end if self._current is not None else 0

    @property
    def micro_batches(self) -> int:
        """Micro-batches that have been trained on in the optimizer step in progress."""
        return len(self._trained)

    @property
    def capturing(self) -> bool:
        """Whether gradients are collected of the forward in progress."""
        return self._current is not None and isinstance(self._current[1], MicroBatchCapture)

    @property
    def collecting(self) -> bool:
        """Whether the gradients of the optimizer step in progress are collected."""
        collector = self.collector
        if collector is None or self.frozen:
            return False
        frozen, trusted = collector.sketcher.scale.frozen, self.influence_probe is not None
        if not worth_collecting(self.config, decision_of(self.book), frozen, trusted, self.basis, self.reference):
            return False
        due = (self.step + 1) % collect_every(self.config, self.book) == 0
        return due and trigger.collected(self.config, self.step, self.next_refresh)

    @property
    def reading(self) -> bool:
        """Whether the losses of the optimizer step in progress are read if its gradients are not collected."""
        if self.collector is None or self.frozen or not worth_reading(self.config, decision_of(self.book)):
            return False
        return trigger.collected(self.config, self.step, self.next_refresh)

    def follow(self, geometry: Geometry) -> None:
        """Adopt the batch size of the step that has just been made, in case the job ramps it up; the same on all ranks.

        Positions count samples, so only the number of steps that a schedule lasts changes.

        Raises:
            ConfigError: the micro-batch or the number of ranks has changed.
        """
        old = self.geometry
        if geometry == old:
            return
        if (geometry.ranks, geometry.rows) != (old.ranks, old.rows):
            raise ConfigError(
                f"the job has changed from {old.ranks} rank(s) × micro-batches of {old.rows} to {geometry.ranks} × "
                f"{geometry.rows} in the middle of a run: which sample stands where would not be defined. Ramp the batch up by "
                "accumulation (engine.set_train_batch_size), or load a checkpoint into a new engine"
            )
        log.info("step %d: a step is %d samples from here on, it was %d", self.step, geometry.batch, old.batch)
        self.geometry = self.in_flight.geometry = geometry
        self._ramped = True
        self.context = dataclasses.replace(self.context, batch=geometry.batch)
        self.runner.context = self.context
        if self.book.schedules and self.config.replay is None:  # the schedule ends sooner, or later
            last = self.book.schedules[-1]
            left = (last.start + len(last) - self.cursor) // geometry.batch - slack(
                self.config, self.config.refresh.interval_steps
            )
            self.next_refresh = min(self.next_refresh, self.step + max(1, left))

    # -- the step ------------------------------------------------------------------------------------------------------

    def after_step(
        self, step: int, applied: bool, grad_scale: float, seen: Sequence[MicroBatchCapture | LossCapture] = ()
    ) -> None:
        """Commit an optimizer step, at the accumulation boundary; the only place where the cursor moves.

        Args:
            step: optimizer steps done, skipped ones included (``engine.global_steps``).
            applied: False if the step was skipped for an overflow: the cursor moves on, no row is kept.
            grad_scale: accumulation steps divided by the loss scale of the step.
            seen: what was captured of the step's micro-batches, if another engine runs them; their forwards are not seen here.
        """
        collected = self.collecting
        for current in self._unwatched:
            self.on_backward(current)
        trained, self._trained, self._unwatched = self._trained, [], []
        found = [*[capture for _, capture in trained], *seen]
        captures = [capture for capture in found if isinstance(capture, MicroBatchCapture)]
        if self.collector is not None and applied:
            self.collector.read([reading for reading in found if isinstance(reading, LossCapture)], step)
        if collected:
            assert self.collector is not None
            try:
                if applied:
                    known = self.collector.sketcher.scale.frozen
                    rows = self.collector.commit(captures, step, grad_scale, self.comm)
                    self.watch.collected(rows, expected=known and bool(captures))
                else:
                    self.collector.discard(captures)
            except TransportError as error:
                self.peer_failures.check(error, f"after training step {step}, stage scale")
                self.retire(str(error))
                self.recorder.events({"frozen": 1.0}, self.cursor)
        geometry = self.geometry
        self.step = step
        self._steps_timed += 1
        if self.sampler is not None:
            moved = self.sampler.frontier - self._last_frontier
            if self.sampler.steps_even and not self._ramped:  # the step that changes its own length
                self.sampler.frontier += self.watch.advance(moved, geometry, self.in_flight)
            self._ramped = False
            self._last_frontier = self.sampler.frontier
            self.cursor = self.sampler.frontier * geometry.micro
            self.lead = max(self.lead, self.sampler.issued * geometry.micro - self.cursor)
        else:
            self.cursor += geometry.batch
        with undisturbed_rng():  # each of these may read the dataset
            self.recorder.settle()
            self.recorder.trained(step, self.cursor)
            due = trigger.is_due(self.config, step, self.next_refresh) and not self.frozen and self.config.replay is None
            if self.influence_probe is not None and not self.frozen and self.influence_probe.passes.asks(due):
                self._settle(self.influence_probe)
            if due and not self.frozen:
                self.refresh()

    def _settle(self, influence_probe: InfluenceProbe) -> None:
        """Continue without gradients, or end the run, if a probe cannot repeat the job's call of its model.  Collective.

        Raises:
            ConfigError: the recipe was set by name; on every rank.
        """
        try:
            why = influence_probe.settle()
        except TransportError as error:
            self.peer_failures.check(error, f"after training step {self.step}, stage call")
            self.retire(str(error))
            return
        if not why:
            return
        if self.fallback is None:
            refuse(self.config.recipe, why, influence_probe.passes.cure)
        if self.comm.rank == 0:
            log.warning(
                "recipe: auto goes on as %s: a probe would have to repeat the job's call of its model, which cannot be: %s; to "
                "have gradients used, %s",
                self.fallback,
                why,
                influence_probe.passes.cure,
            )
        self._fall_back(self.fallback)

    def _fall_back(self, to: str) -> None:
        """Continue under a recipe that reads nothing from the backward; drop what was read so far."""
        assert self.collector is not None
        self.collector.sketcher.detach()
        self.config = dataclasses.replace(self.config, recipe=to, ablate=[])
        self.context = dataclasses.replace(self.context, config=self.config)
        self.collector = self.influence_probe = self.basis = None
        self.runner.change(self.context)
        self.table, self.seen = Table(SampleRecords.empty(self.config.collect.dim)), Table(Losses.empty())
        self.kept, self.reference = RefreshState(self.kept.content), {}
        if self.config.run_dir is not None and self.comm.rank == 0:
            keep_config(self.config)

    # -- the refresh ---------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Make and publish the next schedule, or keep the old one if any rank fails.  Collective."""
        if not self.frozen and (why := self.agreement.frozen_by_any()):
            self.retire(f"on another rank: {why}")
            self.recorder.events({"frozen": 1.0}, self.cursor)
            return
        started, metrics = time.perf_counter(), self.metrics
        metrics.train_seconds += started - self._clock
        result = self.runner.run_refresh(self.step, metrics.version + 1, self._refresh_inputs)
        if result.lost is not None:
            self.retire(str(result.lost))
        if result.fresh is not None:
            self._take_over(result.fresh)
        else:
            metrics.refresh_failures += 1
            self.next_refresh = self.step + trigger.configured_interval(self.config, self.step)
            if not self.book.schedules:
                raise GraceError(
                    "the first schedule could not be made, so there is nothing to train on; the message above says why"
                )
        self._last_seconds = time.perf_counter() - started
        metrics.refresh_seconds += self._last_seconds
        metrics.report(self._last_seconds, result.fresh.outcome if result.fresh is not None else None, self.collector)
        metrics.events["frozen"] = float(self.frozen)
        self.recorder.events(metrics.events, self.cursor)
        self._clock = time.perf_counter()

    def _refresh_inputs(self) -> RefreshInputs:
        """Return what this rank knows at the start of a refresh; the collector still holds the rows.  Collective."""
        config, metrics = self.config, self.metrics
        # The first refresh reads the whole window's content, later ones do not: its cost says nothing about theirs.
        step_seconds = metrics.train_seconds / max(self._steps_timed, 1) if metrics.refreshes > 1 else None
        last = self.book.schedules[-1] if self.book.schedules else None
        core, audit = by_role(last, config.mode == "shadow")
        self.watch.compare(self.comm, self.book, self.geometry, self.cursor)
        return RefreshInputs(
            rows=SampleRecords.empty(config.collect.dim),
            losses=Losses.empty(),
            table=self.table,
            seen=self.seen,
            visits=self.visits_now(),
            step=self.step,
            version=metrics.version + 1,
            issued=self.issued(),
            interval=trigger.stretched_interval(config, self.step, self._last_seconds, step_seconds),
            reference=self.reference,
            decision=decision_of(self.book),
            since=int(last.meta["decided_at_step"]) if last is not None else -1,
            core=core,
            audit=audit,
            uniform=trigger.is_uniform(config, self.step),
            kept=self.kept,
            collect_every=collect_every(config, self.book),
            book=ScheduleBook(self.book.schedules),
        )

    def _take_over(self, fresh: AgreedRefresh) -> None:
        """Make the result of an agreed refresh this rank's state."""
        # Rank 0's run name is the one that is recorded; a resumed run keeps its name.
        last = self.book.schedules[-1] if self.book.schedules else None
        schedule = dataclasses.replace(fresh.outcome.schedule, run=(last.run if last is not None else "") or self.run)
        outcome = dataclasses.replace(fresh.outcome, schedule=schedule)
        self.table, self.seen, self.kept = outcome.table, outcome.seen, outcome.kept
        self.visits, self.counted = fresh.inputs.visits, self.cursor
        if self.collector is not None:
            self.collector.drained(fresh.running_mean)
        self.reference = dict(fresh.inputs.reference)
        if self.influence_probe is not None:
            self.take_basis(fresh.fitted.basis if fresh.fitted is not None else None)
            if fresh.fitted is not None:
                self.influence_probe.gradient = fresh.fitted.gradient
        self.watch.published(schedule.meta)
        self.metrics.count(schedule, last)
        self.book.publish(schedule)
        self.book.prune(self.cursor)
        self.context.pool.hold(self.book.schedules)
        self.next_refresh = int(schedule.meta["next_refresh_step"])
        totals = {
            "train_seconds": self.metrics.train_seconds,
            "refresh_seconds": self.metrics.refresh_seconds,
            "collect_seconds": self.collector.total_seconds if self.collector is not None else 0.0,
            "failures": float(self.metrics.refresh_failures),
        }
        self.recorder.made(outcome, totals)
        decision = decision_of(self.book)
        if self.comm.rank == 0 and decision is not None:
            log.info("schedule %d: %s: %s", schedule.version, decision.level, decision.reason)
        if self.step > 0:  # loading a checkpoint may still replace the very first schedule
            self.recorder.settle()

    def all_live(self) -> bool:
        """Return whether GRACE is frozen on no rank; the same answer on all ranks.  Collective, over the job's store."""
        if self._closed:
            return False
        live = not self.frozen
        if self.agreement.all_agree(live):
            return True
        if live:
            self.retire(self.agreement.frozen_by_any() or "another rank has not come in time, or is frozen")
        return False

    def retire(self, why: str) -> None:
        """Freeze GRACE on all ranks for reason ``why``: the transport has failed, training continues without refreshes."""
        self.agreement.freeze(why)
        if self.collector is not None:
            self.collector.sketcher.detach()
        log.error("step %d: %s; GRACE is frozen: training goes on with the schedule at hand", self.step, why)

    def take_basis(self, basis: TrustedBasis | None) -> None:
        """Measure alignments against ``basis`` from now on (None: not at all); the next refresh finds their unit."""
        assert self.collector is not None
        self.collector.sketcher.set_basis(basis)
        self.basis = basis

    def issued(self) -> int:
        """Return the position up to which samples are fixed: given to this rank's loader, or part of a pending schedule.

        Near the end of an epoch a loader can run ahead less far, but a loader that was resumed in the middle is not near the
        end.  The longest lead so far counts, so that both switch to the next schedule at the same position.
        """
        if self.sampler is None:
            return self.cursor
        pending = self.book.schedules[-1].start if self.book.schedules else 0
        return max(self.sampler.issued * self.geometry.micro, self.cursor + self.lead, pending)

    def visits_now(self) -> VisitCounts:
        """Return a copy of the visit counts with everything up to the cursor counted."""
        visits = VisitCounts(self.visits.ids, self.visits.counts)
        if self.book.schedules and self.cursor > self.counted and self.config.mode == "train":
            visits.add(self.book.slots(self.counted, self.cursor - self.counted).ids)
        return visits
