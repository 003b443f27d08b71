"""Describe Megatron's tensor-parallel layers, and choose layers over all stages of a pipeline.

A rank sees this part of one layer (activations are (tokens, samples, features)):

    =====================  ============================  ==========================================
    layer                  input                         gradient of the output
    =====================  ============================  ==========================================
    column-parallel        all features, all tokens      its block of the outputs, all tokens
    … sequence parallel    all features, its tokens      its block of the outputs, all tokens
    row-parallel           its block of the inputs       all outputs (sequence parallel: inside of
                                                         ``_forward_impl`` only)
    =====================  ============================  ==========================================

So every rank's products are a part of one sum.  A fused projection (QKV, a gated MLP) is taken as Megatron stores it, block
after block.  At another tensor-parallel size its rows are in another order, and the sketches cannot be compared.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from grace_ds.errors import ConfigError
from grace_ds.gradients.layers import Hook, Layer, LayerRule, canonical_name, layer_of, register_rule, rule_for
from grace_ds.gradients.sharding import Split
from grace_ds.utils.methods import replace_method

log = logging.getLogger("grace_ds")

_TRANSFORMER_ENGINE = ("transformer_engine.", "megatron.core.extensions.transformer_engine")
Share = Callable[[Any], list[Any]]  # value of this rank → values of all ranks that hold one model together


class _ParallelRule(LayerRule):
    """Rule for both kinds of layers: hook ``_forward_impl`` if there is one, where nothing is gathered or scattered yet."""

    def features(self, module: nn.Module) -> tuple[int, int]:
        """Return (inputs, outputs) of the whole layer."""
        return int(module.input_size), int(module.output_size)  # type: ignore[arg-type]

    def watch(self, module: nn.Module, hook: Hook) -> Callable[[], None]:
        """Call ``hook(module, (input,), output)`` at every call of ``_forward_impl``, or of the module if it has none."""
        if not callable(getattr(module, "_forward_impl", None)):
            if getattr(module, "sequence_parallel", False) or self._converts(module):
                raise ConfigError(
                    f"{type(module).__name__} has no _forward_impl, and what enters and leaves it is not what its weight meets "
                    "(sequence parallel, gathered output or scattered input); exclude it, or use megatron-core 0.16"
                )
            return super().watch(module, hook)

        def impl(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            hook(module, (kwargs["input"] if "input" in kwargs else args[0],), output)
            return output

        return replace_method(module, "_forward_impl", impl)

    def _converts(self, module: nn.Module) -> bool:
        raise NotImplementedError


@register_rule("megatron.core.tensor_parallel.layers.ColumnParallelLinear")
class ColumnRule(_ParallelRule):
    """``Y = X A``, the outputs in blocks."""

    def split(self, module: nn.Module) -> Split:
        """Return this rank's block of the outputs; with sequence parallelism its tokens must be gathered."""
        layer: Any = module
        size = layer.output_size // layer.output_size_per_partition
        scattered = size > 1 and bool(getattr(layer, "sequence_parallel", False))
        return Split("out", *_place(layer, size), scattered=scattered, time_major=True)

    def _converts(self, module: nn.Module) -> bool:
        return bool(getattr(module, "gather_output", False))


@register_rule("megatron.core.tensor_parallel.layers.RowParallelLinear")
class RowRule(_ParallelRule):
    """``Y = Σ X_r A_r``, the inputs in blocks."""

    def split(self, module: nn.Module) -> Split:
        """Return this rank's block of the inputs."""
        layer: Any = module
        size = layer.input_size // layer.input_size_per_partition
        return Split("in", *_place(layer, size), time_major=True)

    def _converts(self, module: nn.Module) -> bool:
        return not getattr(module, "input_is_parallel", True)


def _place(layer: Any, size: int) -> tuple[int, int, Any]:
    """Return (rank, size, group) of the tensor-parallel ranks that hold ``layer`` in ``size`` blocks."""
    if size == 1:
        return 0, 1, None
    group = getattr(layer, "tp_group", None)
    if group is None:
        from megatron.core import parallel_state

        group = parallel_state.get_tensor_model_parallel_group()
    return dist.get_rank(group), size, group


def select_parallel(
    chunks: Sequence[nn.Module],
    patterns: Sequence[str],
    exclude: Sequence[str],
    tp_rank: int,
    share: Share,
    time_major: bool = True,
) -> list[Layer]:
    """Return the layers to sketch of a model that is spread over several ranks: all layers, in the same order on every rank.

    Collective over the ranks that hold one model together.

    Args:
        chunks: this rank's parts of the model.
        patterns: fnmatch patterns on global names; "auto" stands for the last half of the model's blocks.
        exclude: patterns of names that are never sketched.
        tp_rank: of this rank.  A layer that is not tensor-parallel is counted on rank 0 only, unless its weight is marked as
            seeing a share of the tokens (``weight.sequence_parallel``).
        share: returns the values of all these ranks, in rank order.
        time_major: plain layers see (tokens, samples, features), as in Megatron's models; False for DeepSpeed's PipelineModule.

    Raises:
        ConfigError: on every rank: a layer of Transformer Engine, a pattern that matches nothing, or no layer left.
    """
    local, engine = _found(chunks)
    facts = {name: (*rule.features(module), block) for name, (module, rule, block) in local.items()}
    all_ranks = share((facts, engine, _weights(chunks)))
    _refuse_engine([name for _, names, _ in all_ranks for name in names])
    experts, others = (sum(counts) for counts in zip(*(weights for *_, weights in all_ranks), strict=True))
    if experts:
        log.info(
            "the experts' layers are not sketched: they hold %.0f %% of the model's parameters; influence is that of the rest",
            100 * experts / (experts + others),
        )
    union: dict[str, tuple[int, int, Any]] = {}
    for found, *_ in all_ranks:
        for name, entry in found.items():
            if union.setdefault(name, entry) != entry:
                both = f"{entry[:2]} on one rank and {union[name][:2]} on another"
                raise ConfigError(f"layer {name} is {both}: its blocks need a global layer_number")
    names = sorted(union, key=lambda name: _order(name, union[name][2]))
    kept = _chosen(names, union, patterns, exclude)
    return [_layer(name, local.get(name), union[name], tp_rank, time_major) for name in kept]


def global_name(chunk: nn.Module, name: str) -> tuple[str, tuple[str, int] | None]:
    """Return a module's name with the model's global block numbers, for a ``chunk`` that numbers only its own blocks.

    Returns:
        The name, without wrappers; and (name of the list, number) of the outermost block that holds it, or None.
    """
    parts: list[str] = []
    module, block = chunk, None
    for part in name.split("."):
        module = getattr(module, part)
        number = getattr(module, "layer_number", None)
        if part.isdigit() and isinstance(number, int):
            block = block or (canonical_name(".".join(parts)), number - 1)
            part = str(number - 1)
        elif part.isdigit() and part != name and not parts:  # a PipelineModule numbers its layers over the whole pipeline
            block = ("", int(part))  # one that is itself linear, such as the vocabulary head, is no block
        parts.append(part)
    while parts and parts[0] == "module":  # DistributedDataParallel, Float16Module
        parts.pop(0)
    return canonical_name(".".join(parts)), block


Found = tuple[nn.Module, LayerRule, tuple[str, int] | None]


def _found(chunks: Sequence[nn.Module]) -> tuple[dict[str, Found], list[str]]:
    """Return this rank's layers with a rule by global name, without those of experts, and names of Transformer Engine layers."""
    found: dict[str, Found] = {}
    engine = []
    for chunk in chunks:
        for path, module in chunk.named_modules():
            if not path:
                continue
            name, block = global_name(chunk, path)
            cls = type(module)
            if cls.__module__.startswith(_TRANSFORMER_ENGINE) and "Linear" in cls.__name__:
                engine.append(f"{name} ({cls.__name__})")
            rule = rule_for(module)
            if rule is None or getattr(module, "is_expert", False):
                continue
            if name in found and found[name][0] is not module:
                raise ConfigError(f"two chunks of the model hold a layer {name}: their blocks need a global layer_number")
            found[name] = (module, rule, block)
    return found, engine


def _weights(chunks: Sequence[nn.Module]) -> tuple[int, int]:
    """Return the numbers of parameters of this rank: in experts, those of other expert-parallel ranks included; and elsewhere."""
    counts = [0, 0]
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            expert = ".experts." in name
            counts[0 if expert else 1] += parameter.numel() * (_expert_ranks() if expert else 1)
    return counts[0], counts[1]


def _expert_ranks() -> int:
    """Return over how many ranks Megatron has spread the experts of a layer."""
    module = sys.modules.get("megatron.core.parallel_state")
    if module is None or not module.model_parallel_is_initialized():
        return 1
    return int(module.get_expert_model_parallel_world_size() or 1)


def _refuse_engine(names: Sequence[str]) -> None:
    if names:
        raise ConfigError(
            f"{names[0]} is a layer of Transformer Engine ({len(names)} in all): it may fuse a norm in front of its weight, or "
            "keep FP8 copies, so that its input is not what the weight meets; build the model with the local spec "
            "(--transformer-impl local), or set recipe: content"
        )


def _order(name: str, block: tuple[str, int] | None) -> tuple[Any, ...]:
    return (1, "", 0, name) if block is None else (0, block[0], block[1], name)


def _chosen(
    names: Sequence[str], union: Mapping[str, tuple[int, int, Any]], patterns: Sequence[str], exclude: Sequence[str]
) -> list[str]:
    chosen: set[str] = set()
    for pattern in patterns:
        matched = _last_half(union) if pattern == "auto" else set(fnmatch.filter(names, pattern))
        if not matched and pattern != "auto":
            raise ConfigError(f"collect.layers: {pattern!r} matches none of the model's {len(names)} layers: {list(names)[:8]}")
        chosen |= matched
    kept = [name for name in names if name in chosen and not any(fnmatch.fnmatch(name, e) for e in exclude)]
    if not kept:
        raise ConfigError(
            f"collect.layers={list(patterns)} with collect.exclude={list(exclude)} leaves none of the model's {len(names)} "
            f"layers to sketch: {list(names)[:8]}"
        )
    return kept


def _last_half(union: Mapping[str, tuple[int, int, Any]]) -> set[str]:
    """Return the names in the last half of the blocks, which are the list that holds the most weights; without any, of all."""
    weights: dict[str, int] = defaultdict(int)
    for inputs, outputs, block in union.values():
        if block is not None:
            weights[block[0]] += inputs * outputs
    if not weights:
        return set(sorted(union)[len(union) // 2 :])
    blocks = max(sorted(weights), key=weights.__getitem__)
    numbers = sorted({block[1] for _, _, block in union.values() if block is not None and block[0] == blocks})
    last = set(numbers[len(numbers) // 2 :])
    return {name for name, (_, _, block) in union.items() if block is not None and block[0] == blocks and block[1] in last}


def _layer(name: str, found: Found | None, facts: tuple[int, int, Any], tp_rank: int, time_major: bool) -> Layer:
    if found is None:
        return Layer(name, None, None, facts[0], facts[1])
    module, rule, _ = found
    layer = layer_of(name, module, rule)
    if isinstance(rule, _ParallelRule):
        return layer
    shares_tokens = bool(getattr(getattr(module, "weight", None), "sequence_parallel", False))
    return dataclasses.replace(layer, split=Split(counted=tp_rank == 0 or shares_tokens, time_major=time_major))
