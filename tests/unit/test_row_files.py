"""Rows by id in files: what is read is what was written, or is not found."""

from __future__ import annotations

import logging
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_ds.features.row_files import BUFFERED, HEADER, Ragged, RowFiles, write_rows

KEY, OTHER = "0123456789abcdef" * 2, "fedcba9876543210" * 2


def rows_of(ids: np.ndarray, salt: int = 0) -> list[np.ndarray]:
    return [np.random.default_rng([salt, i]).integers(0, 2**32, i % 7, np.uint32) for i in ids.tolist()]


def ragged(rows: list[np.ndarray]) -> Ragged:
    return Ragged(np.array([len(row) for row in rows], np.int64), np.concatenate([np.empty(0, np.uint32), *rows]))


def split(found: Ragged) -> list[list[int]]:
    return [part.tolist() for part in np.split(found.words, np.cumsum(found.lengths)[:-1])] if len(found.lengths) else []


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.lists(st.integers(0, 60), unique=True, max_size=25), max_size=5),
    asked=st.lists(st.integers(0, 70), unique=True, max_size=40),
)
def test_what_was_written_is_read_in_any_order_from_any_files(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[int]], asked: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    first, last = folder / "first", folder / "last"
    for number, part in enumerate(parts):  # ranges that overlap, and ids here and there
        ids = np.sort(np.array(part, np.int64)) if number % 2 else np.arange(min(part, default=0), max(part, default=-1) + 1)
        write_rows(first if number % 3 else last, KEY, ids, ragged(rows_of(ids)))
        parts[number] = ids.tolist()
    known = {i for part in parts for i in part}
    found, rows = RowFiles([first, last, folder / "absent"], KEY, None).read(np.array(asked, np.int64))
    assert found.tolist() == [i in known for i in asked]
    assert split(rows) == [row.tolist() for row in rows_of(np.array([i for i in asked if i in known], np.int64))]


def test_rows_are_written_when_enough_wait_and_found_at_once(tmp_path: Path) -> None:
    files = RowFiles([tmp_path], KEY, tmp_path)
    wide = Ragged.table(np.zeros((4, BUFFERED // 4), np.float32))
    files.add(np.array([9, 3, 5, 4]), wide)
    assert len(list(tmp_path.iterdir())) == 1
    files.add(np.array([20, 18]), ragged([np.arange(2, dtype=np.uint32), np.arange(3, dtype=np.uint32)]))
    assert files.read(np.array([18]))[0].tolist() == [False]
    files.flush()
    assert split(files.read(np.array([20, 7, 18]))[1]) == [[0, 1], [0, 1, 2]]
    assert not list(RowFiles([tmp_path], OTHER, None).read(np.array([18]))[0].nonzero()[0])
    nowhere = RowFiles([tmp_path], KEY, None)
    nowhere.add(np.array([50]), wide)
    nowhere.flush()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("consecutive", [True, False])
def test_whatever_byte_is_flipped_no_row_is_read_as_another(tmp_path: Path, consecutive: bool) -> None:
    ids = np.arange(10, 20) if consecutive else np.arange(10, 50, 4)
    path = write_rows(tmp_path, KEY, ids, ragged(rows_of(ids)))
    whole, asked, intact = path.read_bytes(), np.arange(0, 60), 0
    for at in range(len(whole)):
        for flip in (1, 0x80):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
            found, rows = RowFiles([tmp_path], KEY, None).read(asked)
            assert set(asked[found].tolist()) <= set(ids.tolist())
            assert split(rows) == [row.tolist() for row in rows_of(asked[found])]
            intact += len(rows.lengths)
            assert len(rows.lengths) < len(ids), at
    assert intact > len(whole)  # one byte costs a row or the file, not everything


@pytest.mark.parametrize("size", [0, 7, HEADER.size - 1, HEADER.size, HEADER.size + 50, -1])
def test_a_torn_file_is_refused_and_replaced(tmp_path: Path, size: int, caplog: pytest.LogCaptureFixture) -> None:
    ids = np.arange(40)
    path = write_rows(tmp_path, KEY, ids, ragged(rows_of(ids)))
    path.write_bytes(path.read_bytes()[:size])
    files = RowFiles([tmp_path], KEY, tmp_path)
    with caplog.at_level(logging.WARNING):
        assert not files.read(ids)[0].any() and not files.read(ids)[0].any()
    assert caplog.text.count(str(path)) == 1  # said once
    files.add(ids[5:], ragged(rows_of(ids[5:])))
    files.flush()
    assert not path.exists()
    caplog.clear()
    assert RowFiles([tmp_path], KEY, None).read(ids)[0].tolist() == (ids >= 5).tolist()
    assert not caplog.text


def test_a_header_that_promises_much_allocates_nothing(tmp_path: Path) -> None:
    path = write_rows(tmp_path, KEY, np.arange(3), ragged(rows_of(np.arange(3))))
    whole = path.read_bytes()
    magic, key, first, _, words = HEADER.unpack(whole[: HEADER.size])
    for n, total in ((2**61, words), (3, 2**62), (2**60, 2**60), (2**64 - 1, 0)):
        path.write_bytes(HEADER.pack(magic, key, first, n, total) + whole[HEADER.size :])
        assert not RowFiles([tmp_path], KEY, None).read(np.arange(3))[0].any()


def test_rows_that_overlap_are_not_multiplied(tmp_path: Path) -> None:
    """A hostile file whose rows all end at its end would be read a thousand times its size."""
    n = 2000
    path = write_rows(tmp_path, KEY, np.arange(n), Ragged.table(np.zeros((n, 1), np.float32)))
    whole = bytearray(path.read_bytes())
    ends = np.frombuffer(whole, "<u8", n, HEADER.size).copy()
    ends[1::2], ends[::2] = n, 0
    whole[HEADER.size : HEADER.size + 8 * n] = ends.tobytes()
    path.write_bytes(bytes(whole))
    files = RowFiles([tmp_path], KEY, None)
    files.read(np.arange(1))
    tracemalloc.start()
    found, rows = files.read(np.arange(n))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not found.any() and not len(rows.words)
    assert peak < 100 * n  # the words of all rows would be 4 n^2 / 2


def test_words_that_change_places_are_noticed(tmp_path: Path) -> None:
    path = write_rows(tmp_path, KEY, np.arange(3), Ragged.table(np.arange(12, dtype=np.uint32).reshape(3, 4)))
    whole = path.read_bytes()
    words = np.frombuffer(whole, np.uint32, 12, len(whole) - 48).copy()
    words[[5, 6]] = words[[6, 5]]
    path.write_bytes(whole[:-48] + words.tobytes())
    assert RowFiles([tmp_path], KEY, None).read(np.arange(3))[0].tolist() == [True, False, True]
