"""Add GRACE to DeepSpeed: ``initialize`` instead of ``deepspeed.initialize``, or ``attach`` for a loader of the job's own."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from grace_ds.config.load import ALIAS, HOME, block_of, load_config, read_ds_config, refuse_curriculum, refuse_over_stream
from grace_ds.data.dataset import IdDataset
from grace_ds.data.iterable import IterableBuffer, map_style
from grace_ds.data.order import order_of
from grace_ds.data.trusted import Tokenize
from grace_ds.errors import ConfigError
from grace_ds.gradients.probe import LossFn
from grace_ds.integrations import adoption, preemption, unchanged
from grace_ds.integrations.engine import config_of, engine_of, is_pipeline
from grace_ds.integrations.handle import Grace
from grace_ds.integrations.trusted_set import UserInputs
from grace_ds.monitor import progress

# DeepSpeed's own function, kept when :func:`replace_initialize` (``grace_ds.run``) replaces it.
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
    """Call ``deepspeed.initialize``, with GRACE if the config asks for it: same arguments, same four results.

    Without a grace block, or with ``enabled: false``, this is ``deepspeed.initialize`` and nothing else.  With one,
    the returned loader feeds the coreset's schedule (``mode: shadow``: the job's own batches), and ``engine.grace_ds``
    is the :class:`Grace` handle.

    Args:
        trusted_data: a map-style dataset of trusted samples, items like those of ``training_data``; instead of the
            config's ``trusted`` file.
        validation_data: the job's validation set, map-style; only read to make sure that no trusted sample is in it.
        tokenize: text → token ids, for a ``trusted`` file of text.
        loss_fn: (module, batch) → scalar mean loss, for the trusted probe; needed only if the module's output holds no
            loss, or if the job calls the module with more than entries of the batch, slices of them and constants.  Where ranks
            share a sequence it takes this rank's tokens of the batch, and returns this rank's part of the loss.

    Raises:
        ConfigError: the block is wrong, or it is enabled and no ``training_data`` is given.
        DataError: the training or the trusted data cannot be used.
    """
    import deepspeed

    original = _original or deepspeed.initialize
    bound = inspect.signature(original).bind(*args, **kwargs)
    config = config_of(bound.arguments)
    if config is None and _original is not None:
        unchanged.switched_on()  # the error says why nothing is trained
        raise ConfigError(
            "deepspeed.initialize got no config; give it after the script (--deepspeed_config ds.json), or pass config= in it"
        )
    path_and_block = block_of(read_ds_config(config)) if config is not None else None
    grace = load_config(path_and_block[1], path_and_block[0]) if path_and_block is not None else None
    if grace is None or not grace.enabled or _left_to_attach:
        result: tuple[Any, Any, Any, Any] = original(*args, **kwargs)
        preemption.from_environment(result[0])
        if not _left_to_attach:
            progress.report_off()
            unchanged.report_off(_why_off(config, path_and_block))
        return result
    unchanged.waits("it has ended before that")
    refuse_curriculum(read_ds_config(config))
    given = bound.arguments.get("training_data")
    if given is None and _original is not None:  # an unchanged script
        result = original(*args, **kwargs)
        adoption.await_loader(result[0], grace, UserInputs(trusted_data, validation_data, tokenize, loss_fn))
        preemption.from_environment(result[0])
        return result
    if given is None:
        raise ConfigError(
            "grace is on but deepspeed.initialize got no training_data; pass the dataset, or call deepspeed.initialize as "
            "before and grace_ds.attach(engine, dataset) for a loader of your own (a transformers.Trainer: "
            "grace_ds.huggingface.attach(trainer))"
        )
    data = map_style(given)
    IdDataset(data)  # reports what is wrong with the dataset before an engine is built
    if isinstance(data, IterableBuffer):
        refuse_over_stream(grace)
    bound.arguments["training_data"] = None
    if isinstance(bound.arguments.get("config"), dict):
        bound.arguments["config"] = copy.deepcopy(bound.arguments["config"])  # DeepSpeed writes into it
    engine, optimizer, _, scheduler = original(*bound.args, **bound.kwargs)
    user_inputs = UserInputs(trusted_data, validation_data, tokenize, loss_fn)
    handle = _handle_class(engine)(engine, data, grace, bound.arguments.get("collate_fn"), user_inputs)
    engine.training_data = given
    engine.training_dataloader = handle.feed()
    preemption.from_environment(engine)
    return engine, optimizer, engine.training_dataloader, scheduler


def replace_initialize(module: Any) -> None:
    """Replace ``deepspeed.initialize`` in the ``deepspeed`` module by :func:`initialize`, for unchanged scripts."""
    global _original
    if _original is None:
        _original = module.initialize
        module.initialize = initialize


def _why_off(config: Any, path_and_block: Any) -> str:
    if config is None:
        return "deepspeed.initialize got no config"
    if path_and_block is None:
        return f"the DeepSpeed config of this job holds no block {HOME} or {ALIAS}; add one, or use grace-ds run --grace FILE"
    return f"{path_and_block[0]} has enabled: false"


@contextlib.contextmanager
def left_to_attach() -> Iterator[None]:
    """Make :func:`initialize` leave the engine to :func:`attach` within the block: its caller has no dataset to pass."""
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
    sampler: Any = None,
) -> Grace:
    """Add GRACE to a job that builds its own loader; the engine comes from plain ``deepspeed.initialize``.

    Args:
        engine: a DeepSpeed engine, or the model that Lightning Fabric's ``setup`` returns.
        dataset: the job's training dataset, map-style or iterable.
        config: the grace block; default: the one in the engine's own config.
        collate_fn: the job's, default torch's.
        trusted_data, validation_data, tokenize, loss_fn: as for :func:`initialize`.
        sampler: the job's sampler without GRACE, a ``DistributedSampler`` or ``SequentialSampler`` (none of an iterable
            dataset).  Its order is used wherever nothing is chosen, and in shadow mode it feeds the job (any sampler works
            there).  Default: a ``DistributedSampler`` with seed 0, like the one that DeepSpeed makes.

    Returns:
        The handle; its ``loader(...)`` makes the data loader.

    Raises:
        ConfigError: this is no engine, GRACE is off or attached already, or the order of ``sampler`` is not a function of the
            position.
    """
    engine = engine_of(engine)
    if config is None:
        ds_config = read_ds_config(engine.config)
        path_and_block = block_of(ds_config)
        if path_and_block is None:
            raise ConfigError(f"the engine's config holds no block {HOME!r} or {ALIAS!r}; add one, or pass config={{...}}")
        grace = load_config(path_and_block[1], path_and_block[0])
        refuse_curriculum(ds_config)
    else:
        grace = load_config(config, "config")
    if not grace.enabled:
        raise ConfigError("grace is not enabled in this config; set enabled: true, or leave attach out and use your own loader")
    if getattr(engine, "grace_ds", None) is not None:
        raise ConfigError("GRACE is attached to this engine already; call engine.grace_ds.detach() first")
    adoption.release_all()
    dataset = map_style(dataset)
    IdDataset(dataset)  # reports what is wrong with the dataset before its length is asked for
    if isinstance(dataset, IterableBuffer):
        refuse_over_stream(grace)
        if sampler is not None:
            raise ConfigError(f"a {type(sampler).__name__} cannot draw from an iterable dataset; leave sampler out")
        order = None
    else:
        order = order_of(sampler, len(dataset), grace.seed)
    if sampler is not None and order is None and grace.mode == "train":
        raise ConfigError(
            f"the order of a {type(sampler).__name__} cannot be told from a position: give attach a DistributedSampler or a "
            "SequentialSampler, or leave sampler out for the order of a DistributedSampler with seed 0"
        )
    user_inputs = UserInputs(trusted_data, validation_data, tokenize, loss_fn, order)
    handle = _handle_class(engine)(engine, dataset, grace, collate_fn, user_inputs)
    handle.job_sampler = sampler
    return handle


def _handle_class(engine: Any) -> type[Grace]:
    if not is_pipeline(engine):
        return Grace
    from grace_ds.integrations.pipeline import PipelineGrace

    return PipelineGrace


__all__ = ["Grace", "attach", "initialize", "replace_initialize"]
