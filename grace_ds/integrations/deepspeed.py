"""DeepSpeed's engine and GRACE: ``initialize`` in the place of ``deepspeed.initialize``, ``attach`` for own loaders.

Nothing of the engine is subclassed or wrapped as an object: five of its methods are replaced on the instance by ones that
call the original and then the controller, and two hooks watch the module; ``detach`` takes all of it off again.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler

from grace_ds import preempt
from grace_ds.comm.limits import adopt_job_limit
from grace_ds.config.load import ALIAS, HOME, find_block, load_config, read_ds_config, refuse_curriculum
from grace_ds.config.schema import GraceConfig
from grace_ds.errors import ConfigError
from grace_ds.integrations import checkpoint, progress, weights
from grace_ds.integrations.build import build_controller
from grace_ds.integrations.controller import Controller
from grace_ds.integrations.engine import config_of, dp_rank, geometry_of, is_pipeline, outputs
from grace_ds.integrations.record import keep_config
from grace_ds.integrations.trusted_set import Extras
from grace_ds.integrations.world import refuse_lonely
from grace_ds.methods import replace_method
from grace_ds.sampler import Geometry, StreamSampler, TicketedCollate, TicketedDataset, TicketedLoader
from grace_ds.sketch.probe import LossFn
from grace_ds.trusted import Tokenize

log = logging.getLogger("grace_ds")

# Kept before anybody (``grace_ds.run``) puts our function in the place of DeepSpeed's.
_original: Callable[..., Any] | None = None
_left_to_attach = False


def initialize(
    *args: Any,
    trusted_data: Any = None,
    validation_data: Any = None,
    tokenize: Tokenize | None = None,
    loss_fn: LossFn | None = None,
    **kwargs: Any,
) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize`` with GRACE where the config asks for it: same arguments, same four results.

    Without a grace block, or with ``enabled: false``, this is ``deepspeed.initialize`` and nothing else.  With one,
    the returned loader feeds the coreset's schedule (``mode: shadow``: the job's own batches), and ``engine.grace_ds``
    is the :class:`Grace` handle.

    Args:
        trusted_data: a map-style dataset of trusted samples, items like those of ``training_data``; in the place of
            the config's ``trusted`` file.
        validation_data: the job's validation set, map-style; only read to make sure that no trusted sample is in it.
        tokenize: text → token ids, for a ``trusted`` file of text.
        loss_fn: (module, batch) → scalar mean loss, for the trusted probe; needed only where the module's output
            holds no loss.

    Raises:
        ConfigError: the block is wrong, or it is on and no ``training_data`` is given.
        DataError: the training or the trusted data cannot be used.
    """
    import deepspeed

    original = _original or deepspeed.initialize
    bound = inspect.signature(original).bind(*args, **kwargs)
    config = config_of(bound.arguments)
    found = find_block(read_ds_config(config)) if config is not None else None
    grace = load_config(found[1], found[0]) if found is not None else None
    if grace is None or not grace.enabled or _left_to_attach:
        result: tuple[Any, Any, Any, Any] = original(*args, **kwargs)
        preempt.from_environment(result[0])
        progress.say_off()
        return result
    refuse_curriculum(read_ds_config(config))
    data = bound.arguments.get("training_data")
    if data is None:
        raise ConfigError(
            "grace is on but deepspeed.initialize got no training_data; pass the dataset, or call deepspeed.initialize as "
            "before and grace_ds.attach(engine, dataset) for a loader of your own (a transformers.Trainer: "
            "grace_ds.huggingface.attach(trainer))"
        )
    TicketedDataset(data)  # says what is wrong with the dataset before an engine is built
    bound.arguments["training_data"] = None
    if isinstance(bound.arguments.get("config"), dict):
        bound.arguments["config"] = copy.deepcopy(bound.arguments["config"])  # DeepSpeed writes into it
    engine, optimizer, _, scheduler = original(*bound.args, **bound.kwargs)
    extras = Extras(trusted_data, validation_data, tokenize, loss_fn)
    handle = _handle_class(engine)(engine, data, grace, bound.arguments.get("collate_fn"), extras)
    engine.training_data = data
    engine.training_dataloader = handle.feed()
    preempt.from_environment(engine)
    return engine, optimizer, engine.training_dataloader, scheduler


def replace_initialize(module: Any) -> None:
    """Puts :func:`initialize` in the place of ``deepspeed.initialize`` in the ``deepspeed`` module, for unchanged scripts."""
    global _original
    if _original is None:
        _original = module.initialize
        module.initialize = initialize


@contextlib.contextmanager
def left_to_attach() -> Iterator[None]:
    """Within it :func:`initialize` leaves the engine to :func:`attach`: somebody makes it who has no dataset to give."""
    global _left_to_attach
    before, _left_to_attach = _left_to_attach, True
    try:
        yield
    finally:
        _left_to_attach = before


def attach(
    engine: Any,
    dataset: Any,
    config: dict[str, Any] | None = None,
    *,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    trusted_data: Any = None,
    validation_data: Any = None,
    tokenize: Tokenize | None = None,
    loss_fn: LossFn | None = None,
) -> Grace:
    """GRACE for a job that builds its own loader; the engine comes from plain ``deepspeed.initialize``.

    Args:
        engine: a DeepSpeed engine.
        dataset: the job's map-style training dataset.
        config: the grace block; default: the one in the engine's own config.
        collate_fn: the job's, default torch's.
        trusted_data, validation_data, tokenize, loss_fn: as for :func:`initialize`.

    Returns:
        The handle; its ``loader(...)`` makes the data loader.
    """
    if config is None:
        ds_config = read_ds_config(engine.config)
        found = find_block(ds_config)
        if found is None:
            raise ConfigError(f"the engine's config holds no block {HOME!r} or {ALIAS!r}; add one, or pass config={{...}}")
        grace = load_config(found[1], found[0])
        refuse_curriculum(ds_config)
    else:
        grace = load_config(config, "config")
    if not grace.enabled:
        raise ConfigError("grace is not enabled in this config; set enabled: true, or leave attach out and use your own loader")
    if getattr(engine, "grace_ds", None) is not None:
        raise ConfigError("GRACE is attached to this engine already; call engine.grace_ds.detach() first")
    return _handle_class(engine)(engine, dataset, grace, collate_fn, Extras(trusted_data, validation_data, tokenize, loss_fn))


def _handle_class(engine: Any) -> type[Grace]:
    if not is_pipeline(engine):
        return Grace
    from grace_ds.integrations.pipeline import PipelineGrace

    return PipelineGrace


class Grace:
    """The handle ``engine.grace_ds``: the controller tied to one engine.

    Attributes:
        controller: the state; ``controller.book`` is what the sampler reads.
        config: as resolved.
        job_shuffles: whether the engine's own sampler, which shadow mode leaves in force, shuffles.
    """

    job_shuffles = True

    def __init__(
        self,
        engine: Any,
        dataset: Any,
        config: GraceConfig,
        collate_fn: Callable[[list[Any]], Any] | None,
        extras: Extras,
    ) -> None:
        self.engine, self.config = engine, config
        _speak_up()
        refuse_lonely(dist.get_world_size() if dist.is_initialized() else 1, os.environ)
        adopt_job_limit()
        self.dataset = TicketedDataset(dataset)
        self._job_collate = collate_fn or getattr(engine, "collate_fn", None)
        self.collate = TicketedCollate(self._job_collate)
        geometry = geometry_of(engine)
        self.controller: Controller = build_controller(engine, dataset, config, geometry, self.collate.collate, extras)
        if config.run_dir is not None and self.controller.comm.rank == 0:
            keep_config(config)
        if config.mode == "train":
            self.controller.sampler = self._stream_sampler(geometry, len(dataset))
        self._restore: list[Callable[[], None]] = []
        self.attach_hooks()
        self.controller.start()
        engine.grace_ds = self
        weights.attached(self.controller)
        progress.follow(self)

    @property
    def metrics(self) -> dict[str, Any]:
        """Totals of the run on this rank; see :class:`~grace_ds.integrations.controller.Metrics`."""
        return self.controller.snapshot()

    def feed(self) -> Any:
        """The loader that ``initialize`` returns."""
        return self.deepspeed_loader()

    def deepspeed_loader(self, num_local_io_workers: int | None = None) -> TicketedLoader:
        """The engine's own kind of loader (``engine.deepspeed_io``) over the schedule, or the job's order in shadow mode."""
        sampler: Any = self.controller.sampler
        if sampler is None and (not self.job_shuffles or dp_rank(self.engine) != self.engine.global_rank):
            sampler = self._job_sampler()
        inner = self.engine.deepspeed_io(
            self.dataset, data_sampler=sampler, collate_fn=self.collate, num_local_io_workers=num_local_io_workers
        )
        return TicketedLoader(inner, self.controller.outstanding)

    def loader(self, sampler: Any = None, **options: Any) -> TicketedLoader:
        """A torch ``DataLoader`` of micro-batches for a job that builds its own.

        Args:
            sampler: the job's sampler; used in shadow mode only.
            options: of ``torch.utils.data.DataLoader``, without dataset, sampler, batch_size and collate_fn.
        """
        for key in ("dataset", "batch_size", "batch_sampler", "shuffle", "collate_fn"):
            if key in options:
                raise ConfigError(
                    f"loader({key}=...) is decided by GRACE and the engine; leave it out (collate_fn goes to attach)"
                )
        stream: Any = self.controller.sampler or sampler or self._job_sampler()
        rows = self.engine.train_micro_batch_size_per_gpu()
        inner: Any = DataLoader(self.dataset, batch_size=rows, sampler=stream, collate_fn=self.collate, **options)
        return TicketedLoader(inner, self.controller.outstanding)

    def _job_sampler(self) -> DistributedSampler[Any]:
        g = self.controller.geometry
        return DistributedSampler(self.dataset, num_replicas=g.ranks, rank=g.rank, shuffle=self.job_shuffles)

    def _stream_sampler(self, g: Geometry, samples: int) -> StreamSampler:
        length = -(-samples // g.ranks)
        micro = length // g.rows if self.engine.dataloader_drop_last() else -(-length // g.rows)
        return StreamSampler(self.controller.book, g, micro, length)

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def attach_hooks(self) -> None:
        """Ties the controller to the engine; undone by :meth:`detach`."""
        module, controller = self.engine.module, self.controller
        pre = module.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        post = module.register_forward_hook(self._after_forward)
        self._restore += [pre.remove, post.remove]
        ours: dict[str, Callable[..., Any]] = {
            "backward": self._backward,
            "step": self._step,
            "save_checkpoint": functools.partial(checkpoint.save, controller, self.engine),
            "load_checkpoint": functools.partial(checkpoint.load, controller, self.engine),
        }
        self._restore += [replace_method(self.engine, name, method) for name, method in ours.items()]

    def detach(self) -> None:
        """Takes GRACE off the engine: hooks and methods are as before, the transport is closed.  A second call does nothing."""
        while self._restore:
            self._restore.pop()()
        self.controller.close()
        if getattr(self.engine, "grace_ds", None) is self:
            self.engine.grace_ds = None
        weights.detached(self.controller)

    def _before_forward(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and module.training:
            self.controller.before_forward((args, kwargs))

    def _after_forward(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        current = self.controller.after_forward(output)
        if current is None:
            return
        for tensor in outputs(output):
            if tensor.requires_grad:
                tensor.register_hook(lambda _: self.controller.on_backward(current))  # type: ignore[no-untyped-call]

    def _backward(self, original: Callable[..., Any], loss: Any, *args: Any, **kwargs: Any) -> Any:
        self.controller.observe_loss(loss)
        return original(loss, *args, **kwargs)

    def _step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        boundary = self.engine.is_gradient_accumulation_boundary()
        scale = self._grad_scale() if boundary else 1.0
        result = original(*args, **kwargs)
        if boundary:
            self.controller.after_step(self.engine.global_steps, self.engine.was_step_applied(), scale)
        return result

    def _grad_scale(self) -> float:
        """What the step's gradients are to be multiplied with to be those of its micro-batches' losses."""
        return self.controller.geometry.accumulation / float(self.engine._get_optimizer_loss_scale() or 1.0)


def _speak_up() -> None:
    """Where the job has set up no logging, rank 0 says on the screen what GRACE chose, in the form of DeepSpeed's lines."""
    from deepspeed.utils import logger as theirs

    if log.hasHandlers():
        return
    handler = logging.StreamHandler(sys.stdout)
    if theirs.handlers:
        handler.setFormatter(theirs.handlers[0].formatter)
    log.addHandler(handler)
    log.setLevel(logging.WARNING if dist.is_initialized() and dist.get_rank() else logging.INFO)


__all__ = ["Grace", "attach", "geometry_of", "initialize", "replace_initialize"]
