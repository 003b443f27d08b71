from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from grace_ds.errors import DataError
from grace_ds.gradients.hooks import Sketcher
from grace_ds.gradients.layers import select_layers
from grace_ds.gradients.probe import probe_basis, probe_rows, untouched
from tests.models import TinyGPT, text


def loss_of(model, batch):
    return model(batch)


def flags(model):
    return [m.training for m in model.modules()] + [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("recompute", ["none", "reentrant", "nonreentrant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_is_bit_identical_with_probes_between(recompute, dtype):
    torch.manual_seed(0)
    plain = TinyGPT(recompute=recompute, dropout=0.1).to(dtype)
    plain.positions.weight.requires_grad_(False)
    plain.blocks[0].eval()  # a job may have frozen parts
    probed = copy.deepcopy(plain)
    for model in (plain, probed):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        torch.manual_seed(3)
        sketcher = Sketcher(select_layers(model), 1)
        for step in range(4):
            model(text(4, seed=step)).backward()
            if model is probed:
                before, grads = flags(model), [p.grad.clone() for p in model.parameters() if p.grad is not None]
                with sketcher:
                    target = sketcher.accumulator()
                    probe_basis(model, [(np.arange(3), text(3, seed=50))], loss_of, sketcher, target)
                    sketcher.set_basis(target.fit(target.pack(), step))
                    found = probe_rows(model, [(np.arange(5), text(5, seed=60))], loss_of, sketcher)
                assert len(found) == 1 and np.isfinite(found[0].influence).all()
                assert flags(model) == before
                after = [p.grad for p in model.parameters() if p.grad is not None]
                assert all(torch.equal(a, b) for a, b in zip(grads, after, strict=True))
                assert not any(m._forward_hooks for m in model.modules())
            optimizer.step()
            optimizer.zero_grad()
    for (name, a), b in zip(plain.named_parameters(), probed.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("recompute", ["none", "reentrant"])
def test_probe_sees_the_gradients_of_training(recompute):
    torch.manual_seed(0)
    model, batch = TinyGPT(recompute=recompute), text(5)
    with Sketcher(select_layers(model), 1) as sketcher:
        capture = sketcher.begin(np.arange(5))
        loss = model(batch)
        sketcher.observe_loss(loss)
        sketcher.end()
        loss.backward()
        trained = sketcher.finish(capture)
        probed = probe_rows(model, [(np.arange(5), batch)], loss_of, sketcher, loss_scale=256.0)[0]
    np.testing.assert_allclose(probed.sketch, trained.sketch, atol=1e-5 * trained.norm.max())
    np.testing.assert_allclose(probed.loss, trained.loss, rtol=1e-6)


def test_everything_is_restored_after_an_exception():
    torch.manual_seed(0)
    model = TinyGPT()
    before, state = flags(model), torch.get_rng_state()

    def broken(model, batch):
        torch.rand(3)
        assert not model.training
        model(batch)
        raise RuntimeError("loss_fn")

    with Sketcher(select_layers(model), 1) as sketcher:
        for run in (
            lambda b: probe_basis(model, b, broken, sketcher, sketcher.accumulator()),
            lambda b: probe_rows(model, b, broken, sketcher),
        ):
            with pytest.raises(RuntimeError, match="loss_fn"):
                run([(np.arange(2), text(2))])
            assert sketcher._current is None
    assert flags(model) == before and torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_failing_hook_fails_the_probe():
    model = TinyGPT()
    with Sketcher(select_layers(model), 1) as sketcher:
        target = sketcher.accumulator()
        target._add = lambda *args: 1 / 0
        with pytest.raises(DataError, match="hook failed"):
            probe_basis(model, [(np.arange(2), text(2))], loss_of, sketcher, target)


def test_model_without_embedding_is_refused():
    with (
        pytest.raises(DataError, match=r"no nn.Embedding.*recipe: content"),
        untouched(nn.Linear(3, 3)),
    ):
        pass


def saved_bytes(model, batch):
    """Bytes that a probe's forward keeps for its backward."""
    kept = 0

    def pack(x):
        nonlocal kept
        kept += x.numel() * x.element_size()
        return x

    with untouched(model), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(input_ids=batch, labels=batch).loss.backward()
    return kept


def test_a_probe_recomputes_activations_where_the_job_does():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=4, n_head=2)
    model = transformers.GPT2LMHeadModel(config).train()
    batch = torch.randint(0, 64, (4, 64))
    whole, before = saved_bytes(model, batch), flags(model)
    model.gradient_checkpointing_enable()
    assert saved_bytes(model, batch) < whole / 3
    assert flags(model) == before
    # Dropout stays off all the same: two probes of one batch agree.
    with untouched(model):
        assert torch.equal(model(input_ids=batch, labels=batch).loss, model(input_ids=batch, labels=batch).loss)
