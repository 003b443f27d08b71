"""What a refresh believes of each sample, against the minimum of an energy over all samples of a window at once."""

from __future__ import annotations

import numpy as np
import pytest

from grace_ds.comm.local import LocalComm
from grace_ds.config.schema import GraceConfig, GraphConfig, RefreshConfig, SelectionConfig
from grace_ds.features import ContentFeatures
from grace_ds.order import SamplerOrder
from grace_ds.pool import Pool
from grace_ds.records import Rows
from grace_ds.refresh import anchors_of
from grace_ds.schedule import Ledger
from grace_ds.signals import Inputs, Pipeline, Signals, spread
from grace_ds.table import Table

N, D, K, STEP, INTERVAL = 60, 10, 6, 20, 5
REFERENCE = {0: 0.5, 1: 2.0}


def window(seed: int) -> tuple[np.ndarray, Rows]:
    """Content vectors in clusters, and rows of 38 of the samples: fresh ones, and up to three intervals old."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(8, D))[draw.integers(0, 8, N)] + 0.6 * draw.normal(size=(N, D))
    x[[4, 31]] = 0  # without tokens: near to nobody
    ids = np.sort(draw.choice(N, 38, replace=False)).astype(np.int64)
    rows = Rows(
        ids=ids,
        sketch=draw.normal(size=(38, 4)).astype(np.float16),
        norm=draw.uniform(0.5, 2, 38).astype(np.float32),
        loss=np.where(draw.random(38) < 0.2, np.nan, draw.normal(2, 3, 38)).astype(np.float32),
        align=np.where(draw.random(38) < 0.2, np.nan, draw.normal(0.4, 0.3, 38)).astype(np.float32),
        step=draw.integers(STEP - 3 * INTERVAL, STEP + 1, 38).astype(np.int64),
        basis=draw.integers(-1, 3, 38).astype(np.int32),
    )
    return (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)).astype(np.float32), rows


def believed(
    x: np.ndarray,
    rows: Rows,
    reference: dict[int, float],
    shrink: float = 0.8,
    graph: bool = True,
    statistics: np.ndarray | None = None,
    trusted: np.ndarray | None = None,
    residuals: bool = False,
    tilt: bool = True,
) -> Signals:
    """The product's own answer on one rank; either of ``residuals`` and ``tilt`` asks for the graph."""
    edges = GraphConfig(k=K, shrink=shrink, decay=0.6, residuals=residuals)
    selection, refresh = SelectionConfig(loss_tilt=tilt), RefreshConfig(interval_steps=INTERVAL)
    config = GraceConfig(recipe="grace", graph=edges, selection=selection, refresh=refresh)
    own, nobody = np.arange(N), np.empty(0, np.int64)
    content = ContentFeatures(own, np.zeros(N, np.float32), None, statistics, x if graph else None)
    p = Pipeline(
        LocalComm(5.0), config, Pool(N, 0, 0.2, INTERVAL, 4, 1), SamplerOrder(N), 4, lambda _: content, nobody, nobody, trusted
    )
    table = Table.empty(4).merge(rows)
    inputs = Inputs(Rows.empty(4), table, Ledger(), STEP, 0, 0, INTERVAL, reference)
    return spread(p, inputs, own, content, table, anchors_of(p, own, content, table))


def dense(x: np.ndarray, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """(N, N) weight of each sample's evidence for each other one, before ages; (N,) confidence by age, 0 if not harvested."""
    cosine = x.astype(np.float64) @ x.T.astype(np.float64)
    np.fill_diagonal(cosine, -np.inf)
    cosine[:, np.setdiff1d(np.arange(N), rows.ids)] = -np.inf
    cosine[cosine < -np.sort(-cosine, axis=1)[:, K - 1 : K]] = -np.inf
    confidence = np.zeros(N)
    confidence[rows.ids] = 0.6 ** ((STEP - rows.step) // INTERVAL)
    return np.maximum(cosine, 0) ** 4, confidence


def minimum(weight: np.ndarray, confidence: np.ndarray, value: np.ndarray, shrink: float) -> np.ndarray:
    """(N,) where the energy of all samples together is least, fresh values being held; from the energy's values alone."""
    known = np.isfinite(value)
    held = known & (confidence == 1)
    free = np.flatnonzero(~held)
    v = np.where(known, value, 0.0)

    def energy(y: np.ndarray) -> float:
        z = np.where(held, v, 0.0)
        z[free] = y
        pulls = weight * np.where(known, confidence, 0.0) * (z[:, None] - v[None, :]) ** 2
        return float(shrink * (z**2).sum() + (confidence * known * (z - v) ** 2).sum() + pulls.sum()) / 2

    unit, nothing = np.eye(len(free)), energy(np.zeros(len(free)))
    one = np.array([energy(e) for e in unit])
    slope = (one - np.array([energy(-e) for e in unit])) / 2
    curvature = np.array([[energy(a + b) for b in unit] for a in unit]) - one[:, None] - one[None, :] + nothing
    out = v.copy()
    out[free] = np.linalg.solve(curvature, -slope)
    return out


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shrink", [0.8, 0.05])
def test_spreading_minimises_the_energy_of_the_whole_window(seed: int, shrink: float) -> None:
    x, rows = window(seed)
    got = believed(x, rows, REFERENCE, shrink)
    weight, confidence = dense(x, rows)
    value = np.full(N, np.nan)
    value[rows.ids] = rows.loss
    centre = np.nanmean(value)
    wanted = minimum(weight, confidence, value - centre, shrink) + centre
    np.testing.assert_allclose(got.loss, wanted, rtol=1e-5, atol=1e-5)
    fresh = rows.ids[(STEP - rows.step < INTERVAL) & np.isfinite(rows.loss)]
    np.testing.assert_allclose(got.loss[fresh], value[fresh], rtol=1e-6, atol=1e-6)
    assert got.staleness[rows.ids].tolist() == (STEP - rows.step).tolist()
    assert np.isinf(np.delete(got.staleness, rows.ids)).all()


@pytest.mark.parametrize("seed", range(3))
def test_disagreement_is_the_spread_of_pairs_of_neighbours(seed: int) -> None:
    x, rows = window(seed)
    weight, confidence = dense(x, rows)
    loss = np.full(N, np.nan)
    loss[rows.ids] = rows.loss
    evidence = weight * np.where(np.isfinite(loss), confidence, 0.0)
    apart = (np.nan_to_num(loss)[:, None] - np.nan_to_num(loss)[None, :]) ** 2
    pairs = np.einsum("ia,ib,ab->i", evidence, evidence, apart) / 2
    with np.errstate(invalid="ignore"):
        wanted = np.sqrt(pairs) / evidence.sum(1)
    np.testing.assert_allclose(believed(x, rows, {}).disagreement, wanted, rtol=1e-4, atol=1e-5)
    assert np.isnan(wanted[[4, 31]]).all()


def harvested_influence(rows: Rows) -> np.ndarray:
    """(N,) alignment times length over the unit of its basis; NaN where one is missing."""
    value = np.full(N, np.nan)
    for i, sample in enumerate(rows.ids):
        value[sample] = rows.align[i] * rows.norm[i] / REFERENCE.get(int(rows.basis[i]), np.nan)
    return value


NOTHING, UNIT = np.zeros((N, 5), np.float32), 0.02  # content that tells nothing; the least deviation of trusted predictions


@pytest.mark.parametrize("seed", range(3))
def test_what_content_does_not_tell_of_an_influence_goes_along_the_edges(seed: int) -> None:
    """Content that is the same for all predicts the weighted mean: what is left minimises the energy of the window."""
    x, rows = window(seed)
    got = believed(x, rows, REFERENCE, statistics=NOTHING, trusted=NOTHING[:9], residuals=True)
    weight, confidence = dense(x, rows)
    value = harvested_influence(rows)
    known = np.isfinite(value)
    rest = value - np.average(value[known], weights=confidence[known])
    np.testing.assert_allclose(got.align * UNIT, minimum(weight, confidence, rest, 0.8), atol=3e-3)


def test_without_residuals_content_alone_tells_an_influence() -> None:
    x, rows = window(0)
    for graph in (True, False):
        assert not believed(x, rows, REFERENCE, graph=graph, statistics=NOTHING, trusted=NOTHING[:9]).align.any()
    draw = np.random.default_rng(1)
    kind = draw.normal(size=(N, 5)).astype(np.float32)
    rows = Rows(**{**vars(rows), "align": kind[rows.ids, 2], "norm": np.ones(38, np.float32), "basis": np.zeros(38, np.int32)})
    got = believed(x, rows, REFERENCE, statistics=kind, trusted=kind[:9])
    assert np.corrcoef(got.align, kind[:, 2])[0, 1] > 0.9  # also of those that were never harvested
    swapped = believed(x[::-1].copy(), rows, REFERENCE, statistics=kind, trusted=kind[:9])
    assert np.array_equal(got.align, swapped.align)


def test_what_nobody_knows_stays_unknown() -> None:
    x, rows = window(0)
    for statistics, trusted in ((None, None), (None, NOTHING[:9]), (NOTHING, None)):
        got = believed(x, rows, REFERENCE, statistics=statistics, trusted=trusted, residuals=True)
        assert np.isnan(got.align).all() and np.isfinite(got.loss).all()
    for reference in ({}, {0: 0.0, 1: -1.0}):  # no unit, and medians that give none
        assert np.isnan(believed(x, rows, reference, statistics=NOTHING, trusted=NOTHING[:9], residuals=True).align).all()


def test_without_a_graph_each_sample_knows_its_own_loss_alone() -> None:
    x, rows = window(0)
    # No vectors, or nothing that is to be carried along edges.
    for alone in (believed(x, rows, REFERENCE, graph=False), believed(x, rows, REFERENCE, tilt=False)):
        assert alone.loss[rows.ids] == pytest.approx(rows.loss, abs=1e-6, nan_ok=True)
        assert np.isnan(np.delete(alone.loss, rows.ids)).all() and np.isnan(alone.disagreement).all()
    assert np.isfinite(believed(x, rows, REFERENCE, tilt=False, residuals=True).loss).all()
