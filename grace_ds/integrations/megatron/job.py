"""Run one Megatron job: connect the dataset's side (:func:`wrap`) and the model's side (:func:`attach`).

Position p of the run is row ``p`` of what Megatron's sampler iterates over, and ``consumed_samples`` is the current position.
A refresh is made right after the optimizer's step, which every rank makes once per step, whatever the pipeline does, whether
the step was run twice, and whether it was applied.  Only ranks that hold the dataset take part in a refresh; the others see no
data and need no schedule.  Where gradients are read, they follow: :mod:`~grace_ds.integrations.megatron.gradients`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from grace_ds.comm.agreement import agreement_of
from grace_ds.comm.all_ranks import run_on_all_ranks
from grace_ds.comm.base import Comm
from grace_ds.comm.choose import choose, share
from grace_ds.comm.liveness import LivenessProbe
from grace_ds.comm.time_limits import within_job_limit
from grace_ds.config.load import load_config
from grace_ds.config.schema import GraceConfig
from grace_ds.data.schedule import ScheduleSlice
from grace_ds.data.trusted import Tokenize
from grace_ds.errors import CheckpointError, ConfigError
from grace_ds.gradients.capture import LossCapture, MicroBatchCapture
from grace_ds.gradients.influence_probe import InfluenceProbe
from grace_ds.integrations import unchanged
from grace_ds.integrations.controller import Controller
from grace_ds.integrations.megatron.corpus import Corpus, Texts, follow, one_epoch
from grace_ds.integrations.megatron.cyclic import CyclicPositions
from grace_ds.integrations.megatron.gradients import Gradients, gradients_of
from grace_ds.integrations.megatron.job_state import Facts, arguments, facts_of, virtual_stages
from grace_ds.integrations.megatron.positions import Ring, Scheduled
from grace_ds.integrations.megatron.resume import begin, keep_facts, resume
from grace_ds.integrations.setup import Components, fallback_of, prepare, refresh_context, settled
from grace_ds.integrations.trusted_set import UserInputs
from grace_ds.integrations.world import check_world_size
from grace_ds.monitor.metrics import keep_config, preview_of
from grace_ds.records import IntArray
from grace_ds.refresh.choice import slack
from grace_ds.utils.methods import replace_method
from grace_ds.utils.screen import log_to_screen

log = logging.getLogger("grace_ds")


class Position:
    """The position of the run, in micro-batches over all ranks; a :class:`~grace_ds.data.sampler.Stream`."""

    def __init__(self, frontier: int, steps_even: bool) -> None:
        self.frontier = self.issued = frontier
        self.steps_even = steps_even


class Feed:
    """A rank's part in the selection: the controller, and the ring that its data workers read.

    Args:
        controller: without hooks on any engine; driven by :meth:`after_step`.
        corpus: defines what the ids mean.
        facts: of the job.
        ring: that the job's data workers read; None if the job keeps its own order, and the schedule is only logged.
        gradients: this rank's part in reading them; None if none are.
    """

    def __init__(
        self, controller: Controller, corpus: Corpus, facts: Facts, ring: Ring | None, gradients: Gradients | None = None
    ) -> None:
        self.controller, self.corpus, self.facts, self.ring, self.gradients = controller, corpus, facts, ring, gradients
        if gradients is not None:
            gradients.ids = lambda micro: self._micro_batch(facts.cursor_before(controller.cursor), micro)
        self.position = Position(facts.consumed // facts.geometry.micro, not facts.uneven)
        self._fence = (-1, 0)  # step of the next refresh, and the position that it is published up to
        if ring is not None:
            controller.sampler = self.position

    def start(self, run_dir: str | None) -> None:
        """Resume the run, or make its first schedule.  Collective over the ranks with data.

        Raises:
            CheckpointError: the run cannot be resumed from ``run_dir``; on every rank.
        """
        controller, facts = self.controller, self.facts
        step, replay = facts.consumed // facts.geometry.batch, controller.config.replay is not None
        if facts.consumed and not replay and resume(controller, run_dir, self.corpus.digest, step, facts.consumed):
            log.info("step %d: %d schedules taken up from %s", step, len(controller.book.schedules), run_dir)
        else:
            self._begin(run_dir, step)
        run_on_all_ranks(controller.comm, lambda: self._keep(run_dir))
        controller.recorder.settle()
        self._publish(started=False)

    def _begin(self, run_dir: str | None, step: int) -> None:
        """Make the run's first schedule, at whatever step the job is."""
        controller, consumed, replay = self.controller, self.facts.consumed, self.controller.config.replay is not None
        if consumed and not replay and controller.config.checkpoint.on_missing_state == "error":
            raise CheckpointError(
                f"{consumed} samples are consumed, and run_dir {run_dir} holds no schedule of this run; set "
                "checkpoint.on_missing_state: rebuild to begin a coreset here"
            )
        if run_dir is not None and not replay:
            run_on_all_ranks(controller.comm, lambda: begin(run_dir) if controller.comm.rank == 0 else None)
        if consumed:
            if not replay:
                log.warning("%d samples are consumed, and run_dir %s holds no schedule: a coreset is begun", consumed, run_dir)
            controller.begin_at(step, consumed)
        if replay or not consumed:
            controller.start()

    def _keep(self, run_dir: str | None) -> None:
        """Record what the run is, on rank 0."""
        if run_dir is not None and self.controller.comm.rank == 0:
            keep_facts(run_dir, self.corpus.digest, len(self.corpus), self.facts.geometry.batch)
            keep_config(self.controller.config)

    def after_step(self, applied: bool, loss_scale: float = 1.0) -> None:
        """Follow an optimizer step; call it on every rank with data.  Collective if a refresh is due.

        Args:
            applied: False if the step was skipped for an overflow.
            loss_scale: of the step.
        """
        gradients = self.gradients
        if gradients is None:
            self._follow_step(applied, 1.0, [])
            return
        try:
            self._follow_step(applied, gradients.grad_scale(loss_scale), gradients.micro.take())
        except BaseException as error:
            gradients.release(self.controller, error)
            raise
        gradients.release(self.controller, None)

    def _follow_step(self, applied: bool, grad_scale: float, seen: Sequence[MicroBatchCapture | LossCapture]) -> None:
        geometry = self.facts.geometry
        cursor = self.facts.cursor_after(self.controller.cursor)
        self.position.frontier = cursor // geometry.micro
        self.position.issued = self.position.frontier + self.facts.lag * geometry.accumulation
        self.controller.after_step(cursor // geometry.batch, applied, grad_scale, seen)
        self._publish()

    def slots(self, start: int, count: int) -> ScheduleSlice:
        """Return the samples of positions ``start … start + count - 1``."""
        return self.controller.book.slots(start, count)

    def ids(self, step: int, micro: int) -> IntArray:
        """Return this data-parallel rank's samples of micro-batch ``micro`` of the step after ``step`` steps: (rows,) int64.

        Raises:
            ConfigError: the job does not train on the schedule.
        """
        if self.ring is None:
            raise ConfigError("mode: shadow leaves the job its own order, and its samples have no ids here; use mode: train")
        return self._micro_batch(step * self.facts.geometry.batch, micro)

    def _micro_batch(self, start: int, micro: int) -> IntArray:
        """Return this data-parallel rank's samples of micro-batch ``micro`` of the step from position ``start`` on."""
        geometry = self.facts.geometry
        return self.slots(start + micro * geometry.micro + geometry.rank * geometry.rows, geometry.rows).ids

    def _publish(self, started: bool = True) -> None:
        """Publish to the data workers the ids up to where the next schedule may begin, as far as the ring reaches.

        The next refresh follows the first optimizer step that reaches it.  Iterations without one, which Megatron-LM was told
        to skip, are read all the same, so the ids go on over them.
        """
        if self.ring is None:
            return
        controller, batch = self.controller, self.facts.geometry.batch
        due = max(controller.next_refresh, controller.step + 1)
        if self._fence[0] != due:
            self._fence = (due, self.facts.next_end(controller.cursor, due * batch, started) + self.facts.lag * batch)
        fence = self._fence[1]
        if controller.frozen or controller.config.replay is not None:
            fence = controller.cursor + self.ring.capacity
        start, end = max(self.ring.end, controller.cursor), min(fence, controller.cursor + self.ring.capacity)
        if end > start:
            self.ring.write(start, controller.book.slots(start, end - start).ids)


class Wrapping:
    """The calls of :func:`wrap` in one run: one for each virtual stage of an interleaved pipeline, otherwise one.

    Each stage of such a pipeline builds a dataset, most of them none.  The run's schedule is made in the last call, when it is
    known which ranks have data; what earlier calls have returned reads the schedule from then on.

    Args:
        config: resolved; ``recipe`` and ``refresh`` are settled here.

    Attributes:
        gradients: this rank's part in reading them, from :meth:`settle` on; None if none are.
    """

    def __init__(self, config: GraceConfig, facts: Facts, user_inputs: UserInputs) -> None:
        self.config, self.facts, self.user_inputs = config, facts, user_inputs
        self.fallback = fallback_of(config)
        self.gradients: Gradients | None = None
        # The first schedule is used until the second one takes over, ``lag`` steps after the second one is made.
        config.refresh.slack_steps = max(slack(config, config.refresh.interval_steps), facts.lag)
        self.left = virtual_stages()
        self.corpus: Corpus | None = None
        self.ring: Ring | None = None

    def add(self, train_ds: Any) -> Any:
        """Return what the job reads instead of a stage's dataset.  Collective over all ranks."""
        corpus = corpus_on_all_ranks(train_ds)
        self.corpus = corpus or self.corpus
        if corpus is None:
            return None
        if self.config.mode != "train":
            return train_ds
        facts, interval = self.facts, max(self.config.refresh.interval_steps, self.config.start_step, 1)
        self.ring = self.ring or Ring((2 * interval + facts.lag + facts.longest_gap + 2) * facts.geometry.batch)
        sampler, position = getattr(facts.args, "dataloader_type", None), None
        if sampler == "cyclic":
            position = CyclicPositions(len(train_ds), facts.geometry, bool(facts.args.data_sharding), facts.total)
        return Scheduled(corpus, self.ring, len(train_ds), position)

    def settle(self, chunks: Sequence[nn.Module]) -> Gradients | None:
        """Find out whether gradients can be read, and decide ``recipe: auto``.  Collective over all ranks.

        Args:
            chunks: this rank's parts of the model.

        Raises:
            ConfigError: they cannot, and the config names them; on every rank.
        """
        holds_data = self.corpus is not None
        self.config, self.gradients = settled(self.config, lambda config: gradients_of(config, self.facts, chunks, holds_data))
        return self.gradients

    def finish(self) -> Feed | None:
        """Make the run's first schedule, or resume the run; None on a rank without data.  Collective over all ranks."""
        gradients, corpus = self.gradients, self.corpus
        comm, liveness = transport(self.config, corpus is not None), LivenessProbe.open(os.environ)
        if corpus is None:
            if gradients is not None:
                gradients.listen()
            return None
        try:
            feed = self._feed(corpus, comm, liveness)
            feed.start(self.config.run_dir)
        except BaseException as error:
            if gradients is not None:
                gradients.release(None, error)
            raise
        if gradients is not None:
            gradients.release(feed.controller, None)
        return feed

    def _feed(self, corpus: Corpus, comm: Comm, liveness: LivenessProbe) -> Feed:
        """Build the feed of a rank with data.  Collective over these ranks."""
        grace, facts, gradients = self.config, self.facts, self.gradients
        texts, blend = Texts(corpus), corpus.blend

        def read() -> tuple[Components, InfluenceProbe | None]:
            parts = prepare(texts, grace, facts.geometry, self.user_inputs)
            if gradients is None or parts.trusted is None or "gradients" not in grace.parts:
                return parts, None
            return parts, gradients.influence_probe(comm, corpus, parts.trusted, facts)

        parts, influence_probe = run_on_all_ranks(comm, read)
        arrange = None if blend is None else lambda schedule: follow(blend, schedule)
        context = refresh_context(comm, grace, facts.geometry, parts, arrange)
        if blend is not None and parts.sources is None:
            context = dataclasses.replace(context, sources=blend.of)
        show = preview_of(texts, grace.features.tokens_key)
        controller = Controller(
            grace,
            facts.geometry,
            context,
            None if gradients is None else gradients.collector,
            agreement_of(comm),
            liveness,
            influence_probe,
            lambda *_: None,
            show,
            self.fallback,
        )
        return Feed(controller, corpus, facts, self.ring, gradients)


class Job:
    """What is attached in this process.

    Attributes:
        feed: None before :func:`wrap`, and on a rank without data.
        off: :func:`wrap` was called, and the job runs without GRACE.
        wrapping: between the first and the last call of :func:`wrap` in an interleaved pipeline.
        chunks: this rank's parts of the model, as they were attached.
        gradients: this rank's part in reading them; None if none are.
    """

    def __init__(self) -> None:
        self.feed: Feed | None = None
        self.wrapped = self.off = False
        self.wrapping: Wrapping | None = None
        self.chunks: list[nn.Module] = []
        self.gradients: Gradients | None = None
        self._optimizer: Any = None
        self._restore: list[Callable[[], None]] = []

    def attach(self, model: nn.Module, optimizer: Any) -> None:
        """Follow ``optimizer``, or the one that the first training forward of ``model`` reveals if none is given."""
        chunks = list(model) if isinstance(model, (list, tuple)) else [model]
        if not self.wrapped:
            self.chunks += [chunk for chunk in chunks if not any(chunk is known for known in self.chunks)]
        if optimizer is not None:
            self._follow(optimizer)
            return
        for chunk in chunks:
            self._restore.append(chunk.register_forward_pre_hook(self._find_optimizer).remove)

    def detach(self) -> None:
        """Remove all hooks and replaced methods, and close the transport."""
        while self._restore:
            self._restore.pop()()
        self._optimizer = None
        if self.feed is not None:
            self.feed.controller.close()
        if self.gradients is not None:
            self.gradients.close()
        self.feed, self.wrapping, self.gradients, self.chunks = None, None, None, []
        self.wrapped = self.off = False

    def _find_optimizer(self, module: nn.Module, args: Any) -> None:
        if self._optimizer is not None or not (module.training and torch.is_grad_enabled()):
            return
        scale = getattr(getattr(module, "config", None), "grad_scale_func", None)
        optimizer = getattr(scale, "__self__", None)
        if optimizer is None or not hasattr(optimizer, "step"):
            raise ConfigError(
                "the model's config has no grad_scale_func of an optimizer, by which Megatron's training loop tells which one it "
                "is: pass it, grace_ds.megatron.attach(model, optimizer)"
            )
        self._follow(optimizer)

    def _follow(self, optimizer: Any) -> None:
        if self._optimizer is optimizer:
            return
        if self._optimizer is not None:
            raise ConfigError("grace_ds.megatron is attached to another optimizer already; call grace_ds.megatron.detach() first")
        self._optimizer = optimizer
        self._restore.append(replace_method(optimizer, "step", self._step))

    def _step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        scale = 1.0 if self.gradients is None else float(self._optimizer.get_loss_scale())
        result = original(*args, **kwargs)
        if self.wrapping is not None:
            raise ConfigError(
                f"an interleaved pipeline builds a dataset for each of its {virtual_stages()} virtual stages, and "
                f"{self.wrapping.left} of them were not given to grace_ds.megatron.wrap: call it for each of them on every rank, "
                "also for None"
            )
        if not self.wrapped:
            raise ConfigError(
                "grace_ds.megatron.attach was called, and the training dataset was not wrapped: return "
                "grace_ds.megatron.wrap(train_ds, config) from the dataset provider, on every rank"
            )
        # Megatron's optimizers return (applied, gradient norm, zeros); False after an overflow.
        applied = bool(result[0]) if isinstance(result, tuple) and result else True
        if self.feed is not None:
            self.feed.after_step(applied, scale)
        elif self.gradients is not None:
            self.gradients.follow(applied, scale)
        return result


job = Job()


def wrap(
    train_ds: Any,
    config: Mapping[str, Any] | str,
    *,
    consumed_samples: int | None = None,
    micro_batch_size: int | None = None,
    global_batch_size: int | None = None,
    num_workers: int | None = None,
    lag: int | None = None,
    trusted_data: Any = None,
    tokenize: Tokenize | None = None,
) -> Any:
    """See :func:`grace_ds.megatron.wrap`."""
    if job.off:
        return train_ds
    if job.wrapped:
        raise ConfigError("grace_ds.megatron.wrap was called twice; call grace_ds.megatron.detach() first")
    if job.wrapping is None:
        block = {"file": config} if isinstance(config, str) else dict(config)
        grace = load_config(block, "grace_ds.megatron.wrap(config)")
        if not grace.enabled or getattr(arguments(), "skip_train", False):
            job.off = job.wrapped = True
            return train_ds
        unchanged.switched_on()
        log_to_screen(dist.get_rank() if dist.is_initialized() else 0)
        if grace.weights != "none":
            raise ConfigError("weights: inverse_probability is not passed on to Megatron's loss; set weights: none")
        check_world_size(dist.get_world_size() if dist.is_initialized() else 1, os.environ)
        facts = facts_of(consumed_samples, micro_batch_size, global_batch_size, num_workers, lag)
        job.wrapping = Wrapping(grace, facts, UserInputs(trusted_data, None, tokenize, None))
    wrapping = job.wrapping
    wrapped = wrapping.add(train_ds)
    wrapping.left -= 1
    if not wrapping.left:
        job.gradients = wrapping.settle(job.chunks)
        job.feed, job.wrapping, job.wrapped = wrapping.finish(), None, True
    return wrapped


def transport(config: GraceConfig, data: bool) -> Comm:
    """Return the transport between the ranks that hold the dataset; any other rank gets one for itself alone.

    Collective over all ranks.

    Args:
        data: whether this rank holds the dataset.

    Raises:
        ConfigError: no rank holds a dataset.
    """
    if not dist.is_initialized():
        return choose(config.comm, timeout=within_job_limit(config.refresh.timeout_seconds))
    members = [rank for rank, holds in enumerate(share(data)) if holds]
    if not members:
        raise ConfigError(
            "no rank has a training dataset: grace_ds.megatron.wrap got None everywhere; pass what the provider built"
        )
    mine = members if data else [dist.get_rank()]
    return choose(config.comm, members=mine, timeout=within_job_limit(config.refresh.timeout_seconds))


def corpus_on_all_ranks(train_ds: Any) -> Corpus | None:
    """Return the corpus.  Collective: rank 0 builds what is not cached, then the other ranks read it."""
    if not dist.is_initialized():
        return one_epoch(train_ds, True, lambda: None)
    return one_epoch(train_ds, dist.get_rank() == 0, dist.barrier)
