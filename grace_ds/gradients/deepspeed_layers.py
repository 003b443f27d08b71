"""Describe the layers that DeepSpeed's AutoTP puts in the place of a model's linear ones, and choose layers among them.

A rank sees of one layer what it sees of Megatron's (:mod:`~grace_ds.gradients.megatron_layers`): of a column-parallel one the
whole input and its features of the output, of a row-parallel one its features of the input and the whole output gradient.
Tokens are never split.  Features are those of the layer before it was cut: AutoTP cuts a fused projection (QKV, a gated MLP)
part by part, so that a rank's features may lie apart, and blocks need not be equal.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from grace_ds.gradients.layers import Layer, LayerRule, register_rule, rule_for, select_layers
from grace_ds.gradients.sharding import WHOLE, Split
from grace_ds.records import IntArray

log = logging.getLogger("grace_ds")

_MODULE = "deepspeed.module_inject.layers"
_COLUMN = ("LinearLayer", "VocabParallelLinear", "SubParamLinearLayer", "fused_LinearLayer", "GateUpPack_LinearLayer")
_ROW = ("LinearAllreduce",)


class _AutoTPRule(LayerRule):
    """Rule for both kinds of layers, of the classes whose cut can be read."""

    classes: tuple[str, ...]
    side: str

    def reads(self, module: nn.Module) -> bool:
        """Return whether it is known which features this rank holds; a subclass may cut in a way of its own."""
        return type(module).__name__ in self.classes and self._parts(module) is not None

    def features(self, module: nn.Module) -> tuple[int, int]:
        """Return (inputs, outputs) of the whole layer."""
        layer: Any = module
        return int(layer._orig_weight_shape[1]), int(layer._orig_weight_shape[0])

    def split(self, module: nn.Module) -> Split:
        """Return this rank's features of the side that is cut."""
        layer: Any = module
        rank, size = int(layer.tp_index), int(layer.tp_world_size)
        if size == 1:
            return Split()
        if getattr(layer, "gather_output", False):  # every rank has the whole input and the whole gradient
            return Split(counted=rank == 0)
        return Split(self.side, rank, size, layer.mp_group, held=held(self._parts(module) or [], rank))

    def _parts(self, module: nn.Module) -> list[list[int]] | None:
        """Return, for each part of the cut side in order, the ranks' numbers of its features; None if this is not known."""
        layer: Any = module
        if hasattr(layer, "_subparam_shard_widths"):
            widths = layer._subparam_shard_widths
            flat = getattr(layer, "partition_dim", 0) == 0 and len(getattr(layer, "_logical_shape", (0, 0))) == 2
            return [list(part) for part in widths] if widths is not None and flat else None
        return [list(layer._partition_sizes)]


@register_rule(f"{_MODULE}.LinearLayer")
class AutoTPColumnRule(_AutoTPRule):
    """``y = x Wᵀ + b``, the outputs cut."""

    classes, side = _COLUMN, "out"


@register_rule(f"{_MODULE}.SubParamLinearLayer")
class AutoTPPartsRule(AutoTPColumnRule):
    """The same of a layer with several parts that are cut one by one."""


@register_rule(f"{_MODULE}.LinearAllreduce")
class AutoTPRowRule(_AutoTPRule):
    """``y = Σ x_r W_rᵀ + b``, the inputs cut."""

    classes, side = _ROW, "in"


def held(parts: Sequence[Sequence[int]], rank: int) -> IntArray:
    """Return the features that a rank holds, in its order: (w,) int64.

    Args:
        parts: for each part of the whole side, in order, how many of its features each rank holds, in rank order.
    """
    found, start = [], 0
    for widths in parts:
        first = start + sum(widths[:rank])
        found.append(np.arange(first, first + widths[rank], dtype=np.int64))
        start += sum(widths)
    return np.concatenate(found)


def select_autotp(model: nn.Module, patterns: Sequence[str], exclude: Sequence[str], rank: int) -> list[Layer]:
    """Return the layers to sketch, as :func:`~grace_ds.gradients.layers.select_layers` does of the model before it was cut.

    A layer that is not cut is counted on tensor-parallel rank 0 alone.  The log says which share of the model's parameters is in
    parallel layers that cannot be read.

    Args:
        rank: this rank among the tensor-parallel ones.

    Raises:
        ConfigError: as :func:`select_layers`.
    """
    unread = {name: m for name, m in model.named_modules() if _is_parallel_linear(m) and rule_for(m) is None}
    if unread:
        size = sum(p.numel() for m in unread.values() for p in m.parameters())
        log.warning(
            "%d tensor-parallel layers are not sketched, such as %s (%s), for how they are cut cannot be read: they hold %.1f %% "
            "of this rank's parameters",
            len(unread),
            next(iter(unread)),
            type(next(iter(unread.values()))).__name__,
            100 * size / max(1, sum(p.numel() for p in model.parameters())),
        )
    layers = select_layers(model, patterns, exclude)
    alone = Split(counted=rank == 0)
    return [dataclasses.replace(layer, split=alone) if layer.split is WHOLE else layer for layer in layers]


def _is_parallel_linear(module: nn.Module) -> bool:
    """Return whether ``module`` is one of AutoTP's layers, and not an embedding."""
    names = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__}
    return f"{_MODULE}.TensorParallel_Layer" in names and "Embedding" not in type(module).__name__
