from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from grace_ds.errors import CheckpointError, DataError
from grace_ds.gradients.basis import TrustedBasis
from grace_ds.gradients.hooks import Sketcher
from grace_ds.gradients.layers import select_layers
from grace_ds.gradients.probe import probe_basis, probe_rows
from tests.models import TinyGPT, text
from tests.oracles import batch_of_one_gradients

NAMES = ["blocks.1.qkv", "blocks.1.out", "blocks.1.up", "blocks.1.down"]


def loss_of(model, batch):
    return model(batch)


def full_gradients(model, batch):
    weights = {name: model.get_submodule(name).weight for name in NAMES}
    return batch_of_one_gradients(model, weights, batch, loss_of)


def test_factors_of_low_rank_plus_noise_match_the_exact_svd():
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.normal(size=(60, 5)))
    v, _ = np.linalg.qr(rng.normal(size=(90, 5)))
    exact = u * np.array([10, 8, 6, 4, 2.0]) @ v.T + 0.003 * rng.normal(size=(60, 90))
    model = nn.Sequential(nn.Linear(60, 90, bias=False))
    # inputs are unit vectors and the loss is linear, so that the sum of a gᵀ is the matrix itself
    with Sketcher(select_layers(model, ["0"]), 1) as sketcher:
        halves = [sketcher.accumulator(rank=5) for _ in range(2)]
        for half, rows in zip(halves, (slice(0, 25), slice(25, 60)), strict=True):
            sketcher.route(half)
            out = model(torch.eye(60)[rows])
            sketcher.end()
            (out * torch.from_numpy(exact[rows]).float()).sum().backward()
        basis = halves[0].fit(halves[0].pack() + halves[1].pack(), version=3)
    left, s, right = basis.factors["0"]
    best_u, best_s, best_v = np.linalg.svd(exact)
    best = best_u[:, :5] * best_s[:5] @ best_v[:5]
    np.testing.assert_allclose(s, best_s[:5], rtol=0.03)
    assert np.linalg.norm(left * s @ right.T - exact) < 3 * np.linalg.norm(best - exact)
    np.testing.assert_allclose(left.T @ left, np.eye(5), atol=1e-5)
    np.testing.assert_allclose(right.T @ right, np.eye(5), atol=1e-5)
    assert basis.version == 3


def test_small_layer_and_unseen_layer_are_padded_with_zeros():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    with Sketcher(select_layers(model, ["*"]), 1) as sketcher:
        target = sketcher.accumulator(rank=8)
        sketcher.route(target)
        out = model[0](torch.randn(10, 3))
        (out * torch.randn(10, 4)).sum().backward()
        basis = target.fit(target.pack(), 0)
    truth = model[0].weight.grad.numpy().T
    u, s, v = basis.factors["0"]
    assert u.shape == (3, 8) and v.shape == (4, 8) and (s[3:] == 0).all()
    np.testing.assert_allclose(u * s @ v.T, truth, atol=1e-5)
    assert not basis.factors["1"][1].any()


def test_alignment_is_the_cosine_with_the_trusted_gradient():
    torch.manual_seed(0)
    model = TinyGPT(depth=2)
    trusted, pool = text(6, seed=1), text(9, seed=2)
    truth = full_gradients(model, trusted)
    total = {name: sum(g[name] for g in truth) for name in NAMES}
    with Sketcher(select_layers(model), 5, rank=48, dim=4096) as sketcher:  # wide: its length is nearly the exact norm
        probe_rows(model, [(np.arange(9), pool)], loss_of, sketcher)
        sketcher.scale.freeze(sketcher.scale.sums())
        sigma = sketcher.scale.by_name()
        target = sketcher.accumulator(rank=16)
        probe_basis(model, [(np.arange(1), trusted[i : i + 1]) for i in range(6)], loss_of, sketcher, target)
        sketcher.set_basis(target.fit(target.pack(), version=4))
        found = probe_rows(model, [(np.arange(4), pool[:4]), (np.arange(5), pool[4:])], loss_of, sketcher)
    influence = np.concatenate([f.influence for f in found])

    def inner(x, y):
        return sum((x[name] * y[name]).sum() / sigma[name] ** 2 for name in NAMES)

    exact = [inner(g, total) / np.sqrt(inner(g, g) * inner(total, total)) for g in full_gradients(model, pool)]
    assert found[0].basis == 4
    assert np.std(exact) > 0.02 and np.corrcoef(influence, exact)[0, 1] > 0.95
    np.testing.assert_allclose(influence, exact, atol=0.15 * np.abs(exact).max())


def test_basis_keeps_the_sketches_and_bindings_keep_their_basis():
    torch.manual_seed(0)
    model, batch = TinyGPT(depth=2), text(4)
    with Sketcher(select_layers(model), 5) as sketcher:
        plain = probe_rows(model, [(np.arange(4), batch)], loss_of, sketcher)[0]
        target = sketcher.accumulator()
        probe_basis(model, [(np.arange(4), batch)], loss_of, sketcher, target)
        basis = target.fit(target.pack(), version=0)
        target.close()
        sketcher.set_basis(basis)
        capture = sketcher.begin(np.arange(4))
        loss = model(batch)
        sketcher.observe_loss(loss)
        sketcher.set_basis(None)
        loss.backward()
        found = sketcher.finish(capture)
    assert found.basis == 0 and np.isfinite(found.influence).all() and np.isnan(plain.influence).all()
    np.testing.assert_allclose(found.sketch, plain.sketch, atol=1e-5 * plain.norm.max())
    assert sketcher._meter.now == 0


def test_unusable_sums_and_torn_arrays_are_refused():
    model = TinyGPT(depth=2)
    target = Sketcher(select_layers(model), 5).accumulator()
    packed = target.pack()
    for bad in (packed, packed[:-1] + 1, packed + np.nan):
        with pytest.raises(DataError, match="trusted samples give a finite loss, or set trusted: null"):
            target.fit(bad, 0)
    basis = target.fit(np.random.default_rng(0).normal(size=len(packed)), 7)
    arrays = basis.to_arrays()
    again = TrustedBasis.from_arrays(7, arrays)
    assert again.version == 7 and list(again.factors) == NAMES
    for name in NAMES:
        for x, y in zip(again.factors[name], basis.factors[name], strict=True):
            assert np.array_equal(x, y)
    del arrays["blocks.1.up/V"]
    with pytest.raises(CheckpointError, match=r"lacks 'blocks.1.up/V'"):
        TrustedBasis.from_arrays(7, arrays)


@pytest.mark.parametrize(("inputs", "outputs"), [(12, 9), (5, 3)])
def test_a_sum_of_two_gradients_is_the_best_of_as_many_factors(inputs: int, outputs: int) -> None:
    draw, rank = np.random.default_rng(0), 4

    def made() -> TrustedBasis:
        u, s, v = np.linalg.svd(draw.normal(size=(inputs, outputs)), full_matrices=False)
        pad = max(0, rank - len(s))
        parts = (np.pad(u[:, :rank], ((0, 0), (0, pad))), np.pad(s[:rank], (0, pad)), np.pad(v[:rank].T, ((0, 0), (0, pad))))
        return TrustedBasis(2, {"layer": tuple(p.astype(np.float32) for p in parts)})  # type: ignore[dict-item]

    a, b = made(), made()
    dense = [f[0] * f[1] @ f[2].T for f in (a.factors["layer"], b.factors["layer"])]
    u, s, v = np.linalg.svd(dense[0] + 0.5 * dense[1])
    wanted = u[:, : len(s)][:, :rank] * s[:rank] @ v[:rank]
    found = a.plus(b, 0.5).factors["layer"]
    assert [x.shape for x in found] == [(inputs, rank), (rank,), (outputs, rank)]
    np.testing.assert_allclose(found[0] * found[1] @ found[2].T, wanted, atol=1e-5)
