"""Attach a controller to one DeepSpeed engine (the handle ``engine.grace_ds``), and make the job's loaders over its schedule.

The engine is neither subclassed nor wrapped.  Some of its methods are replaced on the instance by ones that call the original
and then the controller, and two hooks watch the module; ``detach`` undoes all of it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler

from grace_ds.comm.time_limits import adopt_job_limit
from grace_ds.config.schema import GraceConfig
from grace_ds.data.dataset import IdCollate, IdDataset, IdLoader
from grace_ds.data.iterable import IterableBuffer, IterableSampler
from grace_ds.data.order import Order, SamplerOrder, shuffled
from grace_ds.data.sampler import Geometry, StreamSampler
from grace_ds.errors import ConfigError
from grace_ds.integrations import checkpoint, sample_weights, unchanged
from grace_ds.integrations.controller import Controller
from grace_ds.integrations.engine import dp_rank, geometry_of, is_compiled, outputs
from grace_ds.integrations.setup import build_controller
from grace_ds.integrations.trusted_set import UserInputs
from grace_ds.integrations.world import check_accelerate, check_world_size
from grace_ds.monitor import progress
from grace_ds.monitor.metrics import keep_config
from grace_ds.utils.methods import replace_method
from grace_ds.utils.rng import undisturbed_rng
from grace_ds.utils.screen import log_to_screen

log = logging.getLogger("grace_ds")

_STEPS_UNSEEN = 4  # micro-batches of so many steps may go by without one, as of a job that draws several for a step


class Grace:
    """The handle ``engine.grace_ds``: the controller of one engine.

    Attributes:
        controller: the state; the sampler reads ``controller.book``.
        job_shuffles: whether the engine's own sampler, which shadow mode keeps, shuffles.
        job_sampler: the job's sampler, for shadow mode; None: the engine's own.
        fed_by: what gives the engine its batches, for the log.
    """

    fed_by = "GRACE's loader"
    job_shuffles = True
    job_sampler: Any = None

    def __init__(
        self,
        engine: Any,
        dataset: Any,
        config: GraceConfig,
        collate_fn: Callable[[list[Any]], Any] | None,
        user_inputs: UserInputs,
    ) -> None:
        self.engine = engine
        self._restore: list[Callable[[], None]] = []
        self._in_step = False
        unchanged.switched_on()
        _log_to_screen()
        check_world_size(dist.get_world_size() if dist.is_initialized() else 1, os.environ)
        check_accelerate(dist.get_world_size() if dist.is_initialized() else 1)
        adopt_job_limit()
        self.dataset = IdDataset(dataset)
        self._job_collate = collate_fn or getattr(engine, "collate_fn", None)
        self.collate = IdCollate(self._job_collate)
        geometry = geometry_of(engine)
        if user_inputs.order is None and not isinstance(dataset, IterableBuffer):
            user_inputs = dataclasses.replace(user_inputs, order=self._engine_order(len(dataset), config.seed))
        with undisturbed_rng():  # reading the dataset must not change the job's random state
            self.controller: Controller = build_controller(engine, dataset, config, geometry, self.collate.collate, user_inputs)
            try:
                self._begin(geometry, len(dataset))
            except BaseException:
                self._take_off(collective=False)
                raise

    def _begin(self, geometry: Geometry, samples: int) -> None:
        config = self.controller.config
        if config.run_dir is not None and self.controller.comm.rank == 0:
            keep_config(config)
        if config.mode == "train":
            self.controller.sampler = self._stream_sampler(geometry, samples)
        self.attach_hooks()
        self.controller.start()
        self.engine.grace_ds = self
        log.info(
            "GRACE is on: recipe %s, mode %s, %d samples, fed by %s", self.config.recipe, self.config.mode, samples, self.fed_by
        )
        sample_weights.attached(self.controller)
        follower = progress.follow(self)
        if follower is not None:
            self._restore.append(follower.close)

    @property
    def config(self) -> GraceConfig:
        """The resolved config; if ``recipe: auto`` had to fall back, it names the recipe that is used instead."""
        return self.controller.config

    @property
    def metrics(self) -> dict[str, Any]:
        """Totals of the run on this rank; see :class:`~grace_ds.integrations.controller.Metrics`."""
        return self.controller.snapshot()

    def feed(self) -> Any:
        """Return the loader that ``initialize`` returns."""
        return self.deepspeed_loader()

    def deepspeed_loader(self, num_local_io_workers: int | None = None) -> IdLoader:
        """Return the engine's own kind of loader (``engine.deepspeed_io``) over the schedule; in shadow mode, the job's order."""
        sampler: Any = self.controller.sampler or self.job_sampler
        if sampler is None and (not self.job_shuffles or dp_rank(self.engine) != self.engine.global_rank):
            sampler = self._job_sampler()
        if self._streams:
            if num_local_io_workers:
                raise _one_reader(num_local_io_workers)
            num_local_io_workers = 0
        inner = self.engine.deepspeed_io(
            self.dataset, data_sampler=sampler, collate_fn=self.collate, num_local_io_workers=num_local_io_workers
        )
        return IdLoader(inner, self.controller.in_flight)

    def loader(self, **options: Any) -> IdLoader:
        """Return a torch ``DataLoader`` of micro-batches for a job that builds its own loader.

        Args:
            options: of ``torch.utils.data.DataLoader``, without dataset, sampler, batch_size and collate_fn.

        Raises:
            ConfigError: an option is one that GRACE or the engine decides.
        """
        for key in ("dataset", "batch_size", "sampler", "batch_sampler", "shuffle", "collate_fn"):
            if key in options:
                raise ConfigError(
                    f"loader({key}=...) is decided by GRACE and the engine; leave it out (sampler and collate_fn go to attach)"
                )
        if self._streams and options.get("num_workers"):
            raise _one_reader(options["num_workers"])
        stream: Any = self.controller.sampler or self.job_sampler or self._job_sampler()
        rows = self.engine.train_micro_batch_size_per_gpu()
        inner: Any = DataLoader(self.dataset, batch_size=rows, sampler=stream, collate_fn=self.collate, **options)
        return IdLoader(inner, self.controller.in_flight)

    def _job_sampler(self) -> DistributedSampler[Any]:
        geometry = self.controller.geometry
        return DistributedSampler(self.dataset, num_replicas=geometry.ranks, rank=geometry.rank, shuffle=self.job_shuffles)

    def _engine_order(self, n: int, seed: int) -> Order:
        """Return the order of the sampler that DeepSpeed makes when it is given none."""
        return shuffled(n, 0, seed) if self.job_shuffles else SamplerOrder(n, shuffle=False)

    @property
    def _streams(self) -> bool:
        """Whether the training data are iterable."""
        return isinstance(self.dataset.base, IterableBuffer)

    def _stream_sampler(self, geometry: Geometry, samples: int) -> StreamSampler:
        if self._streams:
            return IterableSampler(self.controller.book, geometry, self.engine.dataloader_drop_last())
        length = -(-samples // geometry.ranks)
        micro = length // geometry.rows if self.engine.dataloader_drop_last() else -(-length // geometry.rows)
        return StreamSampler(self.controller.book, geometry, micro, length)

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def attach_hooks(self) -> None:
        """Attach the controller to the engine; undone by :meth:`detach`."""
        module, controller = self.engine.module, self.controller
        pre = module.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        post = module.register_forward_hook(self._after_forward)
        self._watching = [pre.remove, post.remove]
        self._restore.append(self._unwatch)
        replacements: dict[str, Callable[..., Any]] = {
            "forward": self._forward,
            "backward": self._backward,
            "step": self._step,
            "save_checkpoint": functools.partial(checkpoint.save, controller, self.engine),
            "load_checkpoint": functools.partial(checkpoint.load, controller, self.engine),
            "destroy": self._destroy,
        }
        self._restore += [replace_method(self.engine, name, method) for name, method in replacements.items()]
        if hasattr(self.engine.optimizer, "step"):
            self._restore.append(replace_method(self.engine.optimizer, "step", self._optimizer_step))

    def detach(self) -> None:
        """Remove GRACE from the engine: restore its hooks and methods, close the transport.  A second call does nothing.

        Call it on every rank.  ``engine.destroy()`` does it too.
        """
        self._take_off(collective=True)

    def _take_off(self, collective: bool) -> None:
        while self._restore:
            self._restore.pop()()
        self.controller.close(collective)
        if getattr(self.engine, "grace_ds", None) is self:
            self.engine.grace_ds = None
        sample_weights.detached(self.controller)

    def _destroy(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            if not sys.is_finalizing():  # otherwise all of it ends with the process
                self._take_off(collective=not _in_finalizer())
        finally:
            original(*args, **kwargs)

    def _unwatch(self) -> None:
        while self._watching:
            self._watching.pop()()

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the forward, and the hooks around it if the module is compiled: traced, they would break its graph or never run.

        A step whose gradients are collected runs eagerly, with the same numbers, since only then the hooks on the layers fire.
        """
        module = self.engine.module
        if not is_compiled(module):
            return original(*args, **kwargs)
        self._unwatch()
        self._before_forward(module, args, kwargs)
        with torch.compiler.set_stance("force_eager") if self.controller.capturing else nullcontext():
            output = original(*args, **kwargs)
        self._after_forward(module, args, output)
        return output

    def _before_forward(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and module.training:
            self.controller.before_forward((args, kwargs))

    def _after_forward(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        current = self.controller.after_forward(output)
        if current is None:
            return
        watched = [tensor for tensor in outputs(output) if tensor.requires_grad]
        for tensor in watched:
            tensor.register_hook(lambda _: self.controller.on_backward(current))  # type: ignore[no-untyped-call]
        if not watched:
            self.controller.leave_unwatched(current)

    def _backward(self, original: Callable[..., Any], loss: Any, *args: Any, **kwargs: Any) -> Any:
        self.controller.observe_loss(loss)
        made, due = self.controller.micro_batches, self.controller.geometry.accumulation
        if made >= _STEPS_UNSEEN * due:
            raise ConfigError(
                f"{made} micro-batches have been through engine.backward without a step, where {due} make one: the job steps an "
                "optimizer that the engine does not know, or gradient_accumulation_steps is wrong, and GRACE cannot tell what "
                "was trained on; call engine.step(), or step the optimizer that initialize returns"
            )
        return original(loss, *args, **kwargs)

    def _optimizer_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Step the engine's optimizer; if the job does so itself, as Lightning Fabric does, it is a step of the run."""
        if self._in_step:
            return original(*args, **kwargs)
        engine, scale = self.engine, self._grad_scale()
        result = original(*args, **kwargs)
        engine.global_steps += 1  # engine.step was to count it: checkpoints carry it
        engine.global_samples += engine.train_batch_size()
        self.controller.follow(geometry_of(engine))
        self.controller.after_step(engine.global_steps, not getattr(engine.optimizer, "overflow", False), scale)
        return result

    def _step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        boundary = self.engine.is_gradient_accumulation_boundary()
        scale = self._grad_scale() if boundary else 1.0
        self._in_step = True
        try:
            result = original(*args, **kwargs)
        finally:
            self._in_step = False
        if boundary:
            self.controller.follow(geometry_of(self.engine))
            self.controller.after_step(self.engine.global_steps, self.engine.was_step_applied(), scale)
        return result

    def _grad_scale(self) -> float:
        """Return the factor that turns the step's gradients into those of its micro-batches' losses."""
        return self.controller.geometry.accumulation / float(self.engine._get_optimizer_loss_scale() or 1.0)


def _one_reader(workers: int) -> ConfigError:
    return ConfigError(
        f"{workers} data workers over an iterable dataset: the window's samples are in this process alone, so its loader takes "
        "none; leave workers out, and to read in the background pass DataLoader(dataset, batch_size=None, num_workers=1) as the "
        "training data"
    )


def _in_finalizer() -> bool:
    """Return whether an object is being deleted: the engine then calls its ``destroy``, on each rank at another time."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame.f_code.co_name == "__del__"


def _log_to_screen() -> None:
    """Log to the screen on rank 0, in the form of DeepSpeed's lines."""
    from deepspeed.utils import logger as deepspeed_logger

    handlers = deepspeed_logger.handlers
    log_to_screen(dist.get_rank() if dist.is_initialized() else 0, handlers[0].formatter if handlers else None)
