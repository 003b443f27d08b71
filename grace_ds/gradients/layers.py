"""Choose the layers to sketch, and define how their inputs and outputs are found.

A rule describes one class of layers whose weight gradient is a sum of outer products ``Σ_t a_t g_tᵀ`` of its input and
the gradient of its output.  Biases are left out: their gradient, the sum of ``g_t``, adds little to the weight's.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from grace_ds.errors import ConfigError
from grace_ds.gradients.sharding import WHOLE, Split

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


Hook = Callable[[nn.Module, tuple[Any, ...], Any], None]


class LayerRule:
    """Rule for reading one class of layers.  Subclass it and register it with :func:`register_rule`."""

    def reads(self, module: nn.Module) -> bool:
        """Return whether the rule holds for ``module``, which is of its class or of a subclass."""
        return True

    def features(self, module: nn.Module) -> tuple[int, int]:
        """Return (inputs, outputs) of the weight from the module's attributes: under ZeRO-3 the weight itself is empty."""
        raise NotImplementedError

    def tensors(self, args: tuple[Any, ...], output: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return (input (..., inputs), output (..., outputs)) of one call; None if the call has another form.

        If the output is a tuple, such as (output, bias), its first entry is taken.
        """
        if isinstance(output, tuple) and output:
            output = output[0]
        if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
            return args[0], output
        return None

    def split(self, module: nn.Module) -> Split:
        """Return which part of the layer the module holds; ``features`` describe the whole layer."""
        return WHOLE

    def watch(self, module: nn.Module, hook: Hook) -> Callable[[], None]:
        """Call ``hook(module, args, output)`` at every call of the module; return a function that removes the hook."""
        return module.register_forward_hook(hook).remove


_RULES: dict[type[nn.Module] | str, LayerRule] = {}


def register_rule(cls: type[nn.Module] | str) -> Callable[[type[LayerRule]], type[LayerRule]]:
    """Decorate the rule class for ``cls`` and its subclasses.

    A string ``"package.module.Class"`` needs no import of that class.
    """

    def register(rule: type[LayerRule]) -> type[LayerRule]:
        _RULES[cls] = rule()
        return rule

    return register


@register_rule(nn.Linear)
class LinearRule(LayerRule):
    """``y = x Wᵀ + b``."""

    def features(self, module: nn.Module) -> tuple[int, int]:
        """Return (inputs, outputs) from the module's attributes."""
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


@register_rule("transformers.pytorch_utils.Conv1D")
class Conv1DRule(LayerRule):
    """``y = x W + b``, the layers of GPT-2 in Hugging Face transformers."""

    def features(self, module: nn.Module) -> tuple[int, int]:
        """Return (inputs, outputs) from the weight's shape."""
        weight: Any = module.weight
        shape = getattr(weight, "ds_shape", weight.shape)  # ZeRO-3 keeps the full shape there
        return int(shape[0]), int(shape[1])


def rule_for(module: nn.Module) -> LayerRule | None:
    """Return the rule of the module's class or of its nearest base class; None if there is none that reads it."""
    for cls in type(module).__mro__:
        rule = _RULES.get(cls) or _RULES.get(f"{cls.__module__}.{cls.__qualname__}")
        if rule is not None:
            return rule if rule.reads(module) else None
    return None


def known_rules() -> list[str]:
    """Return the names of the layer classes that can be sketched."""
    return sorted(k if isinstance(k, str) else f"{k.__module__}.{k.__qualname__}" for k in _RULES)


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer to sketch.

    Attributes:
        name: global, seeds the bases.
        module: None if the layer lies on other ranks only (another pipeline stage).
        rule: of the module's class; None if ``module`` is None.
        inputs, outputs: widths of the whole weight.
        split: the part of the weight that this rank holds.
    """

    name: str
    module: nn.Module | None
    rule: LayerRule | None
    inputs: int
    outputs: int
    split: Split = WHOLE

    @property
    def here(self) -> bool:
        """Whether this rank sketches the layer, or a part of it."""
        return self.module is not None and self.split.counted


def canonical_name(name: str) -> str:
    """Return the module path without the names that torch.compile and checkpoint wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def select_layers(model: nn.Module, patterns: Sequence[str] = ("auto",), exclude: Sequence[str] = ()) -> list[Layer]:
    """Return the layers to sketch, in the order of ``model.named_modules()``.

    Args:
        model: the job's module (``engine.module``), on this rank.
        patterns: fnmatch patterns on module names; "auto" stands for the last half of the blocks, the head left out.
        exclude: patterns of names that are never sketched; they override ``patterns``.

    Raises:
        ConfigError: a pattern matches nothing or only layers without a rule, or no layer is left.
    """
    modules = {canonical_name(name): module for name, module in model.named_modules() if name}
    known = {name: rule for name, module in modules.items() if (rule := rule_for(module)) is not None}
    chosen: set[str] = set()
    for pattern in patterns:
        chosen |= set(_auto(modules, known)) if pattern == "auto" else _match(pattern, modules, known)
    kept = [name for name in known if name in chosen and not any(fnmatch.fnmatch(name, e) for e in exclude)]
    if not kept:
        raise ConfigError(
            f"collect.layers={list(patterns)} with collect.exclude={list(exclude)} leaves no layer to sketch; the "
            f"model has {len(known)} layers that could be: {_some(known)}. Name some of them in collect.layers"
        )
    return [layer_of(name, modules[name], known[name]) for name in kept]


def layer_of(name: str, module: nn.Module, rule: LayerRule) -> Layer:
    """Build the layer that ``module`` is, or is a part of."""
    return Layer(name, module, rule, *rule.features(module), rule.split(module))


def _match(pattern: str, modules: dict[str, nn.Module], known: dict[str, LayerRule]) -> set[str]:
    matched = fnmatch.filter(modules, pattern)
    if not matched:
        near = difflib.get_close_matches(pattern, list(known), n=4, cutoff=0.3) or list(known)[:4]
        raise ConfigError(f"collect.layers: {pattern!r} matches no module of the model; near names: {_some(near)}")
    usable = {name for name in matched if name in known}
    if not usable:
        classes = sorted({type(modules[name]).__qualname__ for name in matched})
        raise ConfigError(
            f"collect.layers: {pattern!r} matches only modules of class {_some(classes)}, which no layer rule "
            f"describes; known: {known_rules()}. Match those, or use grace_ds.gradients.layers.register_rule"
        )
    return usable


def _auto(modules: dict[str, nn.Module], known: dict[str, LayerRule]) -> list[str]:
    """Return the names in the last half of the blocks, without the vocabulary head; without blocks, of all layers."""
    uncalled = tuple(f"{name}." for name, m in modules.items() if isinstance(m, nn.MultiheadAttention))
    # nn.MultiheadAttention reads its projection's weight and never calls the module: a hook there would never fire.
    usable = [name for name in known if not name.startswith(uncalled)]
    embeddings = [m for m in modules.values() if isinstance(m, nn.Embedding)]
    tied = {id(m.weight) for m in embeddings}
    usable = [name for name in usable if id(getattr(modules[name], "weight", None)) not in tied]
    # If only a part of the model is trained (adapters), take the layers that training changes.
    usable = [name for name in usable if _trained(modules[name])] or usable
    blocks = _blocks(modules, known)
    if blocks:
        inside = tuple(f"{name}." for name in blocks[len(blocks) // 2 :])
        return [name for name in usable if name.startswith(inside)]
    vocabulary = max((m.num_embeddings for m in embeddings), default=-1)
    usable = [name for name in usable if known[name].features(modules[name])[1] != vocabulary]
    return usable[len(usable) // 2 :]


def _trained(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return weight is None or bool(weight.requires_grad)


def _blocks(modules: dict[str, nn.Module], known: dict[str, LayerRule]) -> list[str]:
    """Return the names of the model's blocks: equal-typed children of the list that holds the most sketchable weights.

    Weights decide, not length: a list of experts inside each block may be longer than the list of blocks.
    """
    best: list[str] = []
    best_size = 0
    for name, module in modules.items():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        children = {f"{name}.{child}": m for child, m in module.named_children()}
        inner = {c: m for c, m in children.items() if next(m.children(), None) is not None}
        if not inner:
            continue
        cls, count = Counter(type(m) for m in inner.values()).most_common(1)[0]
        like = [c for c, m in inner.items() if type(m) is cls]
        if count < 2:
            continue
        inside = tuple(f"{c}." for c in like)
        size = sum(_weights(known[k], modules[k]) for k in known if k.startswith(inside))
        if size > best_size:  # strictly: of two equal lists take the outer one, which comes first
            best, best_size = like, size
    return best


def _weights(rule: LayerRule, module: nn.Module) -> int:
    inputs, outputs = rule.features(module)
    return inputs * outputs


def _some(names: Any, limit: int = 8) -> str:
    listed = list(names)
    return ", ".join(listed[:limit]) + (f", … ({len(listed)} in all)" if len(listed) > limit else "")
