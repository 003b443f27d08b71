"""Rows and values between real processes: what is sent is what arrives, at its owner."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from grace_ds.comm.choose import choose
from grace_ds.errors import DataError, PeerFailed
from grace_ds.records import HIDDEN, SampleRecords
from grace_ds.refresh.gather import Route, Sent, gather_rows
from grace_ds.refresh.table import Table, owner_of
from tests.multirank.harness import World, run_ranks

N, DIM = 500, 6


def collect(rank: int, n: int) -> SampleRecords:
    """Rows with repeats, padding and a few that are not finite."""
    draw = np.random.default_rng(100 + rank)
    ids = draw.integers(-2, N + 3, n)
    ids[::11] = -1
    sketch = draw.standard_normal((n, DIM)).astype(np.float16)
    norm = draw.random(n).astype(np.float32)
    sketch[:: 17 + rank, 1] = np.inf
    norm[5::23] = np.nan
    loss = draw.standard_normal(n).astype(np.float32)
    loss[::3] = np.nan  # not seen: no reason to drop the row
    return SampleRecords(
        ids=ids,
        sketch=sketch,
        norm=norm,
        loss=loss,
        influence=draw.standard_normal(n).astype(np.float32),
        step=draw.integers(0, 9, n),
        basis=draw.integers(-1, 3, n).astype(np.int32),
        hidden=draw.standard_normal((n, HIDDEN)).astype(np.float16),
    )


def gather_and_fetch(world: World, lengths: list[int], folder: str) -> tuple[SampleRecords, Sent, dict[str, Any], dict[str, str]]:
    comm = choose("torch", timeout=10.0)
    rows, sent = gather_rows(comm, collect(world.rank, lengths[world.rank]), N)

    ids = np.unique(rows.ids)
    draw = np.random.default_rng(world.rank)
    # Rank 0 asks for nothing, others for unknown ids too: few of them, or more than there are ids.
    wanted = draw.integers(*((-3, N + 50, 40) if world.rank % 2 else (-1, N + 50, 350 * world.rank)))
    route = Route.of(comm, wanted, ids)  # one way for values of any kind
    answers = {
        "wanted": wanted,
        "float": route.exchange((ids * 0.5).astype(np.float32), np.nan)[route.place],
        "pair": route.exchange(np.stack([ids, -ids], 1), -7)[route.place],
        "zero": route.exchange(ids + 1)[route.place],
        "carried": len(route.exchange(ids)),
    }
    table = Table(SampleRecords.empty(DIM)).merge(rows)
    files = table.save(folder, world.rank, world.size)

    # Ids of another owner are a bug of this rank alone; the others leave with it, and the transport goes on.
    if world.size > 1:
        if world.rank == 1:
            alien = np.array([i for i in range(99) if owner_of(np.array([i]), world.size)[0] != 1])
            with pytest.raises(DataError, match="does not own"):
                Route.of(comm, wanted, alien)
            with pytest.raises(DataError, match="sorted"):
                Route.of(comm, wanted, np.array([3, 3]))
            comm.abort()
        else:
            with pytest.raises(PeerFailed):
                Route.of(comm, wanted, ids)
        again, _ = gather_rows(comm, collect(world.rank, lengths[world.rank]), N)
        assert np.array_equal(again.ids, rows.ids)
    return rows, sent, answers, files


def as_records(rows: SampleRecords) -> list[bytes]:
    """Each row's bytes, id first."""
    columns = [getattr(rows, f.name) for f in fields(SampleRecords)]
    return [b"".join(np.ascontiguousarray(c[i]).tobytes() for c in columns) for i in range(len(rows))]


def usable(rows: SampleRecords, i: int) -> bool:
    return bool(0 <= rows.ids[i] < N and np.isfinite(rows.sketch[i]).all() and np.isfinite(rows.norm[i]))


@pytest.mark.parametrize("lengths", [[200], [0, 300], [120, 0, 200], [50, 80, 0, 170]])
def test_union_and_values(lengths: list[int], tmp_path: Any) -> None:
    size = len(lengths)
    results = run_ranks(gather_and_fetch, size, lengths, str(tmp_path), timeout=30)
    sent = [collect(r, n) for r, n in enumerate(lengths)]

    # Nothing lost, nothing made up, nothing changed; repeats in the order of their steps.
    wanted = [(int(rows.ids[i]), record) for rows in sent for i, record in enumerate(as_records(rows)) if usable(rows, i)]
    arrived: dict[bytes, list[int]] = {}
    one_row = next(sum(getattr(rows, f.name)[:1].nbytes for f in fields(SampleRecords)) for rows in sent if len(rows))
    for rank, (rows, told, _, _) in enumerate(results):
        places = list(zip(rows.ids.tolist(), rows.step.tolist(), strict=True))
        assert places == sorted(places)
        assert (owner_of(rows.ids, size) == rank).all()
        records = as_records(rows)
        assert sorted(records) == sorted(record for i, record in wanted if owner_of(np.array([i]), size)[0] == rank)
        for r in records:
            arrived.setdefault(r, []).append(rank)
        outside = ((sent[rank].ids < 0) | (sent[rank].ids >= N)).sum()
        unusable = sum(not usable(sent[rank], i) for i in range(lengths[rank]))
        assert (told.out_of_range, told.out_of_range + told.not_finite) == (outside, unusable)
        assert lengths[rank] == 0 or 0 < told.not_finite < unusable
        assert told.bytes == one_row * (lengths[rank] - unusable)
    assert sum(map(len, arrived.values())) == len(wanted)

    everything = {w[0] for w in wanted}
    for _, _, got, _ in results:
        assert got["float"].dtype == np.float32 and got["pair"].shape == (len(got["wanted"]), 2)
        for i, value, pair, zero in zip(got["wanted"], got["float"], got["pair"], got["zero"], strict=True):
            assert value == i / 2 if i in everything else np.isnan(value)
            assert pair.tolist() == ([i, -i] if i in everything else [-7, -7])
            assert zero == (i + 1 if i in everything else 0)
        assert got["carried"] == len({i for i in got["wanted"].tolist() if i >= 0}) + 1  # each once, however often it is wanted

    # The files of this world, read by worlds of other sizes, hold the same rows.
    files = {name: digest for result in results for name, digest in result[3].items()}
    assert len(files) == size
    for other in (1, 2, 3, 5):
        parts = [Table.load(tmp_path, files, r, other, SampleRecords.empty(DIM)) for r in range(other)]
        assert all((owner_of(p.ids, other) == r).all() for r, p in enumerate(parts))
        assert {int(i) for p in parts for i in p.ids} == everything
