"""Refuse Trainer settings that a coreset cannot satisfy, before training, with the value and the cure."""

from __future__ import annotations

from typing import Any

from torch.utils.data import IterableDataset

from grace_ds.config.schema import GraceConfig
from grace_ds.errors import ConfigError, DataError


def refuse_without_deepspeed(trainer: Any) -> None:
    """Refuse a Trainer without DeepSpeed, because GRACE needs its engine.

    Raises:
        ConfigError: the Trainer will not make a DeepSpeed engine.
    """
    if not getattr(trainer, "is_deepspeed_enabled", False):
        raise ConfigError(
            "this Trainer uses no DeepSpeed, and GRACE is tied to its engine: pass TrainingArguments(deepspeed=CONFIG) with the "
            "grace block in CONFIG, or leave grace_ds.huggingface.attach out"
        )


def refuse_data(trainer: Any) -> None:
    """Refuse a training set without ids, because a coreset is drawn by id.

    Raises:
        ConfigError: there is no training set.
        DataError: it has no ids.
    """
    data = trainer.train_dataset
    if data is None:
        raise ConfigError("the Trainer has no train_dataset to choose from; pass one, or leave grace_ds.huggingface.attach out")
    streamed = isinstance(data, IterableDataset) or type(data).__name__ == "IterableDataset"  # torch's and datasets' own
    if streamed or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise DataError(
            f"train_dataset is a {type(data).__module__}.{type(data).__qualname__}, which cannot be read by index; a coreset is "
            "drawn by id: use a map-style dataset (load_dataset without streaming=True), or set enabled: false"
        )


def refuse_settings(trainer: Any, config: GraceConfig) -> None:
    """Refuse settings under which the batches would not be the units in which positions are counted.

    Raises:
        ConfigError: a setting is of this kind; with its name, its value and the cure.
    """
    args = trainer.args
    accelerate = args.accelerator_config
    settings = [
        ("auto_find_batch_size", args.auto_find_batch_size, "the batch would change under the schedule: set it to False"),
        (
            "accelerator_config.dispatch_batches",
            accelerate.dispatch_batches,
            "one rank would read the samples of all: leave it unset",
        ),
        (
            "accelerator_config.split_batches",
            accelerate.split_batches and args.world_size > 1,
            "a rank's batch would not be per_device_train_batch_size: set it to False",
        ),
        ("group_by_length", getattr(args, "group_by_length", False), _OWN_ORDER),
    ]
    strategy = getattr(args, "train_sampling_strategy", "random")
    strategy = getattr(strategy, "value", strategy)
    fixed = ("random",) if config.mode == "train" else ("random", "sequential")
    settings.append(("train_sampling_strategy", strategy if strategy not in fixed else False, _OWN_ORDER))
    for name in ("tp", "cp", "sp"):
        size = getattr(trainer, f"get_{name}_size", lambda: 1)()
        settings.append(
            (f"{name}_size", size if size > 1 else False, "ranks that share samples were not tried here: set it to 1")
        )
    for name, value, cure in settings:
        if value:
            raise ConfigError(f"TrainingArguments: {name} = {value!r} cannot be had with GRACE: {cure}")


_OWN_ORDER = "it is another order of the samples, and the schedule decides that: leave it at random, or set enabled: false"
