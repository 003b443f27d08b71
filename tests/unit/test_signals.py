"""What a refresh believes of each sample, against the minimum of an energy over all samples of a window at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from grace_ds.comm.local import LocalComm
from grace_ds.config.schema import GraceConfig, GraphConfig, RefreshConfig
from grace_ds.data.order import SamplerOrder
from grace_ds.data.pool import Pool
from grace_ds.data.schedule import VisitCounts
from grace_ds.features.content import ContentFeatures
from grace_ds.features.limits import Limits
from grace_ds.graph.repair import follow
from grace_ds.records import HIDDEN, Losses, SampleRecords, Signals
from grace_ds.refresh.line import rows_of
from grace_ds.refresh.signals import Estimate, RefreshContext, RefreshInputs, estimate
from grace_ds.refresh.table import Table
from grace_ds.selection.guard import CLEAN, DOWN, Decision

N, D, K, STEP, INTERVAL = 60, 10, 6, 20, 5
REFERENCE = {0: 0.5, 1: 2.0}


def window(seed: int, measured: int = 38) -> tuple[np.ndarray, SampleRecords]:
    """Content vectors in clusters, and rows of some of the samples: fresh ones, and up to three intervals old."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(8, D))[draw.integers(0, 8, N)] + 0.6 * draw.normal(size=(N, D))
    x[[4, 31]] = 0  # without tokens: near to nobody
    ids = np.sort(draw.choice(N, measured, replace=False)).astype(np.int64)
    rows = SampleRecords(
        ids=ids,
        sketch=draw.normal(size=(measured, 4)).astype(np.float16),
        norm=draw.uniform(0.5, 2, measured).astype(np.float32),
        loss=np.where(draw.random(measured) < 0.2, np.nan, draw.normal(2, 3, measured)).astype(np.float32),
        influence=np.where(draw.random(measured) < 0.2, np.nan, draw.normal(0.4, 0.3, measured)).astype(np.float32),
        step=draw.integers(STEP - 3 * INTERVAL, STEP + 1, measured).astype(np.int64),
        basis=draw.integers(-1, 3, measured).astype(np.int32),
        hidden=np.zeros((measured, HIDDEN), np.float16),
    )
    return (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)).astype(np.float32), rows


def estimated(
    x: np.ndarray | None,
    rows: SampleRecords,
    reference: dict[int, float],
    statistics: np.ndarray | None = None,
    trusted: np.ndarray | None = None,
    ablate: tuple[str, ...] = (),
    decision: Decision | None = None,
    version: int = 0,
    read: Losses | None = None,
    loss_limits: Limits | None = None,
    **graph: Any,
) -> Estimate:
    """The product's own answer on one rank, over the graph of the content alone."""
    edges = GraphConfig(**{"k": K, "shrink": 0.8, "decay": 0.6, "hops": 1, **graph})
    refresh = RefreshConfig(interval_steps=INTERVAL)
    config = GraceConfig(recipe="grace", ablate=["sketches", *ablate], graph=edges, refresh=refresh)
    n = len(x) if x is not None else N
    own, nobody = np.arange(n), np.empty(0, np.int64)
    content = ContentFeatures(own, np.zeros(n, np.float32), None, statistics, x)
    pool = Pool(n, 0, 0.2, INTERVAL, 4, 1)
    p = RefreshContext(LocalComm(5.0), config, pool, SamplerOrder(n), 4, lambda *_: content, nobody, nobody, trusted)
    table, seen = (
        Table(SampleRecords.empty(4)).merge(rows),
        Table(Losses.empty()).merge(read if read is not None else rows.losses),
    )
    now = {"loss_limits": loss_limits, "decision": decision}
    inputs = RefreshInputs(
        SampleRecords.empty(4), Losses.empty(), table, seen, VisitCounts(), STEP, version, 0, INTERVAL, reference, **now
    )
    _, vectors = rows_of(p, inputs, own, content, table)
    kept = follow(p.comm, None, own, vectors, edges) if vectors is not None else None
    return estimate(p, inputs, own, content, table, seen, kept)


def believed(*args: Any, **options: Any) -> Signals:
    return estimated(*args, **options).signals


# -- oracles -----------------------------------------------------------------------------------------------------------


def dense(x: np.ndarray, rows: SampleRecords) -> tuple[np.ndarray, np.ndarray]:
    """(N, N) weight of each sample among the k nearest of each other one; (N,) confidence by age, 0 if not measured."""
    cosine = x.astype(np.float64) @ x.T.astype(np.float64)
    np.fill_diagonal(cosine, -np.inf)
    cosine[cosine < -np.sort(-cosine, axis=1)[:, K - 1 : K]] = -np.inf
    confidence = np.zeros(len(x))
    confidence[rows.ids] = 0.6 ** ((STEP - rows.step) // INTERVAL)
    return np.maximum(cosine, 0) ** 4, confidence


def told(
    sample: int, hops: int, weight: np.ndarray, confidence: np.ndarray, value: np.ndarray, shrink: float
) -> tuple[float, float]:
    """(value, how sure of it) that a sample passes on after so many hops; what was measured is passed on as it is."""
    if np.isfinite(value[sample]):
        return value[sample], confidence[sample]
    if not hops:
        return 0.0, 0.0
    heard = [(weight[sample, j], *told(j, hops - 1, weight, confidence, value, shrink)) for j in np.flatnonzero(weight[sample])]
    evidence = sum(w * sure for w, _, sure in heard)
    if not evidence:
        return 0.0, 0.0
    return sum(w * sure * mean for w, mean, sure in heard) / evidence, evidence / (shrink + evidence)


def minimum(weight: np.ndarray, confidence: np.ndarray, value: np.ndarray, shrink: float, hops: int = 1) -> np.ndarray:
    """(N,) where the energy of all samples together is least, fresh values being held; from the energy's values alone."""
    known = np.isfinite(value)
    held = known & (confidence == 1)
    free = np.flatnonzero(~held)
    v = np.where(known, value, 0.0)
    mean, sure = np.array([told(i, hops - 1, weight, confidence, value, shrink) for i in range(len(v))]).T

    def energy(y: np.ndarray) -> float:
        z = np.where(held, v, 0.0)
        z[free] = y
        pulls = weight * sure * (z[:, None] - mean[None, :]) ** 2
        return float(shrink * (z**2).sum() + (confidence * known * (z - v) ** 2).sum() + pulls.sum()) / 2

    unit, nothing = np.eye(len(free)), energy(np.zeros(len(free)))
    one = np.array([energy(e) for e in unit])
    slope = (one - np.array([energy(-e) for e in unit])) / 2
    curvature = np.array([[energy(a + b) for b in unit] for a in unit]) - one[:, None] - one[None, :] + nothing
    out = v.copy()
    out[free] = np.linalg.solve(curvature, -slope)
    return out


def distances(weight: np.ndarray, start: np.ndarray) -> np.ndarray:
    """(N,) steps along the edges from each sample to the nearest of ``start``; inf where no way leads to one."""
    far = np.where(np.isin(np.arange(len(weight)), start), 0.0, np.inf)
    for _ in range(len(weight)):
        far = np.minimum(far, 1 + np.where(weight > 0, far[None, :], np.inf).min(1))
    return far


def losses(rows: SampleRecords) -> np.ndarray:
    value = np.full(N, np.nan)
    value[rows.ids] = rows.loss
    return value


# -- what goes along the edges -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("hops", "shrink", "measured"), [(1, 0.8, 38), (1, 0.05, 38), (2, 0.8, 12), (3, 0.05, 6)])
def test_spreading_minimises_the_energy_of_the_whole_window(seed: int, hops: int, shrink: float, measured: int) -> None:
    x, rows = window(seed, measured)
    got = believed(x, rows, REFERENCE, shrink=shrink, hops=hops)
    weight, confidence = dense(x, rows)
    value = losses(rows)
    centre = np.nanmean(value)
    wanted = minimum(weight, confidence, value - centre, shrink, hops) + centre
    np.testing.assert_allclose(got.loss, wanted, rtol=1e-5, atol=1e-5)
    fresh = rows.ids[(STEP - rows.step < INTERVAL) & np.isfinite(rows.loss)]
    np.testing.assert_allclose(got.loss[fresh], value[fresh], rtol=1e-6, atol=1e-6)
    assert got.staleness[rows.ids].tolist() == (STEP - rows.step).tolist()
    assert np.isinf(np.delete(got.staleness, rows.ids)).all()


@pytest.mark.parametrize("seed", range(3))
def test_disagreement_is_the_spread_of_pairs_of_neighbours(seed: int) -> None:
    x, rows = window(seed)
    weight, confidence = dense(x, rows)
    loss = losses(rows)
    evidence = weight * np.where(np.isfinite(loss), confidence, 0.0)
    apart = (np.nan_to_num(loss)[:, None] - np.nan_to_num(loss)[None, :]) ** 2
    pairs = np.einsum("ia,ib,ab->i", evidence, evidence, apart) / 2
    with np.errstate(invalid="ignore"):
        wanted = np.sqrt(pairs) / evidence.sum(1)
    np.testing.assert_allclose(believed(x, rows, {}).disagreement, wanted, rtol=1e-4, atol=1e-5)
    assert np.isnan(wanted[[4, 31]]).all()


@pytest.mark.parametrize("seed", range(3))
def test_crowding_is_the_weight_of_the_nearest_whoever_was_measured(seed: int) -> None:
    x, rows = window(seed)
    wanted = dense(x, rows)[0].sum(1)
    np.testing.assert_allclose(believed(x, rows, REFERENCE).crowding, wanted, rtol=1e-5, atol=1e-5)
    nothing = believed(x, SampleRecords.empty(4), {}, hops=4)
    np.testing.assert_allclose(nothing.crowding, wanted, rtol=1e-5, atol=1e-5)
    assert wanted[[4, 31]].tolist() == [0, 0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("hops", [1, 2, 4])
def test_a_sample_is_reached_where_as_few_steps_lead_to_a_measured_one(seed: int, hops: int) -> None:
    x, rows = window(seed, 4)
    rows.loss[:] = np.arange(4) + 1.0
    far = distances(dense(x, rows)[0], rows.ids)
    found = estimated(x, rows, {}, hops=hops)
    reached = (far <= hops) & (far > 0)
    assert found.reached == reached.sum() < N - 4
    centre = rows.loss.mean()
    told_of = np.delete(found.signals.loss != np.float32(centre), rows.ids)  # the others are taken for average
    assert not (told_of & ~np.delete(reached, rows.ids)).any() and told_of.any()


def test_along_a_chain_scores_travel_as_far_as_asked_and_fade() -> None:
    angle = 0.2 * np.arange(20)
    x = np.zeros((20, D), np.float32)
    x[:, 0], x[:, 1] = np.cos(angle), np.sin(angle)  # nearest to each: the one before and the one after it
    ends = SampleRecords(
        **{**vars(window(0, 2)[1]), "ids": np.array([0, 19]), "loss": np.array([1, 3], np.float32), "step": np.full(2, STEP)}
    )
    for hops in (1, 3, 6):
        found = estimated(x, ends, {}, k=2, hops=hops)
        rest = found.signals.loss - 2  # their mean
        assert rest[[0, 19]].tolist() == [-1, 1] and found.reached == 2 * hops
        assert (rest[1 : hops + 1] < 0).all() and (rest[18 - hops : 19][1:] > 0).all()
        assert (np.diff(rest[: hops + 1]) > 0).all()  # ever nearer to the mean
        assert not rest[hops + 1 : 19 - hops].any()


def test_a_cluster_without_a_measured_sample_is_taken_for_average() -> None:
    draw = np.random.default_rng(0)
    x = np.zeros((N, D), np.float32)
    x[:30, :5], x[30:, 5:] = np.abs(draw.normal(size=(30, 5))), np.abs(draw.normal(size=(30, 5)))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    rows = window(0)[1]
    rows = rows.take((rows.ids < 30) & np.isfinite(rows.loss))
    found = estimated(x, rows, {}, hops=50)
    np.testing.assert_allclose(found.signals.loss[30:], rows.loss.mean(), atol=1e-5)
    assert found.reached == 30 - len(rows)
    assert np.isnan(found.signals.disagreement[30:]).all() and np.isfinite(found.signals.disagreement[:30]).all()


def measured_influence(rows: SampleRecords) -> np.ndarray:
    """(N,) alignment times length over the unit of its basis; NaN where one is missing."""
    value = np.full(N, np.nan)
    for i, sample in enumerate(rows.ids):
        value[sample] = rows.influence[i] * rows.norm[i] / REFERENCE.get(int(rows.basis[i]), np.nan)
    return value


NOTHING, UNIT = np.zeros((N, 5), np.float32), 0.02  # content that tells nothing; the least deviation of trusted predictions


@pytest.mark.parametrize("hops", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_what_content_does_not_tell_of_an_influence_goes_along_the_edges(seed: int, hops: int) -> None:
    """Content that is the same for all predicts the weighted mean: what is left minimises the energy of the window."""
    x, rows = window(seed)
    got = believed(x, rows, REFERENCE, statistics=NOTHING, trusted=NOTHING[:9], hops=hops)
    weight, confidence = dense(x, rows)
    value = measured_influence(rows)
    known = np.isfinite(value)
    rest = value - np.average(value[known], weights=confidence[known])
    np.testing.assert_allclose(got.influence * UNIT, minimum(weight, confidence, rest, 0.8, hops), atol=3e-3)


def test_a_loss_that_is_read_later_takes_the_place_of_the_rows_and_of_samples_without_one() -> None:
    """Losses come from every step, rows from some: each is as old as its own last look."""
    x, rows = window(0)
    rows = rows.take(np.isfinite(rows.loss))
    later, other = rows.ids[::3], np.setdiff1d(np.arange(N), rows.ids)[:5]
    ids = np.concatenate([later, other])
    read = Losses(ids, np.full(len(ids), STEP), np.linspace(1, 2, len(ids)).astype(np.float32))
    both = Losses.concat([rows.losses, read])
    options = {"statistics": NOTHING, "trusted": NOTHING[:9], "hops": 2}
    got, before = believed(x, rows, REFERENCE, read=both, **options), believed(x, rows, REFERENCE, **options)
    np.testing.assert_allclose(got.loss[ids], read.loss, rtol=1e-6)
    assert (got.staleness[ids] == 0).all() and np.array_equal(np.delete(got.staleness, ids), np.delete(before.staleness, ids))
    assert np.array_equal(got.influence, before.influence)  # no influence is known of them by it
    alone = believed(x, rows.take(rows.ids < 0), REFERENCE, read=read, **options)
    np.testing.assert_allclose(alone.loss[ids], read.loss, rtol=1e-6)
    assert np.isnan(alone.influence).all() and np.isfinite(alone.loss).all()


# -- what is left without the graph, and without anything ----------------------------------------------------------------


def test_without_the_graph_content_alone_tells_an_influence() -> None:
    x, rows = window(0)
    for vectors in (x, None):
        without = {"statistics": NOTHING, "trusted": NOTHING[:9], "ablate": ("graph",)}
        assert not believed(vectors, rows, REFERENCE, **without).influence.any()
    draw = np.random.default_rng(1)
    kind = draw.normal(size=(N, 5)).astype(np.float32)
    rows = SampleRecords(
        **{**vars(rows), "influence": kind[rows.ids, 2], "norm": np.ones(38, np.float32), "basis": np.zeros(38, np.int32)}
    )
    got = believed(x, rows, REFERENCE, statistics=kind, trusted=kind[:9], ablate=("graph",))
    assert np.corrcoef(got.influence, kind[:, 2])[0, 1] > 0.9  # also of those that were never measured
    swapped = believed(x[::-1].copy(), rows, REFERENCE, statistics=kind, trusted=kind[:9], ablate=("graph",))
    assert np.array_equal(got.influence, swapped.influence)


@pytest.mark.parametrize("part", ["loss", "gradients"])
def test_of_a_part_that_is_switched_off_nothing_is_known(part: str) -> None:
    """As if it had not been measured, whatever was."""
    x, rows = window(0)
    column = {"loss": "loss", "gradients": "influence"}[part]
    unmeasured = SampleRecords(**{**vars(rows), column: np.full(len(rows), np.nan, np.float32)})
    options = {"statistics": NOTHING, "trusted": NOTHING[:9], "hops": 3}
    off, absent = estimated(x, rows, REFERENCE, ablate=(part,), **options), estimated(x, unmeasured, REFERENCE, **options)
    for name, value in vars(off.signals).items():
        assert np.array_equal(value, getattr(absent.signals, name), equal_nan=True), name
    assert (off.labels, off.explained, off.reached) == (absent.labels, absent.explained, absent.reached)
    assert np.isnan(getattr(off.signals, column)).all()


def test_a_loss_is_held_against_the_trusted_ones_whether_it_is_measured_or_spread() -> None:
    x, rows = window(0)
    limits = Limits.around(np.random.default_rng(0).normal(2.0, 1.0, 200))
    assert limits is not None and np.isnan(believed(x, rows, REFERENCE).loss_pass).all()
    s = believed(x, rows, REFERENCE, loss_limits=limits)
    away = np.abs(s.loss - 2.0)
    assert len(s.loss_pass) == N > len(rows) and (away > 3).any() and (away < 1).any()
    assert (s.loss_pass[away > 3] < 0.05).all() and (s.loss_pass[away < 1] > 0.8).all()


def test_what_nobody_knows_stays_unknown() -> None:
    x, rows = window(0)
    for statistics, trusted in ((None, None), (None, NOTHING[:9]), (NOTHING, None)):
        got = believed(x, rows, REFERENCE, statistics=statistics, trusted=trusted, hops=3)
        assert np.isnan(got.influence).all() and np.isfinite(got.loss).all()
    for reference in ({}, {0: 0.0, 1: -1.0}):  # no unit, and medians that give none
        assert np.isnan(believed(x, rows, reference, statistics=NOTHING, trusted=NOTHING[:9], hops=3).influence).all()
    unseen = SampleRecords(**{**vars(rows), "loss": np.full(38, np.nan, np.float32)})
    assert np.isnan(believed(x, unseen, REFERENCE, statistics=NOTHING, trusted=NOTHING[:9], hops=3).loss).all()


def test_without_a_graph_each_sample_knows_its_own_loss_alone() -> None:
    x, rows = window(0)
    found = estimated(x, rows, REFERENCE, ablate=("graph",))
    alone = found.signals
    assert alone.loss[rows.ids] == pytest.approx(rows.loss, abs=1e-6, nan_ok=True)
    assert np.isnan(np.delete(alone.loss, rows.ids)).all()
    assert np.isnan(alone.disagreement).all() and np.isnan(alone.crowding).all() and found.reached == 0


def test_while_the_guard_has_stepped_down_no_graph_is_paid_for_until_it_looks_again() -> None:
    x, rows = window(0)
    down = Decision("content", "", misses=1, look=5, off=DOWN)
    for version, pays in ((1, False), (4, False), (5, True), (6, True)):
        found = believed(x, rows, REFERENCE, decision=down, version=version)
        assert np.isfinite(found.crowding).all() == pays
    clean = Decision("uniform", "clean", off=CLEAN)  # nothing to look at again, but losses go on being read
    found = believed(x, rows, REFERENCE, decision=clean, version=9)
    assert np.isnan(found.crowding).all() and np.isfinite(found.loss[rows.ids]).any()


def test_how_many_labels_there_are_is_told_by_what_they_are_worth() -> None:
    x, rows = window(0)
    found = estimated(x, rows, REFERENCE, statistics=NOTHING, trusted=NOTHING[:9])
    known = np.isfinite(measured_influence(rows))
    assert found.labels == pytest.approx(dense(x, rows)[1][known].sum(), rel=5e-3)
    assert found.explained < 0.05  # content that is the same for all
    assert estimated(x, rows, {}, statistics=NOTHING, trusted=NOTHING[:9]).labels == 0
