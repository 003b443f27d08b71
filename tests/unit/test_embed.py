"""What stands beside a sample's content in the graph: its own learned parts, or what its neighbours say."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from grace_ds.comm.local import LocalComm
from grace_ds.config.schema import GraphConfig
from grace_ds.graph.repair import build_kept
from grace_ds.records import HIDDEN, FloatArray, IntArray, SampleRecords
from grace_ds.refresh.embed import SKETCHED, Learned, embed, learn
from grace_ds.refresh.table import Table

N, DIM, WIDTH, K = 40, 64, 12, 5
IDS = np.arange(N)


def unit(x: FloatArray) -> FloatArray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def content(seed: int = 0) -> FloatArray:
    draw = np.random.default_rng(seed)
    return unit(draw.normal(size=(6, WIDTH))[draw.integers(0, 6, N)] + 0.4 * draw.normal(size=(N, WIDTH)))


def rows(ids: IntArray, seed: int = 1, step: int = 4, shift: float = 0.0) -> SampleRecords:
    draw, n = np.random.default_rng(seed), len(ids)
    return SampleRecords(
        ids=ids.astype(np.int64),
        sketch=(unit(draw.normal(size=(n, DIM))) + shift).astype(np.float16),
        norm=np.ones(n, np.float32),
        loss=np.zeros(n, np.float32),
        influence=np.zeros(n, np.float32),
        step=np.full(n, step, np.int64),
        basis=np.zeros(n, np.int32),
        hidden=(draw.normal(size=(n, HIDDEN)) + 4 * shift).astype(np.float16),
    )


def learned(table: Table[SampleRecords], before: Learned | None = None, graph: bool = False) -> Learned:
    comm = LocalComm(5.0)
    kept = build_kept(comm, IDS, content(), GraphConfig(k=K)) if graph else None
    return learn(comm, before or Learned.empty(), IDS, table, kept, seed=3)


def test_own_parts_are_of_unit_length_and_only_where_a_row_was_collected() -> None:
    known = IDS[::3]
    found = learned(Table(SampleRecords.empty(DIM)).merge(rows(known)))
    for part in (found.values[:, :SKETCHED], found.values[:, SKETCHED:]):
        length = np.linalg.norm(part, axis=1)
        np.testing.assert_allclose(length[known], 1, atol=1e-6)
        assert not np.delete(length, known).any()
    assert (found.step[known] == 4).all() and (np.delete(found.step, known) == -1).all()


def test_what_all_rows_have_in_common_says_nothing() -> None:
    plain, shifted = (learned(Table(SampleRecords.empty(DIM)).merge(rows(IDS, shift=shift))) for shift in (0.0, 0.5))
    np.testing.assert_allclose(plain.values, shifted.values, atol=0.02)  # half precision of larger numbers


def test_a_sample_without_a_row_takes_the_least_distance_to_its_old_value_and_its_neighbours() -> None:
    known = IDS[::2]
    before = learned(Table(SampleRecords.empty(DIM)).merge(rows(known)))
    old = dataclasses.replace(before, values=before.values + 0.1 * (before.step < 0)[:, None].astype(np.float32))
    found = learned(Table(SampleRecords.empty(DIM)).merge(rows(known)), old, graph=True)
    cosine = content().astype(np.float64) @ content().T.astype(np.float64)
    np.fill_diagonal(cosine, -np.inf)
    for i in IDS[1::2]:
        near = [j for j in np.argsort(-cosine[i])[:K] if j % 2 == 0]

        def energy(x: FloatArray, i: int = i, near: list[int] = near) -> float:
            pulls = sum(max(cosine[i, j], 0) ** 4 * np.sum((x - old.values[j]) ** 2) for j in near)
            return float(np.sum((x - old.values[i]) ** 2) + pulls)

        least, draw = energy(found.values[i].astype(np.float64)), np.random.default_rng(int(i))
        for _ in range(20):
            assert energy(found.values[i] + 0.02 * draw.normal(size=SKETCHED + HIDDEN)) > least
    assert np.array_equal(found.values[known], old.values[known])


def test_a_sample_that_is_collected_again_takes_the_mean_of_both() -> None:
    table = Table(SampleRecords.empty(DIM)).merge(rows(IDS))
    first = learned(table)
    again = learned(table.merge(rows(IDS[:10], seed=2, step=9)), first)
    alone = learned(Table(SampleRecords.empty(DIM)).merge(rows(IDS[:10], seed=2, step=9)))
    between = unit(first.values[:10, SKETCHED:] + alone.values[:10, SKETCHED:])
    np.testing.assert_allclose(again.values[:10, SKETCHED:], between, atol=1e-5)
    assert np.array_equal(again.values[10:], first.values[10:]) and (again.step[:10] == 9).all()


@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.1, 0.0), (0.05, 0.2)])
def test_shares_are_those_of_a_rows_squared_length(shares: tuple[float, float]) -> None:
    own = learned(Table(SampleRecords.empty(DIM)).merge(rows(IDS))).values
    z = embed(content(), own, *shares)
    parts = np.split(z, [WIDTH, WIDTH + SKETCHED], axis=1)
    squares = [float((part.astype(np.float64) ** 2).sum(1).mean()) for part in parts]
    np.testing.assert_allclose(squares, [1 - sum(shares), *shares], atol=1e-3)
    assert np.array_equal(z, z.astype(np.float16).astype(np.float32))


def test_a_changed_sketch_changes_the_graph() -> None:
    graphs = []
    for seed in (1, 1, 2):
        z = embed(content(), learned(Table(SampleRecords.empty(DIM)).merge(rows(IDS, seed=seed))).values, 0.2, 0.0)
        graph = build_kept(LocalComm(5.0), IDS, z, GraphConfig(k=K))
        assert graph is not None
        graphs.append(graph.neighbours().ids)
    assert np.array_equal(graphs[0], graphs[1]) and not np.array_equal(graphs[0], graphs[2])
