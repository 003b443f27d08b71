"""The whitened trusted basis against dense linear algebra, on layers so narrow that the sketches of their moments are exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grace_ds.errors import DataError
from grace_ds.gradients.hooks import Sketcher
from grace_ds.gradients.kfac import Moment, MomentAccumulator, whiten
from grace_ds.gradients.layers import select_layers
from grace_ds.gradients.probe import probe_basis, probe_rows
from tests.unit.narrow import NAMES, Narrow, cycles, direction, gradient, influences, moments

POOL, TRUSTED = cycles(40, 1, 0.8), cycles(12, 2, 0.1)
ALL = [*NAMES, "idle"]


def loss_of(model, batch):
    return model(batch)


def batches(tokens, rows):
    return [(np.arange(len(part)), part) for part in tokens.split(rows)]


@pytest.fixture
def model():
    return Narrow()


def sketcher_of(model, rank=16, names=NAMES):
    return Sketcher(select_layers(model, names), 7, rank=rank, dim=64)


def accumulated(model, sketcher, parts, rank=32):
    target = MomentAccumulator(sketcher.layers, 7, rank)
    probe_basis(model, parts, loss_of, sketcher, target)
    return target


def basis_of(model, sketcher, version=0):
    target = sketcher.accumulator(sketcher.rank)
    probe_basis(model, batches(TRUSTED, 5), loss_of, sketcher, target)
    return target.fit(target.pack(), version)


def dense(moment):
    return moment.vectors * moment.values @ moment.vectors.T + moment.rest * np.eye(len(moment.vectors))


def close(found, wanted, share=1e-3):
    assert np.linalg.norm(found - wanted) < share * np.linalg.norm(wanted)


def test_moments_of_a_narrow_layer_are_exact(model):
    with sketcher_of(model) as sketcher:
        target = accumulated(model, sketcher, batches(POOL, 16))
    found, wanted = target.fit(target.pack()), moments(model, POOL)
    assert sorted(found) == NAMES
    for name in NAMES:
        for mine, exact in zip(found[name], wanted[name], strict=True):
            close(dense(mine), exact + 0.1 * np.trace(exact) / len(exact) * np.eye(len(exact)))


@pytest.mark.parametrize("rank", [4, 8, 16])
def test_the_whitened_gradient_is_divided_from_both_sides(model, rank):
    """Narrower than the basis, as wide, and wider: where factors are fewer than the width, of what the basis holds."""
    with sketcher_of(model, rank) as sketcher:
        target = accumulated(model, sketcher, batches(POOL, 16))
        raw = basis_of(model, sketcher, version=5)
    sigma = {"first": 0.5, "second": 3.0}
    found = whiten(raw, target.fit(target.pack()), sigma)
    assert found.version == 5
    second = moments(model, POOL)
    for name in NAMES:
        u, s, v = (x.astype(float) for x in raw.factors[name])
        if rank == 16:
            close(u * s @ v.T, gradient(model, TRUSTED)[name])
        a, b = (m + 0.1 * np.trace(m) / len(m) * np.eye(len(m)) for m in second[name])
        wanted = np.linalg.solve(a, u * s @ v.T) @ np.linalg.inv(b)
        left, strength, right = found.factors[name]
        assert [x.shape for x in (left, strength, right)] == [x.shape for x in raw.factors[name]]
        assert {x.dtype for x in (left, strength, right)} == {np.dtype(np.float32)}
        close(left * strength.astype(float) @ right.T, wanted * sigma[name] ** 2)
        kept = strength > 0
        for side in (left[:, kept], right[:, kept]):
            np.testing.assert_allclose(side.T @ side, np.eye(kept.sum()), atol=1e-4)


def test_alignment_times_length_is_the_influence(model):
    """Whatever the layers' scale, up to the direction's own length."""
    samples = cycles(9, 3, 0.4)
    with sketcher_of(model) as sketcher:
        probe_rows(model, batches(POOL, 10), loss_of, sketcher)
        sketcher.scale.freeze(sketcher.scale.sums())
        sigma = sketcher.scale.by_name()
        target = accumulated(model, sketcher, batches(POOL, 16))
        sketcher.set_basis(whiten(basis_of(model, sketcher), target.fit(target.pack()), sigma))
        rows = probe_rows(model, batches(samples, 4), loss_of, sketcher)
    found = np.concatenate([r.influence.astype(float) * r.norm for r in rows])
    wanted = influences(model, samples, direction(model, POOL, TRUSTED), sigma)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


def test_batches_may_be_spread_over_ranks_and_cut_anywhere(model):
    with sketcher_of(model) as sketcher:
        whole = accumulated(model, sketcher, batches(POOL, 40)).pack()
        halves = [accumulated(model, sketcher, batches(part, 7)) for part in (POOL[:11], POOL[11:])]
    np.testing.assert_allclose(halves[0].pack() + halves[1].pack(), whole, rtol=1e-4, atol=1e-6 * np.abs(whole).max())


def test_division_is_by_the_dense_moment():
    rng = np.random.default_rng(0)
    vectors, _ = np.linalg.qr(rng.normal(size=(20, 6)))
    moment = Moment(vectors, np.array([9.0, 4, 2, 1, 0.1, 0]), 0.3)
    x = rng.normal(size=(20, 3))
    np.testing.assert_allclose(moment.solve(x), np.linalg.solve(dense(moment), x), rtol=1e-10)


@pytest.mark.parametrize("rank", [2, 5, 9])
def test_a_low_rank_keeps_the_trace(model, rank):
    with sketcher_of(model) as sketcher:
        target = accumulated(model, sketcher, batches(POOL, 16), rank)
    found, wanted = target.fit(target.pack()), moments(model, POOL)
    for name in NAMES:
        for mine, exact in zip(found[name], wanted[name], strict=True):
            mean = np.trace(exact) / len(exact)
            assert len(mine.values) == rank
            assert np.trace(dense(mine)) - 0.1 * mean * len(exact) == pytest.approx(np.trace(exact), rel=1e-4)
            assert (mine.values >= 0).all() and mine.rest > 0
            assert mine.values[0] <= np.linalg.eigvalsh(exact)[-1] * 1.001  # a sketch never finds more than there is
            np.testing.assert_allclose(mine.vectors.T @ mine.vectors, np.eye(rank), atol=1e-8)


def test_a_moment_of_few_directions_is_found_by_a_sketch_of_few(model):
    with torch.no_grad():  # tokens that differ along three directions only
        model.tokens.weight[:] = torch.randn(20, 3) @ torch.randn(3, 12)
    with sketcher_of(model) as sketcher:
        target = accumulated(model, sketcher, batches(POOL, 16), rank=6)
    found, exact = target.fit(target.pack())["first"][0], moments(model, POOL)["first"][0]
    np.testing.assert_allclose(np.sort(found.values)[-3:], np.linalg.eigvalsh(exact)[-3:], rtol=1e-4)
    close(dense(found), exact + 0.1 * np.trace(exact) / 12 * np.eye(12))


def test_a_layer_that_is_never_reached_is_left_out(model):
    with sketcher_of(model, names=ALL) as sketcher:
        target = accumulated(model, sketcher, batches(POOL, 16))
        raw = basis_of(model, sketcher)
        second = target.fit(target.pack())
        assert sorted(second) == NAMES
        found = whiten(raw, {"first": second["first"]}, dict.fromkeys(ALL, 1.0))
        for name in ("second", "idle"):
            assert not found.factors[name][1].any()
            assert [x.shape for x in found.factors[name]] == [x.shape for x in raw.factors[name]]
        assert found.factors["first"][1].any()
        sketcher.set_basis(found)
        rows = probe_rows(model, batches(TRUSTED, 12), loss_of, sketcher)
    assert np.isfinite(rows[0].influence).all()


def test_an_input_without_a_gradient_gives_no_moment(model):
    with sketcher_of(model) as sketcher:
        target = MomentAccumulator(sketcher.layers, 7)
        sketcher.route(target)
        model(POOL)
        sketcher.end()
    assert target.fit(target.pack()) == {}


def test_sums_that_are_not_finite_are_an_error(model):
    with torch.no_grad():
        model.head.weight[3, 2] = np.nan
    with sketcher_of(model) as sketcher:
        target = accumulated(model, sketcher, batches(POOL, 16))
    with pytest.raises(DataError, match=r"not finite.*recipe: content"):
        target.fit(target.pack())


def test_the_bytes_held_are_counted_and_given_back(model):
    with sketcher_of(model) as sketcher:
        before = sketcher.peak_bytes
        target = sketcher.moments()
        probe_basis(model, batches(POOL, 16), loss_of, sketcher, target)
        assert sketcher.peak_bytes - before == 32 * 4 * (12 + 16 + 16 + 12)
        target.close()
        sketcher.reset_peak()
        assert sketcher.peak_bytes == before
