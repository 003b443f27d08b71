"""Read facts from a DeepSpeed engine, from its config argument, and from its module's output."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from grace_ds.data.sampler import Geometry
from grace_ds.errors import ConfigError


def engine_of(given: Any) -> Any:
    """Return the DeepSpeed engine that a job passes, bare or in the wrapper of Lightning Fabric.

    Raises:
        ConfigError: it is something else; with its type and what to pass instead.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine

    inner = getattr(given, "_forward_module", given)
    if isinstance(inner, DeepSpeedEngine):
        return inner
    kind = f"{type(given).__module__}.{type(given).__qualname__}"
    if isinstance(inner, torch.nn.parallel.DistributedDataParallel):
        cure = "the job runs torch's DDP: use a DeepSpeed config (accelerate: Accelerator(deepspeed_plugin=DeepSpeedPlugin(...)))"
    elif hasattr(given, "get_train_dataloader"):
        cure = "a transformers.Trainer is attached to by grace_ds.huggingface.attach(trainer)"
    elif hasattr(given, "deepspeed_plugin") or hasattr(given, "prepare"):
        cure = "pass the model that accelerator.prepare returns"
    else:
        cure = "pass what deepspeed.initialize, accelerator.prepare or fabric.setup returns for the model"
    raise ConfigError(f"attach got a {kind}, and GRACE is tied to a DeepSpeed engine; {cure}")


def geometry_of(engine: Any) -> Geometry:
    """Return how the engine's batches map to positions.

    Raises:
        ConfigError: the batch does not divide into micro-batches of the data-parallel ranks, or two kinds of parallelism share
            their ranks.
    """
    tensor, sequence = engine.autotp_size(), engine.sequence_parallel_size
    if tensor > 1 and sequence > 1:
        raise ConfigError(
            f"tensor_parallel.autotp_size = {tensor} and {sequence} sequence-parallel ranks: DeepSpeed lays both over the same "
            "ranks, which then add up outputs of different tokens; use one of the two"
        )
    ranks, rows, accumulation = (
        engine.dp_world_size,
        engine.train_micro_batch_size_per_gpu(),
        engine.gradient_accumulation_steps(),
    )
    batch = ranks * rows * accumulation
    # AutoTP reads the batch before it makes its groups, and counts tensor-parallel ranks as if each had samples of its own.
    if engine.train_batch_size() not in (batch, batch * max(1, tensor)):
        raise ConfigError(
            f"train_batch_size = {engine.train_batch_size()} is not ranks × micro-batch × accumulation = "
            f"{ranks} × {rows} × {accumulation}; positions of samples would not be defined: make them agree"
        )
    return Geometry(ranks, dp_rank(engine), rows, accumulation)


def dp_rank(engine: Any) -> int:
    """Return this process's rank among the engine's data-parallel ranks."""
    import torch.distributed as dist

    return dist.get_rank(engine.data_parallel_group) if dist.is_initialized() else 0


def is_pipeline(engine: Any) -> bool:
    """Return whether the engine is a PipelineEngine, which pulls its data itself."""
    from deepspeed.runtime.pipe.engine import PipelineEngine

    return isinstance(engine, PipelineEngine)


def is_compiled(module: torch.nn.Module) -> bool:
    """Return whether the module is compiled: by ``torch.compile(module)``, ``module.compile()`` or ``engine.compile()``."""
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")


def shares_model(engine: Any) -> bool:
    """Return whether several ranks work on the same samples: tensor, sequence or pipeline parallelism."""
    import torch.distributed as dist

    return bool(dist.is_initialized() and dist.get_world_size() > engine.dp_world_size)


def config_of(arguments: dict[str, Any]) -> Any:
    """Return the DeepSpeed config from where ``deepspeed.initialize`` looks for it; None if there is none."""
    for key in ("config", "config_params"):
        if arguments.get(key) is not None:
            return arguments[key]
    args = arguments.get("args")
    return getattr(args, "deepspeed_config", None) or getattr(args, "deepscale_config", None)


def outputs(tree: Any, depth: int = 4) -> Sequence[torch.Tensor]:
    """Return every tensor in a module's output: in mappings, sequences, dataclasses and plain objects, to ``depth`` levels."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if depth == 0 or isinstance(tree, (torch.nn.Module, type, str)):
        return []
    if isinstance(tree, Mapping):
        values = list(tree.values())
    elif isinstance(tree, (list, tuple)):
        values = list(tree)
    elif dataclasses.is_dataclass(tree):
        values = [getattr(tree, field.name, None) for field in dataclasses.fields(tree)]
    else:
        values = list(getattr(tree, "__dict__", {}).values())
    return [tensor for value in values for tensor in outputs(value, depth - 1)]
