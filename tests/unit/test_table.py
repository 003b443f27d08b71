"""The table against a dictionary, and its files against what can go wrong with files."""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_ds.comm.buckets import buckets_of
from grace_ds.errors import CheckpointError, DataError
from grace_ds.records import HIDDEN, SampleRecords
from grace_ds.refresh.bucket_files import save_columns
from grace_ds.refresh.table import N_BUCKETS, SCHEMA, Table, bucket_of, owner_of
from grace_ds.utils.hashing import splitmix64

DIM = 3


def rows_of(pairs: list[tuple[int, int]], mark: int = 0) -> SampleRecords:
    """Rows of (id, step); every other column is made from the row's number, counted from ``mark``."""
    n = np.arange(mark, mark + len(pairs))
    return SampleRecords(
        ids=np.array([p[0] for p in pairs], np.int64),
        sketch=np.stack([n, -n, n + 1], 1).astype(np.float16),
        norm=n.astype(np.float32),
        loss=np.where(n % 3 == 0, np.nan, n).astype(np.float32),
        influence=(-n).astype(np.float32),
        step=np.array([p[1] for p in pairs], np.int64),
        basis=n.astype(np.int32),
        hidden=np.tile(n[:, None] / 8, HIDDEN).astype(np.float16),
    )


def filled(n: int, rank: int = 0, world: int = 1) -> Table[SampleRecords]:
    ids = [i for i in range(-3, n) if owner_of(np.array([i]), world)[0] == rank]
    return Table(SampleRecords.empty(DIM)).merge(rows_of([(i, i) for i in ids] + [(i, 0) for i in ids[::2]]))


def equal(a: Table[SampleRecords], b: Table[SampleRecords]) -> bool:
    columns = [(getattr(a.rows, f.name), getattr(b.rows, f.name)) for f in fields(a.rows)]
    return all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in columns)


batches = st.lists(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 4)), max_size=15), max_size=5)


@settings(deadline=None, max_examples=150)
@given(batches)
def test_merge_is_the_dictionary(parts: list[list[tuple[int, int]]]) -> None:
    """Row by row: a row replaces what is held unless it is older."""
    table, held, mark = Table(SampleRecords.empty(DIM)), dict[int, tuple[int, int]](), 0
    for part in parts:
        table = table.merge(rows_of(part, mark))
        for number, (i, step) in enumerate(part, mark):
            if i not in held or step >= held[i][0]:
                held[i] = (step, number)
        mark += len(part)
    assert table.ids.tolist() == sorted(held)
    assert table.last.tolist() == [held[i][0] for i in sorted(held)]
    numbers = [held[i][1] for i in sorted(held)]
    assert table.rows.norm.tolist() == numbers and table.rows.basis.tolist() == numbers
    assert table.rows.sketch.astype(int).tolist() == [[n, -n, n + 1] for n in numbers]
    assert [t.dtype for t in (table.rows.sketch, table.ids)] == [np.float16, np.int64]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-5, 30), max_size=20), st.lists(st.integers(-5, 30), max_size=20))
def test_keep_and_lookup(window: list[int], asked: list[int]) -> None:
    table = filled(20).keep(np.array(window, np.int64))
    ids = sorted({i for i in window if -3 <= i < 20})
    assert table.ids.tolist() == ids
    assert table.lookup(np.array(asked, np.int64)).tolist() == [ids.index(i) if i in ids else -1 for i in asked]


def test_a_table_is_a_value() -> None:
    table = filled(10)
    before = Table(table.rows.take(np.arange(len(table))))
    table.merge(rows_of([(3, 99), (77, 1)]))
    table.keep(np.array([1]))
    assert equal(table, before)
    with pytest.raises(DataError, match=r"sketch of width \(4,\) do not fit a table of width \(3,\)"):
        table.merge(SampleRecords.empty(4))


def test_buckets() -> None:
    # First outputs of the published generator for seeds 0 and 1234567.
    assert splitmix64(np.array([0, 1234567])).tolist() == [0xE220A8397B1DCDAF, 6457827717110365317]
    ids = np.arange(200_000)
    counts = np.bincount(bucket_of(ids), minlength=N_BUCKETS)
    assert counts.min() > 0 and abs(counts.std() / np.sqrt(counts.mean()) - 1) < 0.1  # Poisson, as if thrown
    for world in (1, 2, 3, 7, 4096, 5000):
        owners = owner_of(ids, world)
        for rank in {0, 1 % world, world // 2, world - 1}:
            assert set(bucket_of(ids[owners == rank])) <= set(buckets_of(rank, world))
        assert sum(len(buckets_of(r, world)) for r in range(world)) == N_BUCKETS


def save_all(folder: Path, world: int, n: int = 300) -> dict[str, str]:
    files: dict[str, str] = {}
    for rank in range(world):
        files |= filled(n, rank, world).save(folder, rank, world)
    return files


@pytest.mark.parametrize("old", [1, 2, 3])
@pytest.mark.parametrize("new", [1, 2, 3])
def test_saved_on_some_ranks_loaded_on_others(tmp_path: Path, old: int, new: int) -> None:
    files = save_all(tmp_path, old)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(files)  # no temporary files
    whole = Table.load(tmp_path, files, 0, 1, SampleRecords.empty(DIM))
    assert whole.ids.tolist() == list(range(-3, 300))
    parts = [Table.load(tmp_path, files, rank, new, SampleRecords.empty(DIM)) for rank in range(new)]
    for rank, part in enumerate(parts):
        assert equal(part, whole.keep(whole.ids[owner_of(whole.ids, new) == rank]))
    if old == new:
        assert all(equal(part, filled(300, rank, new)) for rank, part in enumerate(parts))


def test_empty_and_more_ranks_than_buckets(tmp_path: Path) -> None:
    files = Table(SampleRecords.empty(DIM)).save(tmp_path, 0, 1)
    assert len(Table.load(tmp_path, files, 1, 2, SampleRecords.empty(DIM))) == 0
    many = [Table(SampleRecords.empty(DIM)).save(tmp_path / "many", rank, N_BUCKETS + 1000) for rank in (0, 1, 2, 3, 4, 5)]
    assert [len(m) for m in many].count(0) >= 1
    assert (tmp_path / "many").exists()


def test_save_refuses_rows_of_other_owners(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="rank 0 of 2 holds rows"):
        filled(50).save(tmp_path, 0, 2)
    assert not list(tmp_path.iterdir())


def test_save_replaces_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that breaks leaves the old file and nothing else."""
    files = filled(50).save(tmp_path, 0, 1)
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        filled(60).save(tmp_path, 0, 1)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == list(files)
    assert equal(Table.load(tmp_path, files, 0, 1, SampleRecords.empty(DIM)), filled(50))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_damaged_files(tmp_path: Path) -> None:
    files = save_all(tmp_path, 2)
    first, second = sorted(files)
    for at in (0, 20, -1):
        flip(tmp_path / first, at)
        with pytest.raises(CheckpointError, match=f"{first} has digest .*torn or changed"):
            Table.load(tmp_path, files, 0, 2, SampleRecords.empty(DIM))
        flip(tmp_path / first, at)
    Table.load(tmp_path, files, 0, 2, SampleRecords.empty(DIM))
    (tmp_path / first).unlink()
    with pytest.raises(CheckpointError, match=f"{first} cannot be read"):
        Table.load(tmp_path, files, 0, 2, SampleRecords.empty(DIM))
    assert len(Table.load(tmp_path, files, 1, 2, SampleRecords.empty(DIM)))  # reads only what it owns
    with pytest.raises(CheckpointError, match=f"{second} leaves buckets from 0"):
        Table.load(tmp_path, {second: files[second]}, 0, 2, SampleRecords.empty(DIM))
    with pytest.raises(CheckpointError, match="2048 of 4096 buckets"):
        Table.load(tmp_path, {first: files[first]}, 1, 2, SampleRecords.empty(DIM))
    with pytest.raises(CheckpointError, match="overlaps another file"):
        Table.load(tmp_path, files | save_all(tmp_path / "other", 3), 0, 2, SampleRecords.empty(DIM))
    with pytest.raises(CheckpointError, match="'rows.bin' is not a file of rows"):
        Table.load(tmp_path, {"rows.bin": ""}, 0, 1, SampleRecords.empty(DIM))


def test_wrong_width_and_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = save_all(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"3, this run collect.dim=8"):
        Table.load(tmp_path, files, 0, 1, SampleRecords.empty(8))
    monkeypatch.setattr("grace_ds.refresh.table.SCHEMA", 99)
    with pytest.raises(CheckpointError, match="schema 4 .*this version reads 99"):
        Table.load(tmp_path, files, 0, 1, SampleRecords.empty(DIM))


def test_repeated_and_misplaced_ids(tmp_path: Path) -> None:
    good = filled(50)
    twice: Any = replace(good.rows, ids=np.sort(np.append(good.ids[1:], good.ids[5])))
    files = Table(twice).save(tmp_path, 0, 1)
    with pytest.raises(CheckpointError, match="repeats ids"):
        Table.load(tmp_path, files, 0, 1, SampleRecords.empty(DIM))
    names = sorted(save_all(tmp_path, 2))
    shutil.copy(tmp_path / names[0], tmp_path / names[1])
    stolen = filled(300, 0, 2).save(tmp_path / "b", 0, 2)[names[0]]
    with pytest.raises(CheckpointError, match="other buckets than its name says"):
        Table.load(tmp_path, {names[0]: stolen, names[1]: stolen}, 1, 2, SampleRecords.empty(DIM))


@pytest.mark.parametrize("column", ["step", "sketch"])
@pytest.mark.parametrize("how", ["type", "length"])
def test_a_column_of_another_type_or_length_is_named(tmp_path: Path, column: str, how: str) -> None:
    rows = SampleRecords.empty(4)
    columns = {name: value.copy() for name, value in vars(rows).items()}
    found = columns[column]
    columns[column] = found.astype(np.float64) if how == "type" else np.zeros((1, *found.shape[1:]), found.dtype)
    files = save_columns(tmp_path, SampleRecords.name, SCHEMA, columns, 0, 1)
    with pytest.raises(CheckpointError, match=f"another type or length: {column}"):
        Table.load(tmp_path, files, 0, 1, rows)
