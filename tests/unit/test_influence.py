"""What content tells of influences, on a window whose good and bad samples are known."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from grace_ds.comm.local import LocalComm
from grace_ds.features.content import ContentFeatures
from grace_ds.features.quality import STATISTICS
from grace_ds.records import HIDDEN, SampleRecords
from grace_ds.refresh.influence import TOLERANCE, Influence, enough_labels, labels, predict_influence
from grace_ds.selection.ridge import columns

N, M = 4000, 200


def area(good: np.ndarray, bad: np.ndarray) -> float:
    """The chance that one of ``good`` exceeds one of ``bad``."""
    return float((good[:, None] > bad[None, :]).mean())


class Window:
    """Good samples have two statistics of one sign, bad ones of opposite signs: neither alone tells them apart."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.good = rng.random(N) < 0.5
        self.statistics = rng.normal(size=(N, 5)).astype(np.float32)
        side = np.sign(rng.normal(size=N))
        self.statistics[:, 0] += 2.5 * side
        self.statistics[:, 3] += 2.5 * side * np.where(self.good, 1, -1)
        self.density = rng.integers(0, 3, N).astype(np.float32)
        self.label = (np.where(self.good, 1.0, 0.2) + rng.normal(0, 1.5, N)).astype(np.float32)
        self.label[rng.random(N) < 0.3] = np.nan
        self.confidence = 0.7 ** rng.integers(0, 3, N)
        trusted = rng.normal(size=(M, 5))
        trusted[:, [0, 3]] += 2.5 * np.sign(rng.normal(size=(M, 1)))
        self.trusted = trusted.astype(np.float32)

    def content(self, at: Any = slice(None)) -> ContentFeatures:
        return ContentFeatures(np.arange(N)[at], self.density[at], None, self.statistics[at], None)

    def found(self, label: np.ndarray | None = None) -> Influence:
        label = self.label if label is None else label
        found = predict_influence(LocalComm(5.0), self.content(), self.trusted, label, self.confidence)
        assert found is not None
        return found


@pytest.mark.parametrize("seed", range(3))
def test_predictions_tell_groups_apart_that_single_labels_do_not(seed: int) -> None:
    w = Window(seed)
    known = np.isfinite(w.label)
    assert area(w.label[w.good & known], w.label[~w.good & known]) < 0.75
    found = w.found()
    for some in (known, ~known):  # those never collected too
        assert area(found.fit.predicted[w.good & some], found.fit.predicted[~w.good & some]) > 0.95


def test_the_measure_is_the_trusted_samples_own_spread() -> None:
    w = Window()
    w.statistics[:M], w.density[:M] = w.trusted, 0  # samples of the pool that are the trusted ones
    found = w.found()
    among = found.standard(found.fit.predicted[:M])
    assert np.median(among) == pytest.approx(0, abs=0.3)  # centre and deviation are of the lower tail
    assert (among < -1.5).mean() == pytest.approx(0.067, abs=1 / M)  # as of a normal distribution in standard deviations
    rest = found.standard(found.fit.predicted[M:])
    assert np.median(rest[w.good[M:]]) > -1 and np.median(rest[~w.good[M:]]) < -1.5


def test_predictions_that_are_all_alike_have_a_least_deviation() -> None:
    w = Window()
    w.statistics[:], w.trusted[:] = 0, 0
    w.density[:] = 0
    found = w.found()
    assert found.deviation == 0.02
    assert (found.standard(found.fit.predicted) == 0).all()


@pytest.mark.parametrize(("factor", "shift"), [(1.0, 0.75), (1.0, -1.5), (0.5, 0.0), (0.5, 2.0)])
def test_drift_common_to_all_changes_nothing(factor: float, shift: float) -> None:
    w = Window()
    w.label = np.clip(w.label, -3, 3)  # so that none is pulled in after it has moved
    here, there = w.found(), w.found((factor * w.label + shift).astype(np.float32))
    np.testing.assert_allclose(there.fit.predicted, factor * here.fit.predicted + shift, atol=1e-3)
    np.testing.assert_allclose(there.standard(there.fit.predicted), here.standard(here.fit.predicted), atol=0.02)
    assert there.deviation > 0.02


class Ranks:
    """A sum over threads that stand for ranks; every wait has a limit."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=30)
        self.parts: dict[int, np.ndarray] = {}

    def allreduce(self, x: np.ndarray) -> Any:
        self.parts[threading.get_ident()] = x
        self.barrier.wait()
        total = sum(self.parts.values())
        self.barrier.wait()  # nobody begins the next sum before all have read this one
        return total


def test_the_same_bits_for_any_number_of_ranks() -> None:
    w, order = Window(), np.random.default_rng(1).permutation(N)
    shares = [order[:1000], order[1000:1001], order[:0], order[1001:]]
    comm: Any = Ranks(len(shares))
    out: dict[int, Influence | None] = {}

    def one(rank: int, at: np.ndarray) -> None:
        out[rank] = predict_influence(comm, w.content(at), w.trusted, w.label[at], w.confidence[at])

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(shares)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    whole = w.found()
    for rank, at in enumerate(shares):
        part = out[rank]
        assert part is not None and (part.centre, part.deviation) == (whole.centre, whole.deviation)
        assert part.fit.predicted.tobytes() == whole.fit.predicted[at].tobytes()
        assert (part.fit.labels, part.fit.explained) == (whole.fit.labels, whole.fit.explained)


# -- how much is known, and how much would be enough -----------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "share"), [(0.0, 1.0), (0.5, 0.8), (1.0, 0.5), (2.0, 0.2), (None, 0.0)])
def test_the_share_that_content_tells_is_the_true_one(noise: float | None, share: float) -> None:
    """Of labels that are one statistic and noise of a known size, or noise alone."""
    w, rng = Window(), np.random.default_rng(7)
    told = rng.normal(size=N)
    w.statistics[:, 2], w.density[:] = told, 0
    label = rng.normal(size=N) if noise is None else told + noise * rng.normal(size=N)
    found = w.found(label.astype(np.float32))
    assert found.fit.explained == pytest.approx(share, abs=0.04) and 0 <= found.fit.explained <= 1
    assert found.fit.labels == pytest.approx(w.confidence.sum(), rel=5e-3)
    half = found if noise is None else w.found(np.where(np.arange(N) % 2, label, np.nan).astype(np.float32))
    assert half.fit.explained == pytest.approx(share, abs=0.06)  # fewer labels, the same share


def test_a_few_labels_of_noise_are_not_taken_for_what_content_tells() -> None:
    """A fit to them would describe them well: what counts is how well it predicts others."""
    w, shares = Window(), []
    for seed in range(20):
        label = np.full(N, np.nan, np.float32)
        label[:120] = np.random.default_rng(seed).normal(size=120)
        shares.append(w.found(label).fit.explained)
    assert np.mean(shares) < 0.02


def test_one_label_tells_of_no_other() -> None:
    label = np.full(N, np.nan, np.float32)
    label[7] = 2.0
    found = Window().found(label)
    assert found.fit.explained == 0 and 0 < found.fit.labels <= 1


@pytest.mark.parametrize("explained", [0.15, 0.4])
def test_enough_labels_leave_a_tenth_of_what_is_told_to_the_error_of_the_fit(explained: float) -> None:
    """By least squares on made-up labels, whose true coefficients are known."""
    rng, p = np.random.default_rng(0), columns(STATISTICS + 1)
    n, excess = round(enough_labels(explained)), []
    for _ in range(60):
        coefficients = rng.normal(size=p)
        coefficients *= np.sqrt(explained) / np.linalg.norm(coefficients)
        x, fresh = rng.normal(size=(n, p)), rng.normal(size=(2000, p))
        y = x @ coefficients + np.sqrt(1 - explained) * rng.normal(size=n)
        fitted = np.linalg.lstsq(x, y, rcond=None)[0]
        excess.append((((fitted - coefficients) @ fresh.T) ** 2).mean())
    assert np.mean(excess) == pytest.approx(TOLERANCE * explained, rel=0.35)


def test_the_less_is_told_the_more_labels_are_needed() -> None:
    needed = [enough_labels(share) for share in (1.0, 0.9, 0.5, 0.1, 0.01, 0.0)]
    assert needed == sorted(needed) and needed[0] == 0 and needed[-1] == float("inf")


def test_nothing_to_learn_from_is_none() -> None:
    w, comm = Window(), LocalComm(5.0)
    bare = ContentFeatures(np.arange(N), w.density, None, None, None)
    assert predict_influence(comm, bare, w.trusted, w.label, w.confidence) is None
    assert predict_influence(comm, w.content(), None, w.label, w.confidence) is None
    assert predict_influence(comm, w.content(), w.trusted, np.full(N, np.nan, np.float32), w.confidence) is None
    assert predict_influence(comm, w.content(), w.trusted, w.label, np.zeros(N)) is None


def test_a_label_is_alignment_times_length_in_units_of_its_own_basis() -> None:
    rows = SampleRecords(
        ids=np.arange(7),
        sketch=np.ones((7, 2), np.float16),
        norm=np.array([2, 2, 4, 1, 1, 1, 1], np.float32),
        loss=np.zeros(7, np.float32),
        influence=np.array([0.25, -0.5, 0.25, np.nan, 0.5, 0.5, 0.5], np.float32),
        step=np.zeros(7, np.int64),
        basis=np.array([3, 3, 4, 3, 5, 6, -1], np.int32),
        hidden=np.zeros((7, HIDDEN), np.float16),
    )
    found = labels(rows, {3: 0.5, 4: 2.0, 5: 0.0, 7: 1.0, -1: float("nan")})
    np.testing.assert_array_equal(found, np.array([1, -2, 0.5, np.nan, np.nan, np.nan, np.nan], np.float32))
    assert found.dtype == np.float32
    assert np.isnan(labels(rows, {})).all() and np.isnan(labels(rows, {3: -0.5})).all()
    assert len(labels(SampleRecords.empty(2), {3: 0.5})) == 0
