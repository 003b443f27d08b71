from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from grace_ds.gradients.projection import Fold, bases, fold_table, layout, per_sample, signs


def folded(gradients, seed, rank, dim):
    """(n, dim) sketches of full gradients: name → (n, inputs, outputs)."""
    names = list(gradients)
    parts, units = [], []
    for name, g in gradients.items():
        p_in, p_out, unit = bases(name, seed, rank, *g.shape[1:])
        parts.append(np.einsum("ri,nio,so->nrs", p_in, g, p_out).reshape(len(g), -1))
        units.append(unit)
    coordinates = torch.from_numpy(np.stack(parts, 1).astype(np.float32))
    return Fold(names, seed, rank, dim)(coordinates, torch.tensor(units, dtype=torch.float32)).double().numpy()


@pytest.mark.parametrize(("rank", "dim"), [(4, 64), (6, 16)])
def test_squared_length_and_inner_product_are_unbiased(rank, dim):
    rng = np.random.default_rng(0)
    full = {"a": rng.normal(size=(2, 12, 20)), "b": rng.normal(size=(2, 7, 5))}
    full["b"][0] = np.outer(rng.normal(size=7), rng.normal(size=5))  # of rank one, and spiky
    full["b"][1] = full["b"][0] * 0.9
    truth = sum(np.einsum("nij,mij->nm", g, g) for g in full.values())
    draws = np.stack([s @ s.T for s in (folded(full, seed, rank, dim) for seed in range(1500))])
    allowed = 5 * draws.std(0) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(0) - truth) < allowed).all()
    assert (allowed < 0.15 * np.abs(truth).max()).all(), "the test would accept anything"


def test_bases_are_a_function_of_name_and_seed_alone():
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = signs("blocks.2.up", 7, "in", (8, 96))
    again = hashlib.sha256(np.sign(first).astype("i1").tobytes()).hexdigest()[:16]
    assert again == "03b277e77eef9c29", "the bases moved: sketches in old checkpoints would no longer compare"
    assert torch.equal(state[0], torch.get_rng_state()) and np.array_equal(state[1], np.random.get_state()[1])
    for other in (("blocks.2.down", 7, "in"), ("blocks.2.up", 8, "in"), ("blocks.2.up", 7, "out")):
        assert 0.3 < (signs(*other, (8, 96)) == first).mean() < 0.7
    assert torch.equal(torch.from_numpy(first).to(torch.float16).float(), torch.from_numpy(first))


def test_fold_table_is_balanced():
    source, sign = fold_table("x", 3, 8, 256)
    assert sorted(source[source < 64]) == list(range(64)) and (np.abs(sign) == (source < 64)).all()
    source, _ = fold_table("x", 3, 8, 24)  # 64 coordinates into 24 buckets
    load = (source.reshape(-1, 24) < 64).sum(0)
    assert load.sum() == 64 and load.max() <= 3


def test_layouts():
    assert layout((4, 6, 5), 4) == (6, False)
    assert layout((24, 5), 4) == (6, False)
    assert layout((4, 5), 4) == (1, False)
    assert layout((8, 6, 5), 4) == (12, False)
    assert layout((8, 4, 5), 4) == (8, True)
    assert layout((5,), 1) == (1, False)
    assert layout((6, 5, 5), 4) is None
    assert layout((6, 5), 4) is None
    assert layout((0, 5), 4) is None


def test_per_sample_follows_the_layout():
    x = torch.randn(4, 6, 3)
    truth = x.transpose(1, 2)
    assert torch.equal(per_sample(x.reshape(24, 3).t(), 4, (6, False)), truth)
    assert torch.equal(per_sample(x.transpose(0, 1).reshape(24, 3).t().contiguous(), 4, (6, True)), truth)
