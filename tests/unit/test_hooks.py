from __future__ import annotations

import copy
import gc
import json
import logging
import sys

import numpy as np
import pytest
import torch
from torch import nn

from grace_ds.errors import CheckpointError, ConfigError, DataError
from grace_ds.gradients.basis import BasisAccumulator
from grace_ds.gradients.capture import MicroBatchCapture
from grace_ds.gradients.hooks import Sketcher
from grace_ds.gradients.kfac import MomentAccumulator
from grace_ds.gradients.layers import select_layers
from grace_ds.gradients.projection import bases, fold_table
from tests.models import TinyGPT, text
from tests.oracles import batch_of_one_gradients, sketch_of

SEED, DIM, RANK = 11, 256, 8


def build(recompute: str = "none", **kwargs):
    torch.manual_seed(0)
    return TinyGPT(recompute=recompute, **kwargs)


def sketcher_of(model, dim=DIM, rank=RANK):
    return Sketcher(select_layers(model), SEED, dim, rank)


def expected(model, batch, sketcher, sigma=None):
    weights = {name: model.get_submodule(name).weight for name in sketcher.names}
    gradients = batch_of_one_gradients(model, weights, batch, lambda m, x: m(x))
    shapes = {layer.name: (layer.inputs, layer.outputs) for layer in sketcher.layers}
    sides = {n: bases(n, SEED, sketcher.rank, *shape) for n, shape in shapes.items()}
    tables = {n: fold_table(n, SEED, sketcher.rank, sketcher.dim) for n in shapes}
    return np.stack([sketch_of(g, sides, tables, sketcher.dim, sigma) for g in gradients])


def collect(model, batch, sketcher, scale=1.0, ids=None, **finish):
    capture = sketcher.begin(np.arange(len(batch)) if ids is None else ids)
    loss = model(batch)
    sketcher.observe_loss(loss)
    sketcher.end()
    (loss * scale).backward()
    return sketcher.finish(capture, grad_scale=1 / scale, **finish)


def error(found, truth):
    return np.linalg.norm(found - truth, axis=1).max() / np.linalg.norm(truth, axis=1).max()


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("recompute", ["none", "reentrant", "nonreentrant"])
@pytest.mark.parametrize(("dim", "rank"), [(256, 8), (64, 12)])
def test_matches_batch_of_one_oracle(recompute, dim, rank):
    model, batch = build(recompute), text(5)
    with sketcher_of(model, dim, rank) as sketcher:
        found = collect(model, batch, sketcher, scale=1024.0 / 4)  # a loss scale over accumulation steps
        truth = expected(build(), batch, sketcher)
    assert error(found.sketch, truth) <= 1e-5
    np.testing.assert_allclose(found.norm, np.linalg.norm(truth, axis=1), rtol=1e-5)
    alone = [build()(batch[i : i + 1]).item() for i in range(5)]
    np.testing.assert_allclose(found.loss, alone, rtol=1e-5)
    assert 0 < sketcher.seconds < 10
    assert found.basis == -1 and np.isnan(found.influence).all() and not sketcher.failures


def test_sum_reduction_and_unknown_tokens():
    model, batch = build(), text(4, padded=False)
    with sketcher_of(model) as sketcher:
        truth = expected(model, batch, sketcher)
        targets = batch.shape[1] - 1

        capture = sketcher.begin(np.arange(4))
        (model(batch) * 4 * targets).backward()  # the sum over all tokens, whose losses nobody looked at
        summed = sketcher.finish(capture, reduction="sum", tokens=np.full(4, targets))
        assert error(summed.sketch, truth) <= 1e-5

        capture = sketcher.begin(np.arange(4))
        model(batch).backward()
        assert error(sketcher.finish(capture).sketch, truth) <= 1e-5  # equal lengths: the mean of sample means

        capture = sketcher.begin(np.arange(4))
        (model(batch) * 4).backward()
        assert error(sketcher.finish(capture, reduction="sum").sketch, truth) <= 1e-5
        with pytest.raises(ConfigError, match=r"reduction='max'.*'mean' or 'sum'"):
            sketcher.finish(sketcher.begin(np.arange(4)), reduction="max")


def test_rebatching_leaves_rows_unchanged():
    model, batch = build(), text(12)
    with sketcher_of(model) as sketcher:
        whole = collect(model, batch, sketcher)
        parts = [collect(model, batch[i], sketcher, ids=i) for i in (np.array([3, 11]), np.arange(4, 9), np.array([0]))]
    for part in parts:
        np.testing.assert_allclose(part.sketch, whole.sketch[part.ids], atol=1e-5 * whole.norm.max())
        np.testing.assert_allclose(part.loss, whole.loss[part.ids], rtol=1e-5)


def test_sample_without_valid_targets_gives_no_row():
    model, batch = build(), text(3)
    batch[1, 1:] = -100
    with sketcher_of(model) as sketcher:
        found = collect(model, batch, sketcher, ids=np.array([7, 8, 9]))
    rows = found.rows(step=5, loss_mean=1.0)
    assert np.isnan(found.loss[1])
    assert rows.ids.tolist() == [7, 9] and rows.step.tolist() == [5, 5] and rows.sketch.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(rows.sketch.astype(float), axis=1), 1, atol=2e-3)
    np.testing.assert_allclose(rows.loss, found.loss[[0, 2]] - 1.0)


@pytest.mark.parametrize("recompute", ["none", "reentrant", "nonreentrant"])
def test_training_is_bit_identical_with_hooks(recompute):
    plain = build(recompute, dropout=0.1)
    hooked = copy.deepcopy(plain)
    results = []
    for model, on in ((plain, False), (hooked, True)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(3)
        sketcher = sketcher_of(model)
        if on:
            sketcher.attach()
        for step in range(3):
            batch = text(4, seed=step)
            if on:
                assert collect(model, batch, sketcher) is not None
            else:
                model(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append((dict(model.named_parameters()), torch.get_rng_state()))
    assert torch.equal(results[0][1], results[1][1])
    for name, parameter in results[0][0].items():
        assert torch.equal(parameter, results[1][0][name]), name


def test_hooks_are_gone_after_detach_and_after_an_exception():
    model = build()
    sketcher = sketcher_of(model).attach()
    assert hooks(model) == len(sketcher.layers) == 8
    sketcher.attach()
    assert hooks(model) == 8
    sketcher.detach()
    sketcher.detach()
    assert hooks(model) == 0
    with pytest.raises(RuntimeError, match="job"), sketcher:
        sketcher.begin(np.arange(2))
        model(text(2))
        raise RuntimeError("job")
    assert hooks(model) == 0 and sketcher._meter.now == 0


def test_nothing_is_captured_between_bindings_and_by_evaluation():
    model, batch = build("nonreentrant"), text(3)
    with sketcher_of(model) as sketcher:
        truth = expected(model, batch, sketcher)
        capture = sketcher.begin(np.arange(3))
        loss = model(batch)
        sketcher.end()
        with torch.no_grad():
            model(text(7, seed=9))
        model(text(7, seed=9))  # in train mode with gradients, but never bound
        loss.backward()
        model(text(7, seed=9)).backward()  # an unbound step, whose checkpoint recomputes in its backward
        assert error(sketcher.finish(capture, tokens=(batch[:, 1:] >= 0).sum(1).numpy()).sketch, truth) <= 1e-5
        assert not capture.spoiled


@pytest.mark.parametrize("recompute", ["reentrant", "nonreentrant"])
def test_unbound_step_does_not_leak_into_an_abandoned_binding(recompute):
    model, batch = build(recompute), text(3)
    with sketcher_of(model) as sketcher:
        first = sketcher.begin(np.arange(3))
        first_loss = model(batch)
        sketcher.end()
        first_loss.backward()
        model(text(3, seed=5)).backward()
        truth = expected(build(), batch, sketcher)
        assert error(sketcher.finish(first, tokens=(batch[:, 1:] >= 0).sum(1).numpy()).sketch, truth) <= 1e-5
        dropped = sketcher.begin(np.arange(3))
        sketcher.discard(dropped)
        model(batch).backward()
        assert sketcher.finish(dropped) is None


def test_two_forwards_before_their_backwards_are_not_mixed():
    model, batches = build(), [text(3, seed=1), text(4, seed=2)]
    with sketcher_of(model) as sketcher:
        captures, losses = [], []
        for batch in batches:
            captures.append(sketcher.begin(np.arange(len(batch))))
            losses.append(model(batch))
            sketcher.observe_loss(losses[-1])
            sketcher.end()
        for loss in reversed(losses):
            loss.backward()
        for capture, batch in zip(captures, batches, strict=True):
            assert error(sketcher.finish(capture).sketch, expected(model, batch, sketcher)) <= 1e-5


def test_second_backward_counts_once():
    model, batch = build(), text(3)
    with sketcher_of(model) as sketcher:
        capture = sketcher.begin(np.arange(3))
        loss = model(batch)
        sketcher.observe_loss(loss)
        loss.backward(retain_graph=True)
        loss.backward()
        assert error(sketcher.finish(capture).sketch, expected(model, batch, sketcher)) <= 1e-5


class Forms(nn.Module):
    """The same layer under the input forms that jobs use, called twice."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.layer = form, nn.Linear(6, 6)

    def forward(self, x):
        n, t, d = x.shape
        if self.form == "flat":
            x = x.reshape(n * t, d)
        elif self.form == "time":
            x = x.transpose(0, 1)
        x = self.layer(torch.tanh(self.layer(x)))
        x = x.transpose(0, 1) if self.form == "time" else x
        return x.reshape(n, t, d).square().mean()


@pytest.mark.parametrize("form", ["batch", "flat", "time"])
@pytest.mark.parametrize(("n", "t"), [(4, 6), (4, 8), (3, 1)])
def test_input_forms_and_shared_modules(form, n, t):
    torch.manual_seed(0)
    model, x = Forms(form), torch.randn(n, t, 6)
    with Sketcher(select_layers(model, ["layer"]), SEED, 64, 4) as sketcher:
        capture = sketcher.begin(np.arange(n))
        model(x).backward()
        found = sketcher.finish(capture)
        assert error(found.sketch, expected(model, x, sketcher)) <= 1e-5


def test_layer_that_does_not_split_is_left_out_once(caplog):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with Sketcher(select_layers(model, ["*"]), SEED) as sketcher, caplog.at_level(logging.WARNING, "grace_ds"):
        for _ in range(2):
            capture = sketcher.begin(np.arange(3))
            model(torch.randn(5, 4)).sum().backward()
            assert sketcher.finish(capture) is None and not capture.spoiled
    assert [r.getMessage() for r in caplog.records if "layer 0 " in r.getMessage()] == [
        "layer 0 is not sketched: its input (5, 4) does not split by sample"
    ]


def test_failing_hook_spoils_the_binding_and_not_the_job(caplog):
    model, batch = build(), text(3)
    with sketcher_of(model) as sketcher, caplog.at_level(logging.WARNING, "grace_ds"):
        capture = sketcher.begin(np.arange(3))
        loss = model(batch)
        capture.plan.sides[3][1].project = lambda flat: 1 / 0  # a fault in the middle of the backward
        loss.backward()
        assert sketcher.finish(capture) is None and capture.spoiled and sketcher.failures == 1
        assert model.blocks[0].qkv.weight.grad is not None
    assert sum("ZeroDivisionError" in r.getMessage() for r in caplog.records) == 1


def test_autocast_and_bfloat16_stay_close_to_float32():
    model, batch = build(), text(6)
    with sketcher_of(model) as sketcher:
        truth = expected(model, batch, sketcher)
        with torch.autocast("cpu", torch.bfloat16):
            found = collect(model, batch, sketcher)
    half = build().bfloat16()
    with sketcher_of(half) as sketcher:
        low = collect(half, batch, sketcher)
    for rows in (found, low):
        cosine = (rows.sketch * truth).sum(1) / np.linalg.norm(rows.sketch, axis=1) / np.linalg.norm(truth, axis=1)
        assert cosine.min() > 0.99


def test_calibration_freezes_a_scale_that_rows_and_checkpoints_carry():
    model, batch = build(), text(6)
    with sketcher_of(model) as sketcher:
        with pytest.raises(ConfigError, match="collect some batches"):
            sketcher.scale.freeze(sketcher.scale.sums())
        collect(model, batch[:4], sketcher)
        collect(model, batch[4:], sketcher)
        sums = sketcher.scale.sums()
        assert sums[-1] == 6
        sums[2] = 0.0  # a dead layer takes the median of the others
        sketcher.scale.freeze(sums)
        sigma = sketcher.scale.by_name()
        assert sigma[sketcher.names[2]] == pytest.approx(np.median([s for i, s in enumerate(sigma.values()) if i != 2]))
        found = collect(model, batch, sketcher)
        assert error(found.sketch, expected(model, batch, sketcher, sigma)) <= 1e-5
        assert np.array_equal(sketcher.scale.sums(), sums), "a frozen scale must not move"

        other = sketcher_of(model)
        other.load_state_dict(json.loads(json.dumps(sketcher.state_dict())))
        assert other.scale.by_name() == sigma and other.scale.frozen
        np.testing.assert_array_equal(other.scale.sums(), sums)
    # each layer's scale is the root mean square of its gradient's sketch
    weights = {layer.name: layer.module.weight for layer in other.layers}
    gradients = batch_of_one_gradients(model, weights, batch, lambda m, x: m(x))
    p_in, p_out, unit = bases(other.names[0], SEED, RANK, 32, 96)
    lengths = [np.linalg.norm(unit * p_in @ g[other.names[0]] @ p_out.T) for g in gradients]
    assert sigma[other.names[0]] == pytest.approx(np.sqrt(np.mean(np.square(lengths))), rel=1e-4)


def test_states_that_do_not_compare_are_refused():
    model = build()
    state = sketcher_of(model).state_dict()
    with pytest.raises(CheckpointError, match="dim=256, this run has dim=128"):
        sketcher_of(model, dim=128).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"other layers .*7 differ.*restore"):
        Sketcher(select_layers(model, ["blocks.3.up"]), SEED).load_state_dict(state)


def test_constructor_and_empty_binding_are_refused():
    with pytest.raises(ConfigError, match="got 0 layers"):
        Sketcher([], SEED)
    with pytest.raises(DataError, match="no ids"):
        sketcher_of(build()).begin(np.empty(0, np.int64))


def test_what_was_not_constructed_is_deleted_without_a_word(monkeypatch):
    said = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    for kind in (MicroBatchCapture, BasisAccumulator, MomentAccumulator):
        with pytest.raises(TypeError):
            kind()
        kind.__new__(kind)  # as torch.compile leaves one behind
        gc.collect()
    assert [str(x.exc_value) for x in said] == []


def test_peak_counts_projections_not_activations():
    model, batch = build(), text(8, length=33)
    with sketcher_of(model) as sketcher:
        collect(model, batch, sketcher)
        projected = sum(RANK * 8 * 32 * 4 for _ in sketcher.layers)
        sums = len(sketcher.layers) * 8 * RANK * RANK * 4
        sides = sum(RANK * (layer.inputs + layer.outputs) * 4 for layer in sketcher.layers)
        assert projected < sketcher.peak_bytes <= projected + sums + sides
        assert sketcher._meter.now == 0
        sketcher.reset_peak()
        assert sketcher.peak_bytes == sides
