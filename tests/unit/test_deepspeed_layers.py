"""The rules of AutoTP's layers against the modules themselves, cut as DeepSpeed cuts them, two ranks in one process."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from grace_ds.gradients.deepspeed_layers import held, select_autotp
from grace_ds.gradients.layers import layer_of, rule_for, select_layers
from grace_ds.gradients.megatron_layers import select_parallel

pytestmark = pytest.mark.timeout(60)
layers = pytest.importorskip("deepspeed.module_inject.layers")


def cut(cls, linear: nn.Linear, rank: int, monkeypatch: pytest.MonkeyPatch, **options):
    """The layer that rank ``rank`` of two makes of ``linear``, without a process group."""
    monkeypatch.setattr(layers.dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(layers.dist, "get_rank", lambda group=None: rank)
    monkeypatch.setattr(layers.pg_utils, "is_parallel", lambda group: True)
    layers.set_autotp_mode(training=True)
    try:
        return cls(linear, SimpleNamespace(), name="layer", **options)
    finally:
        layers.set_autotp_mode(training=False)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(10, 12)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("cls", "options", "side"),
    [
        ("LinearLayer", {}, "out"),
        ("LinearAllreduce", {}, "in"),
        ("SubParamLinearLayer", {"shape": (3, -1), "partition_dim": 0}, "out"),
        ("SubParamLinearLayer", {"shape": ((6, 4, 2), -1), "partition_dim": 0}, "out"),
    ],
)
def test_a_rank_holds_the_features_that_the_module_kept(monkeypatch, cls, options, side, rank):
    whole = linear().weight.detach().clone()
    module = cut(getattr(layers, cls), linear(), rank, monkeypatch, **options)
    rule = rule_for(module)
    assert rule is not None
    layer = layer_of("layer", module, rule)
    assert (layer.inputs, layer.outputs, layer.split.side) == (10, 12, side)
    columns = layer.split.columns(side, 10 if side == "in" else 12)
    kept = whole[:, columns] if side == "in" else whole[columns]
    assert torch.equal(module.weight, kept)
    other = "in" if side == "out" else "out"
    assert layer.split.columns(other, 7) == slice(0, 7)


def test_a_gathered_output_is_whole_on_every_rank_and_counted_once(monkeypatch):
    found = [cut(layers.LinearLayer, linear(), rank, monkeypatch, gather_output=True) for rank in (0, 1)]
    splits = [layer_of("layer", module, rule_for(module)).split for module in found]
    assert [(s.side, s.counted) for s in splits] == [("", True), ("", False)]


def test_blocks_of_several_parts_cover_the_side_once():
    parts = [[3, 2], [1, 4]]
    assert held(parts, 0).tolist() == [0, 1, 2, 5]
    assert np.sort(np.concatenate([held(parts, rank) for rank in (0, 1)])).tolist() == list(range(10))


def test_a_subclass_with_a_cut_of_its_own_is_left_out_and_said(monkeypatch, caplog):
    unread = cut(type("Odd", (layers.LinearLayer,), {}), linear(), 1, monkeypatch)
    assert rule_for(unread) is None
    read = cut(layers.LinearLayer, linear(), 1, monkeypatch)
    model = nn.ModuleDict({"odd": unread, "read": read, "plain": nn.Linear(3, 3)})
    chosen = select_autotp(model, ["*"], [], rank=1)
    assert [layer.name for layer in chosen] == ["read", "plain"]
    assert [layer.here for layer in chosen] == [True, False]
    assert "odd" in caplog.text and "%" in caplog.text


def test_of_a_pipeline_as_of_the_whole_model_auto_leaves_out_the_vocabulary_head() -> None:
    def block() -> nn.Module:
        return nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)})

    model = nn.Module()  # with the names that a PipelineModule gives
    for i, layer in enumerate([nn.Embedding(97, 8), *(block() for _ in range(4)), nn.Linear(8, 97)]):
        model.add_module(str(i), layer)
    found = select_parallel([model], ["auto"], [], 0, lambda mine: [mine], time_major=False)
    assert sorted(layer.name for layer in found) == sorted(layer.name for layer in select_layers(model))
    assert {layer.name.split(".")[0] for layer in found} == {"3", "4"}
