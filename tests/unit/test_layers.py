from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from grace_ds.errors import ConfigError
from grace_ds.gradients.hooks import Sketcher
from grace_ds.gradients.layers import LayerRule, canonical_name, register_rule, rule_for, select_layers
from tests.models import TinyGPT


def names(model, *args):
    return [layer.name for layer in select_layers(model, *args)]


def last(*blocks):
    return [f"blocks.{b}.{kind}" for b in blocks for kind in ("qkv", "out", "up", "down")]


def test_auto_takes_the_last_half_of_the_blocks_without_the_head():
    assert names(TinyGPT(depth=4)) == last(2, 3)
    assert names(TinyGPT(depth=3)) == last(1, 2)
    tied = TinyGPT(depth=2, width=32, vocab=96, context=128)  # the width of qkv equals the vocabulary
    tied.head.weight = tied.tokens.weight
    assert names(tied) == last(1)
    layer = select_layers(tied)[2]
    assert (layer.name, layer.inputs, layer.outputs) == ("blocks.1.up", 32, 128)


def test_auto_is_not_misled_by_longer_inner_lists_and_uncalled_layers():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(8))
            self.attention = nn.MultiheadAttention(4, 2)
            self.out = nn.Linear(4, 4)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(4, 4)
            self.layers = nn.Sequential(nn.LayerNorm(4), Experts(), Experts(), nn.Linear(4, 4))

    assert names(Model(), ["auto"], ["*expert*"]) == ["layers.2.out"]


def test_auto_without_blocks_takes_the_last_half_of_all_layers():
    linears = [nn.Linear(8, 9), nn.Linear(9, 8), nn.Linear(8, 8), nn.Linear(8, 50)]
    model = nn.Sequential(nn.Embedding(50, 8), *linears)
    assert names(model) == ["2", "3"]
    tied = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 50))
    tied[3].weight = tied[0].weight
    assert names(tied) == ["2"]


def test_patterns_and_excludes():
    model = TinyGPT(depth=2)
    assert names(model, ["blocks.0.*"]) == last(0)
    assert names(model, ["head", "blocks.1.up"]) == ["blocks.1.up", "head"]
    assert names(model, ["auto", "head"], ["*.up", "*.down"]) == ["blocks.1.qkv", "blocks.1.out", "head"]


def test_errors_name_the_cure():
    model = TinyGPT(depth=2)
    with pytest.raises(ConfigError, match=r"'blocks.1.upp' matches no module.*near names: .*blocks.1.up"):
        select_layers(model, ["blocks.1.upp"])
    with pytest.raises(ConfigError, match=r"'blocks.0.norm1'.*LayerNorm.*torch.nn.modules.linear.Linear.*register_rule"):
        select_layers(model, ["blocks.0.norm1"])
    with pytest.raises(ConfigError, match=r"leaves no layer to sketch.*9 layers that could be: blocks.0.qkv"):
        select_layers(model, ["auto"], ["*"])


def test_a_registered_rule_is_used():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 5))

    assert rule_for(Transposed()) is None

    @register_rule(Transposed)
    class TransposedRule(LayerRule):
        def features(self, module):
            return module.weight.shape

    class Derived(Transposed):
        pass

    layer = select_layers(nn.ModuleDict({"x": Derived()}), ["x"])[0]
    assert isinstance(layer.rule, TransposedRule) and (layer.inputs, layer.outputs) == (3, 5)


def test_wrappers_do_not_change_a_layers_name():
    assert canonical_name("_orig_mod.blocks.1._checkpoint_wrapped_module.up") == "blocks.1.up"


class Paired(nn.Linear):
    """A layer that returns its output beside something else, as Megatron's do."""

    def forward(self, x):
        return super().forward(x), None


class WithPair(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair = Paired(4, 3)

    def forward(self, x):
        return self.pair(x)[0].square().sum()


def test_layer_that_returns_a_tuple_is_sketched():
    torch.manual_seed(0)
    model, x = WithPair(), torch.randn(2, 5, 4)
    with Sketcher(select_layers(model, ["pair"]), seed=1, dim=64, rank=4) as sketcher:
        capture = sketcher.begin(np.arange(2))
        loss = model(x)
        sketcher.end()
        loss.backward()
        found = sketcher.finish(capture, reduction="sum")
    assert found is not None and (found.norm > 0).all()


def test_of_a_model_that_is_trained_in_part_auto_takes_what_is_trained() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4))) for _ in range(4)])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".1." in name)
    assert [layer.name for layer in select_layers(model)] == ["2.1.0", "2.1.1", "3.1.0", "3.1.1"]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert len(select_layers(model)) == 6  # nothing is: then all alike, as before
