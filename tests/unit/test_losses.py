from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from grace_ds.gradients.hooks import Sketcher
from grace_ds.gradients.layers import select_layers
from grace_ds.gradients.losses import sample_losses

N, T, V = 4, 6, 10


def case(ignore=-100):
    torch.manual_seed(0)
    logits, targets = torch.randn(N, T, V, requires_grad=True), torch.randint(0, V, (N, T))
    targets[0, 2:] = ignore
    targets[3, :1] = ignore
    alone = [F.cross_entropy(logits[i], targets[i], ignore_index=ignore).item() for i in range(N)]
    return logits, targets, np.array(alone), (targets != ignore).sum(1).tolist()


FORMS = {
    "flat": lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten()),
    "classes in the middle": lambda x, y: F.cross_entropy(x.transpose(1, 2), y),
    "sum over a count": lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten(), reduction="sum") / 17,
    "nll": lambda x, y: F.nll_loss(F.log_softmax(x.flatten(0, 1), -1), y.flatten()),
    "scaled, with a penalty": lambda x, y: 3 * F.cross_entropy(x.flatten(0, 1), y.flatten()) + x.square().mean(),
    "no reduction, then mean": lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten(), reduction="none").mean(),
}


@pytest.mark.parametrize("form", FORMS)
def test_equals_cross_entropy_of_each_sample(form):
    logits, targets, alone, counts = case()
    loss, tokens = sample_losses(FORMS[form](logits, targets), N)
    assert tokens.tolist() == counts and loss.dtype == torch.float32
    np.testing.assert_allclose(loss.numpy(), alone, rtol=1e-5)


def test_positive_ignore_index_and_bfloat16():
    logits, targets, alone, counts = case(ignore=3)
    counts = (targets != 3).sum(1).tolist()
    loss = F.cross_entropy(logits.bfloat16().flatten(0, 1), targets.flatten(), ignore_index=3)
    losses, tokens = sample_losses(loss, N)
    assert tokens.tolist() == counts
    np.testing.assert_allclose(losses.numpy(), alone, rtol=0.02)


def test_finds_the_loss_in_a_models_output():
    logits, targets, alone, _ = case()
    loss = FORMS["flat"](logits, targets)
    for output in ({"loss": loss}, (loss, logits), SimpleNamespace(loss=loss, logits=logits)):
        np.testing.assert_allclose(sample_losses(output, N)[0].numpy(), alone, rtol=1e-5)


def test_says_none_when_the_losses_cannot_be_told():
    logits, targets, _, _ = case()
    flat, labels = logits.flatten(0, 1), targets.flatten()
    mask = torch.rand(N * T)
    unknown = {
        "no graph": FORMS["flat"](logits.detach(), targets),
        "no cross entropy": logits.square().mean(),
        "does not divide": F.cross_entropy(flat[:-1], labels[:-1]),
        "class weights": F.cross_entropy(flat, labels, weight=torch.ones(V)),
        "weights of a width of their own": (F.cross_entropy(flat, labels, reduction="none").view(N, 2, 3) * mask[:3]).sum(),
        "weights that are learned": (F.cross_entropy(flat, labels, reduction="none") * logits.mean((1, 2)).repeat(T)).sum(),
        "smoothed": F.cross_entropy(flat, labels, reduction="none", label_smoothing=0.1).mean(),
        "not a scalar": logits,
        "nothing": None,
        "empty": (),
        "no loss": {},
    }
    for why, output in unknown.items():
        assert sample_losses(output, N) is None, why


@pytest.mark.parametrize("ignore", [-100, 3])
@pytest.mark.parametrize("kind", ["mask", "weights", "boolean"])
def test_a_loss_mask_of_the_jobs_own_is_honoured(ignore, kind):
    logits, targets, _, _ = case(ignore)
    mask = torch.rand(N, T) if kind == "weights" else torch.rand(N, T) < 0.6
    mask[1], mask[2] = (True, False) if kind == "boolean" else (1, 0)  # a sample whose every token counts, and one without any
    mask = mask if kind != "mask" else mask.float()
    weight = mask.float() * (targets != ignore)
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=ignore, reduction="none").view(N, T)
    alone = torch.stack([(each[i] * weight[i]).sum() / weight[i].sum() for i in range(N)])
    forms = {
        "flat": lambda: (
            (
                F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=ignore, reduction="none") * mask.flatten()
            ).sum()
            / mask.sum()
        ),
        "rows": lambda: (F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=ignore, reduction="none") * mask).sum(),
        "the mask first": lambda: 2 * (mask * each).sum() / mask.sum(),
        "and sample weights": lambda: ((each * mask).sum(1) / mask.sum(1).clamp(min=1) * torch.rand(N)).mean(),
    }
    for name, form in forms.items():
        losses, tokens = sample_losses(form(), N)
        np.testing.assert_allclose(losses.numpy(), alone.detach().numpy(), rtol=1e-5, err_msg=name)
        assert tokens.tolist() == (weight != 0).sum(1).tolist(), name
        assert losses.isnan().tolist() == [False, False, True, False]


def test_does_not_keep_the_graph_alive():
    class Sentinel:
        pass

    logits, targets, _, _ = case()
    hidden, sentinel = logits * 2, Sentinel()
    hidden.register_hook(lambda grad, sentinel=sentinel: None)  # lives as long as the node behind ``hidden``
    node = weakref.ref(sentinel)
    loss = FORMS["flat"](hidden, targets)
    found = sample_losses(loss, N)
    del hidden, sentinel
    gc.collect()
    assert node() is not None
    del loss
    gc.collect()
    assert node() is None and found is not None and not found[0].requires_grad


class CheckpointedHead(nn.Module):
    """Head and loss inside a checkpoint: reading the saved log-probabilities makes them be computed again."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, V)

    def forward(self, x, y):
        def tail(h):
            return F.cross_entropy(self.head(h).flatten(0, 1), y.flatten())

        return checkpoint(tail, x, use_reentrant=False)


def test_reading_a_checkpointed_loss_does_not_capture_twice():
    _, targets, _, counts = case()
    model, x = CheckpointedHead(), torch.randn(N, T, 5, requires_grad=True)
    found = []
    for look in (True, False):
        with Sketcher(select_layers(model, ["head"]), 0) as sketcher:
            capture = sketcher.begin(np.arange(N))
            loss = model(x, targets)
            if look:
                sketcher.observe_loss(loss)
                assert capture.tokens.tolist() == counts
            sketcher.end()
            loss.backward()
            found.append(sketcher.finish(capture, tokens=np.array(counts)))
    np.testing.assert_allclose(found[0].sketch, found[1].sketch, rtol=1e-6)
