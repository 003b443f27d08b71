"""The trusted probe: what each half of the trusted set is for, and when it is believed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from grace_ds.comm.local import LocalComm
from grace_ds.config.schema import CollectConfig
from grace_ds.errors import DataError
from grace_ds.gradients.collector import GradientCollector
from grace_ds.gradients.hooks import Sketcher
from grace_ds.gradients.influence_probe import InfluenceProbe, Probes, unit_of
from grace_ds.gradients.layers import select_layers
from grace_ds.gradients.passes import ModulePasses
from grace_ds.gradients.probe import probe_rows
from tests.unit.narrow import NAMES, Narrow, cycles, direction, influences


def test_the_standard_error_is_that_of_a_median() -> None:
    rng = np.random.default_rng(0)
    draws = (0.4 + 0.1 * rng.normal(size=(500, 200))).astype(np.float32)
    scatter = np.median(draws, axis=1).std()
    assert np.mean([unit_of(d)[1] for d in draws]) == pytest.approx(scatter, rel=0.1)


def test_the_unit_is_the_median_only_where_it_can_be_told_from_chance() -> None:
    rng = np.random.default_rng(0)
    clear = (0.4 + 0.1 * rng.normal(size=200)).astype(np.float32)
    assert unit_of(clear)[0] == pytest.approx(0.4, abs=0.03)
    assert unit_of(clear - np.float32(0.35))[0] > 0  # far within the scatter of single samples, but not of their median
    for useless in (clear - np.float32(0.4), -clear):  # at chance, against the trusted direction
        assert unit_of(useless)[0] == 0
    chance = rng.normal(size=(1000, 64)).astype(np.float32)
    assert np.mean([unit_of(c)[0] > 0 for c in chance]) < 0.06  # beyond two standard errors, on one side
    assert np.mean([unit_of(c + np.float32(0.8))[0] > 0 for c in chance]) > 0.99


class Reads:
    """A dataset that notes which items are read."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows, self.read = rows, []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> torch.Tensor:
        self.read.append(i)
        return self.rows[i]


POOL = cycles(40, 1, 0.8)


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(batch)
    return found


def probe_of(model: Narrow, sketcher: Sketcher, trusted: Reads, each: int = 64, window: Reads | None = None) -> InfluenceProbe:
    halves = np.arange(0, 24, 2), np.arange(1, 24, 2)
    pool = window or Reads(POOL)
    passes = ModulePasses(
        model, GradientCollector(sketcher, CollectConfig()), torch.stack, 5, torch.device("cpu"), loss, LocalComm(5.0)
    )
    return InfluenceProbe(passes, sketcher, trusted, halves, pool, LocalComm(5.0), 3, Probes(each, each, each))


def scaled_sketcher(model: Narrow) -> Sketcher:
    sketcher = Sketcher(select_layers(model, NAMES), 7, rank=16, dim=64).attach()
    probe_rows(model, [(np.arange(40), POOL)], lambda m, b: m(b), sketcher)
    sketcher.scale.freeze(sketcher.scale.sums())
    return sketcher


def test_the_losses_of_trusted_samples_are_those_of_each_alone_and_what_judges_gives_none() -> None:
    model, data = Narrow(), cycles(24, 2, 0.1)
    trusted, fit = Reads(data), np.arange(0, 24, 2)
    with scaled_sketcher(model) as sketcher, torch.no_grad():
        found = probe_of(model, sketcher, trusted).losses(version=3)
        alone = [float(model(row[None])) for row in data[fit]]
    assert sorted(trusted.read) == fit.tolist()
    np.testing.assert_allclose(np.sort(found), np.sort(alone), rtol=1e-5)
    assert found.dtype == np.float32 and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("version", [0, 1, 2])
def test_one_half_fits_the_direction_and_the_other_gives_the_unit(version: int) -> None:
    model, data = Narrow(), cycles(24, 2, 0.1)
    trusted, window = Reads(data), Reads(POOL)
    fit, judge = np.arange(0, 24, 2), np.arange(1, 24, 2)  # at every version: what judges has chosen nothing
    with scaled_sketcher(model) as sketcher:
        probe = probe_of(model, sketcher, trusted, window=window)
        found = probe.fit(version, np.arange(10, 40))
        basis, unit = found.basis, found.unit
        assert probe.gradient is None  # nothing is taken over yet
        sigma = sketcher.scale.by_name()
        assert sketcher.basis is None
    assert sorted(trusted.read[:12]) == fit.tolist() and sorted(trusted.read[12:]) == judge.tolist()
    assert sorted(window.read) == list(range(10, 40))
    assert probe.probed == 12 + 12 + 30
    along = direction(model, POOL[10:], data[fit])
    assert basis.version == version
    for name in NAMES:
        u, s, v = basis.factors[name]
        wanted = along[name] * sigma[name] ** 2
        assert np.linalg.norm(u * s @ v.T - wanted) < 1e-3 * np.linalg.norm(wanted)
    assert unit == pytest.approx(np.median(influences(model, data[judge], along, sigma)), rel=1e-3)
    assert unit > 0


def test_halves_that_do_not_agree_give_no_unit(caplog: pytest.LogCaptureFixture) -> None:
    model, data = Narrow(), cycles(24, 2, 0.1)
    data[1::2] = cycles(12, 4, 0.0).flip(1)  # the other half runs backwards
    model_of = dict(model.named_parameters())
    with scaled_sketcher(model) as sketcher, caplog.at_level("INFO", logger="grace_ds"):
        assert probe_of(model, sketcher, Reads(data)).fit(0, np.arange(40)).unit == 0
    assert "left out: the trusted halves do not agree" in caplog.text
    assert all(p.grad is None for p in model_of.values())


def test_a_probe_draws_as_many_as_it_may_and_others_each_time() -> None:
    model, trusted, window = Narrow(), Reads(cycles(24, 2, 0.1)), Reads(POOL)
    with scaled_sketcher(model) as sketcher:
        probe = probe_of(model, sketcher, trusted, each=6, window=window)
        for version in (0, 2, 2):
            probe.fit(version, np.arange(40))
    first, second, again = (trusted.read[i : i + 12] for i in (0, 12, 24))
    assert first != second == again
    assert all(len(set(read[:6])) == len(set(read[6:])) == 6 for read in (first, second))
    assert len(window.read) == 18 and window.read[:6] != window.read[6:12] == window.read[12:]


def test_trusted_samples_without_a_finite_gradient_say_what_to_do() -> None:
    model = Narrow()
    with scaled_sketcher(model) as sketcher:
        probe = probe_of(model, sketcher, Reads(cycles(24, 2, 0.1)))
        with torch.no_grad():
            model.head.bias[2] = np.inf
        with pytest.raises(DataError, match="recipe: content"):
            probe.fit(0, np.arange(40))
        assert sketcher.basis is None


def test_the_probe_stays_within_its_share() -> None:
    large = Probes.of(0.03, 500, 2048)
    assert large.pool + large.fit + large.judge == 768  # of a million: a few hundred samples are enough
    assert large.fit > large.judge > large.pool > 64
    small = Probes.of(0.1, 80, 32)
    assert small.pool + small.fit + small.judge == 256  # 10 % of 2,560
    assert Probes.of(0.03, 4, 8) == Probes(16, 16, 16)  # a toy: fewer would fit nothing


def test_a_gradient_goes_on_from_earlier_ones_the_less_the_older_they_are() -> None:
    model, first, second = Narrow(), cycles(24, 2, 0.1), cycles(24, 5, 0.1)
    with scaled_sketcher(model) as sketcher:
        probe = probe_of(model, sketcher, Reads(first))
        probe.gradient = old = probe.fit(3, np.arange(40)).gradient
        probe.dataset = Reads(second)
        later, much_later = (probe.fit(version, np.arange(40)).gradient for version in (4, 6))
        probe.gradient = None
        alone = probe.fit(4, np.arange(40)).gradient
    for name in NAMES:
        dense = [u * s @ v.T for u, s, v in (g.factors[name] for g in (old, alone, later, much_later))]
        np.testing.assert_allclose(dense[2], dense[1] + 0.8 * dense[0], atol=1e-4 * np.abs(dense[1]).max())
        np.testing.assert_allclose(dense[3], dense[1] + 0.8**3 * dense[0], atol=1e-4 * np.abs(dense[1]).max())
    assert later.version == 4
