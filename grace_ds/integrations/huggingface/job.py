"""Attach GRACE to one Trainer: find its engine, and follow its training steps.

Three methods are replaced on instances.  The loader of ``trainer.get_train_dataloader`` gets ids.  ``accelerator.prepare``
makes the engine; GRACE is attached right after it, before the Trainer loads a checkpoint.  ``trainer.training_step`` shows
which batch is really trained on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import ConcatDataset

from grace_ds.config.load import block_of, load_config, read_ds_config, refuse_curriculum
from grace_ds.config.schema import GraceConfig
from grace_ds.data.order import order_of
from grace_ds.data.sampler import Geometry, StreamSampler
from grace_ds.errors import ConfigError, GraceError
from grace_ds.integrations import adoption, unchanged
from grace_ds.integrations.deepspeed import left_to_attach
from grace_ds.integrations.handle import Grace
from grace_ds.integrations.huggingface.loader import ScheduleBatches, rebuilt, take_ids
from grace_ds.integrations.huggingface.refusals import refuse_data, refuse_settings, refuse_without_deepspeed
from grace_ds.integrations.trusted_set import UserInputs
from grace_ds.utils.methods import replace_method


def attach(trainer: Any, user_inputs: UserInputs) -> TrainerJob | None:
    """Attach GRACE to a Trainer that has not trained yet; return None if its config has no grace block, or a disabled one.

    Raises:
        ConfigError: the block is wrong, or the Trainer cannot train on a coreset.
        DataError: the training set cannot be read by index.
    """
    refuse_without_deepspeed(trainer)
    ds_config = read_ds_config(trainer.accelerator.state.deepspeed_plugin.deepspeed_config)
    path_and_block = block_of(ds_config)
    config = load_config(path_and_block[1], path_and_block[0]) if path_and_block is not None else None
    if config is None or not config.enabled:
        return None
    refuse_curriculum(ds_config)
    refuse_data(trainer)
    refuse_settings(trainer, config)
    if getattr(trainer, "grace_ds", None) is not None:
        raise ConfigError("GRACE is attached to this Trainer already; call grace_ds.huggingface.attach once")
    adoption.release_all()
    return TrainerJob(trainer, config, user_inputs)


def attach_by_itself(trainer: Any) -> None:
    """Attach GRACE to the Trainer of an unchanged script, at the start of its ``train()``; say why if that leaves it off.

    Raises:
        ConfigError, DataError: as :func:`attach`.
    """
    if getattr(trainer, "grace_ds", None) is not None:
        return
    if not getattr(trainer, "is_deepspeed_enabled", False):
        unchanged.report_off(
            "its Trainer uses no DeepSpeed; give it a config with TrainingArguments(deepspeed=CONFIG), or --deepspeed"
        )
    elif attach(trainer, UserInputs()) is None:
        unchanged.report_off("the DeepSpeed config of its Trainer holds no grace block, or one with enabled: false")


class TrainerJob:
    """The state of GRACE for one Trainer, over all of its ``train()`` calls.

    Attributes:
        handle: of the engine in training; None before there is one.
    """

    def __init__(self, trainer: Any, config: GraceConfig, user_inputs: UserInputs) -> None:
        self.trainer, self.config, self.user_inputs = trainer, config, user_inputs
        self.handle: TrainerGrace | None = None
        self._loader: Any = None  # made before the engine that it is for
        replace_method(trainer, "get_train_dataloader", self._get_train_dataloader)
        replace_method(trainer, "training_step", self._training_step)
        replace_method(trainer.accelerator, "prepare", self._prepare)
        trainer.grace_ds = self

    def _get_train_dataloader(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._loader = rebuilt(original(*args, **kwargs))
        return self._loader

    def _prepare(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with left_to_attach():
            result = original(*args, **kwargs)
        engine = _engine_in(result)
        # Under ZeRO-3 ``evaluate`` makes another engine, which is not for training.
        if engine is not None and self._loader is not None and self.trainer.is_in_train:
            loader, self._loader = self._loader, None
            if self.handle is not None:
                self.handle.detach()
            self.handle = TrainerGrace(self.trainer, engine, loader, self.config, self._completed_inputs(loader))
        return result

    def _training_step(self, original: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.handle is None:
            raise GraceError(
                "the Trainer trains on an engine that GRACE has not seen; call grace_ds.huggingface.attach on this very Trainer "
                "before train(), and not with hyperparameter_search, which makes another accelerator"
            )
        self.handle.begin(inputs, args[0] if args else kwargs.get("num_items_in_batch"))
        return original(model, inputs, *args, **kwargs)

    def _completed_inputs(self, loader: Any) -> UserInputs:
        """Return the user's inputs, completed by what the Trainer knows."""
        trainer, inputs = self.trainer, self.user_inputs
        validation = inputs.validation_data
        if validation is None and (inputs.trusted_data is not None or self.config.trusted is not None):
            validation = _joined(trainer.eval_dataset)
        return dataclasses.replace(
            inputs,
            trusted_data=self._like_the_pool(inputs.trusted_data),
            validation_data=validation,
            loss_fn=inputs.loss_fn or self._mean_loss,
            order=order_of(loader.batch_sampler.shuffler, len(loader.dataset.base), self.config.seed),
        )

    def _like_the_pool(self, data: Any) -> Any:
        """Return a trusted set of the ``datasets`` library without the columns that the Trainer removes from its training set."""
        if data is None or not hasattr(data, "column_names"):
            return data
        return self.trainer._remove_unused_columns(data, description="trusted")

    def _mean_loss(self, module: torch.nn.Module, batch: Any) -> torch.Tensor:
        """Return the Trainer's own loss as the mean over the batch's tokens: without the accumulated batch's token count."""
        loss: torch.Tensor = self.trainer.compute_loss(module, self.trainer._prepare_inputs(batch))
        return loss


class TrainerGrace(Grace):
    """The handle ``engine.grace_ds`` of a Trainer's engine."""

    fed_by = "the Trainer's own loader"

    def __init__(self, trainer: Any, engine: Any, loader: Any, config: GraceConfig, user_inputs: UserInputs) -> None:
        self.trainer = trainer
        self.batches: ScheduleBatches = loader.batch_sampler
        self._items: Any = None  # tokens that the step's losses are divided by; None: each micro-batch by its own number
        self._first = True
        super().__init__(engine, loader.dataset.base, config, loader.collate_fn._collate_ids.collate, user_inputs)
        stream = self.controller.sampler
        self.batches.stream = stream if isinstance(stream, StreamSampler) else None

    def feed(self) -> Any:
        """Raise an error: the Trainer has its own loader.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("a Trainer feeds its own engine; call trainer.train()")

    def _stream_sampler(self, geometry: Geometry, samples: int) -> StreamSampler:
        rows = getattr(self.batches, "batch_size", geometry.rows)
        if rows != geometry.rows:
            raise ConfigError(
                f"the Trainer's loader gives {rows} samples a rank, the DeepSpeed config says train_micro_batch_size_per_gpu = "
                f'{geometry.rows}; set that to "auto", and leave get_train_dataloader as it is'
            )
        return StreamSampler(self.controller.book, geometry, len(self.batches), samples)

    def attach_hooks(self) -> None:
        """Attach the hooks of every engine; loading a checkpoint also finds how many micro-batches the Trainer will skip."""
        super().attach_hooks()
        self._restore.append(replace_method(self.engine, "load_checkpoint", self._load))

    def _load(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        trainer, accumulation = self.trainer, self.trainer.args.gradient_accumulation_steps
        updates = max(math.ceil(len(self.batches) / accumulation), 1)  # of an epoch, as the Trainer counts them
        skips = not trainer.args.ignore_data_skip
        self.batches.skipped = trainer.state.global_step % updates * accumulation if skips else 0
        self._first = True
        return result

    # -- the micro-batch -----------------------------------------------------------------------------------------------

    def begin(self, inputs: Any, items: Any) -> None:
        """Start a training step: take the ids out of its batch, and record the batch as in flight.

        Args:
            inputs: the Trainer's batch.
            items: tokens that the losses of the step's micro-batches are divided by, of all ranks or of this one; None:
                each loss is a mean.

        Raises:
            GraceError: the batch is not the schedule's, or the Trainer has skipped samples of it.
        """
        taken, stream = take_ids(inputs), self.controller.sampler
        if stream is not None and (taken is None or int(taken[0]) < 0):
            raise GraceError(
                "a training batch does not come from the schedule: it was made by hand, or train() was called a second time on "
                "the same engine; leave the Trainer's loader and batches as they are, and make a new Trainer to train again"
            )
        if taken is None:  # shadow mode, and a batch that the job has made itself
            return
        positions, ids = taken
        self._items = items
        micro = int(positions[0]) // self.controller.geometry.micro
        if self._first and stream is not None and micro != stream.frontier:
            raise GraceError(
                f"the first batch is micro-batch {micro} of the schedule and training stands at {stream.frontier}: the Trainer "
                "has skipped samples that were never trained on; set ignore_data_skip=True"
            )
        self._first = False
        self.controller.in_flight.issue(positions, ids, inputs)

    def _grad_scale(self) -> float:
        """Return the scale of the step's gradients under the Trainer, which divides its losses itself.

        It divides them by all tokens of the accumulated batch, or by the number of its micro-batches.
        """
        trainer, collector = self.trainer, self.controller.collector
        if collector is None:
            return 1.0
        divided = self._items is not None and (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None)
        collector.config = dataclasses.replace(self.config.collect, reduction="sum" if divided else self.config.collect.reduction)
        scale = float(self._items) if divided else float(trainer.current_gradient_accumulation_steps)
        if divided and trainer.args.average_tokens_across_devices:
            scale /= trainer.accelerator.num_processes
        return scale / float(self.engine._get_optimizer_loss_scale() or 1.0)


def _engine_in(result: Any) -> Any:
    """Return the DeepSpeed engine among the results of ``accelerator.prepare``; None if there is none."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    parts = result if isinstance(result, tuple | list) else (result,)
    return next((part for part in parts if isinstance(part, DeepSpeedEngine)), None)


def _joined(data: Any) -> Any:
    """Return a Trainer's evaluation set as one map-style dataset; None if it has none that can be read by index."""
    parts = list(data.values()) if isinstance(data, dict) else [data]
    if any(not (hasattr(part, "__len__") and hasattr(part, "__getitem__")) for part in parts):
        return None
    return parts[0] if len(parts) == 1 else ConcatDataset(parts)
