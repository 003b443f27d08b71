"""The schedule: composition, the book of positions, laps, files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_ds.data.schedule import (
    ScheduleBook,
    VisitCounts,
    compose,
    lap_order,
    load_book,
    load_schedule,
    put_aside,
    save_schedule,
)
from grace_ds.errors import CheckpointError
from grace_ds.monitor.metrics import Recorder
from grace_ds.records import Coreset, IntArray, Losses, Role, SampleRecords, Schedule
from grace_ds.refresh.line import RefreshResult
from grace_ds.refresh.state import RefreshState
from grace_ds.refresh.table import Table


def ints(*values: int) -> IntArray:
    return np.array(values, np.int64)


def make(
    core: int, length: int, *, explore: int = 0, audit: int = 0, version: int = 3, start: int = 0, visits: IntArray | None = None
) -> Schedule:
    ids = np.arange(core, dtype=np.int64) * 10
    coreset = Coreset(ids, np.linspace(0.5, 1.5, core).astype(np.float32))
    return compose(
        coreset,
        length,
        visits=np.zeros(core, np.int64) if visits is None else visits,
        explore=1_000_001 + np.arange(explore),
        audit=2_000_001 + np.arange(audit),
        seed=7,
        version=version,
        start=start,
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 5), st.integers(1, 100))
def test_slots_hold_guests_once_and_the_core_evenly(core: int, explore: int, audit: int, slots: int) -> None:
    s = make(core, slots + explore + audit, explore=explore, audit=audit)
    assert sorted(s.ids[s.roles == Role.EXPLORE]) == [1_000_001 + i for i in range(explore)]
    assert sorted(s.ids[s.roles == Role.AUDIT]) == [2_000_001 + i for i in range(audit)]
    _, uses = np.unique(s.ids[s.roles == Role.CORE], return_counts=True)
    assert uses.sum() == slots
    assert uses.max() - (uses.min() if len(uses) == core else 0) <= 1
    weight = dict(zip(range(0, core * 10, 10), np.linspace(0.5, 1.5, core).astype(np.float32), strict=True))
    assert all(s.weights[i] == (weight[int(s.ids[i])] if s.roles[i] == Role.CORE else 1) for i in range(len(s)))


def test_least_visited_members_come_first() -> None:
    visits = np.array([5, 0, 5, 0, 5, 0], np.int64)
    assert sorted(make(6, 3, visits=visits).ids) == [10, 30, 50]


def test_composition_depends_on_seed_and_version_only() -> None:
    assert make(50, 80).digest() == make(50, 80).digest()
    assert make(50, 80, version=4).digest() != make(50, 80).digest()


def test_orders_are_what_they_were() -> None:
    h = hashlib.blake2b(digest_size=16)
    for case in range(60):  # cores smaller and larger than their slots, with and without guests, some members met before
        core = 1 + case * case % 37
        s = compose(
            Coreset(np.arange(core) * 10, np.linspace(0.5, 1.5, core).astype(np.float32)),
            40 + case * 53 % 400,
            visits=np.arange(core) * 7 % 5,
            explore=10**6 + np.arange(case % 4),
            audit=2 * 10**6 + np.arange(case % 3),
            seed=case % 5,
            version=case,
            start=8 * case,
        )
        h.update(s.digest().encode())
    assert h.hexdigest() == "56d9649b4647ad02c90df79fa0f097fe"  # recorded when the order was joined anew for every pass


@pytest.mark.timeout(30)  # the work is in proportion to the slots: joined anew for every pass it took twice as long as this
def test_a_few_samples_fill_a_great_many_slots() -> None:
    s = make(10, 320_000)
    assert np.unique(s.ids, return_counts=True)[1].tolist() == [32_000] * 10


def test_no_room_for_the_core_is_an_error() -> None:
    with pytest.raises(ValueError, match="no slot"):
        make(5, 3, explore=3)


def test_book_switches_at_the_start_and_laps_beyond_the_end() -> None:
    first, second = make(8, 8, version=0), make(8, 8, version=1, start=20)
    book = ScheduleBook([first, second])
    stream = book.slots(0, 40)
    assert list(stream.versions) == [0] * 20 + [1] * 20
    assert list(stream.ids[:8]) == list(first.ids)
    assert sorted(stream.ids[8:16]) == sorted(first.ids)
    assert list(stream.ids[8:16]) != list(first.ids)
    assert list(stream.ids[20:28]) == list(second.ids)
    assert [s.version for s in ScheduleBook([second, first]).schedules] == [0, 1]
    assert [book.at(position) for position in (0, 19, 20, 999)] == [first, first, second, second]
    assert ScheduleBook([second]).at(19) is None


def test_every_lap_of_every_version_and_seed_has_an_order_of_its_own() -> None:
    orders = set()
    for seed in range(2):
        for version in range(2):
            lapped = dataclasses.replace(make(40, 40, version=version), seed=seed)
            orders |= {tuple(lap_order(lapped, lap).tolist()) for lap in range(1, 4)}
    assert len(orders) == 2 * 2 * 3 and all(sorted(order) == list(range(40)) for order in orders)


def test_schedules_taken_in_the_place_of_others_have_laps_of_their_own() -> None:
    one, other = make(8, 8, version=1), dataclasses.replace(make(8, 8, version=1), seed=9)
    book = ScheduleBook([one])
    book.slots(0, 24)
    book.replace([other])
    assert book.slots(0, 24).ids.tolist() == ScheduleBook([other]).slots(0, 24).ids.tolist()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 17), min_size=1, max_size=12))
def test_the_stream_is_the_same_however_it_is_cut(cuts: list[int]) -> None:
    book = ScheduleBook([make(5, 7, version=0), make(5, 9, version=1, start=11)])
    whole = book.slots(0, sum(cuts)).ids
    position, parts = 0, []
    for n in cuts:
        parts.append(ScheduleBook(list(book.schedules)).slots(position, n).ids)
        position += n
    assert list(np.concatenate(parts)) == list(whole)


def test_prune_keeps_what_positions_still_need() -> None:
    book = ScheduleBook([make(5, 7, version=v, start=10 * v) for v in range(4)])
    expected = book.slots(15, 30).ids
    book.prune(15)
    assert [s.version for s in book.schedules] == [1, 2, 3]
    assert list(book.slots(15, 30).ids) == list(expected)
    with pytest.raises(ValueError, match="before the first schedule"):
        book.slots(5, 1)


def test_a_schedule_may_not_start_before_its_predecessor() -> None:
    book = ScheduleBook([make(5, 7, start=10)])
    with pytest.raises(ValueError, match="before its predecessor"):
        book.publish(make(5, 7, version=4, start=9))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(-5, 20), max_size=10), max_size=5))
def test_ledger_counts_like_a_dictionary(batches: list[list[int]]) -> None:
    visits, oracle = VisitCounts(), dict.fromkeys(range(-5, 25), 0)
    for batch in batches:
        visits.add(np.array(batch, np.int64))
        for i in batch:
            oracle[i] += 1
    assert list(visits.of(np.arange(-5, 25))) == list(oracle.values())


def test_files_round_trip(tmp_path: Path) -> None:
    schedules = [make(9, 20, explore=2, audit=1, version=v, start=16 * v) for v in range(2)]
    for s in schedules:
        save_schedule(s, tmp_path)
    book = load_book(tmp_path)
    assert [s.digest() for s in book.schedules] == [s.digest() for s in schedules]
    assert not list(tmp_path.glob("*.tmp*"))


def test_a_damaged_file_is_named_wherever_the_damage_is(tmp_path: Path) -> None:
    path = save_schedule(make(9, 20), tmp_path)
    good = path.read_bytes()
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        path.write_bytes(bytes(bad))
        with pytest.raises(CheckpointError, match=path.name):
            load_schedule(path)
    for length in range(0, len(good), 7):
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match=path.name):
            load_schedule(path)
    path.unlink()
    with pytest.raises(CheckpointError, match=path.name):
        load_schedule(path)
    with pytest.raises(CheckpointError, match="no schedule"):
        load_book(tmp_path / "empty")


def test_the_type_of_an_array_is_part_of_what_is_checked(tmp_path: Path) -> None:
    path = save_schedule(make(9, 20), tmp_path)
    good = path.read_bytes()
    for usual, other in ((b'"I64"', b'"U64"'), (b'"U8"', b'"I8"'), (b'"F32"', b'"U32"')):
        assert good.count(usual) == 1
        path.write_bytes(good.replace(usual, other))
        with pytest.raises(CheckpointError, match="does not match its digest"):
            load_schedule(path)


def test_a_schedule_that_is_missing_or_overwritten_among_others_is_named(tmp_path: Path) -> None:
    paths = [save_schedule(make(9, 20, version=v, start=16 * v), tmp_path) for v in range(4)]
    middle = paths[1].read_bytes()
    paths[1].unlink()
    with pytest.raises(CheckpointError, match="schedule 2 where 1 must follow"):
        load_book(tmp_path)
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(CheckpointError, match=r"schedule-000001.*schedule 2 where 1 must follow"):
        load_book(tmp_path)
    paths[1].write_bytes(middle)
    paths[0].unlink()
    assert [s.version for s in load_book(tmp_path).schedules] == [1, 2, 3]


def of_run(run: str, version: int, start: int) -> Schedule:
    return dataclasses.replace(make(9, 20, version=version, start=start), run=run)


def test_a_file_says_its_run_and_one_without_is_of_none(tmp_path: Path) -> None:
    path = save_schedule(of_run("abc", 3, 0), tmp_path)
    assert load_schedule(path).run == "abc"
    assert load_schedule(save_schedule(make(9, 20, version=4), tmp_path)).run == ""


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([("a", 0), ("a", 16), ("a", 32), ("a", 48)], [("b", 0), ("b", 32)]),  # a shorter run over a longer one
        ([("a", 0), ("a", 16)], [("a", 0), ("b", 64)]),  # in its place, and no start falls
        ([("", 0), ("", 32), ("", 16)], []),  # of versions that did not say their run
    ],
)
def test_schedules_of_two_runs_are_no_book(tmp_path: Path, first: list[tuple[str, int]], second: list[tuple[str, int]]) -> None:
    for run in (first, second):
        for version, (name, start) in enumerate(run):
            save_schedule(of_run(name, version, start), tmp_path)
    with pytest.raises(CheckpointError, match="mixes the schedules of two runs; move those of one of them away"):
        load_book(tmp_path)


def test_a_run_that_was_taken_up_with_another_version_of_ours_is_one_book(tmp_path: Path) -> None:
    for version, name in enumerate(("", "", "a", "a")):
        save_schedule(of_run(name, version, 16 * version), tmp_path)
    assert [s.run for s in load_book(tmp_path).schedules] == ["", "", "a", "a"]


def test_what_cannot_stand_beside_a_schedule_is_put_aside(tmp_path: Path) -> None:
    def names(suffix: str) -> list[int]:
        return sorted(int(path.stem.split("-")[1]) for path in tmp_path.glob(f"*.{suffix}"))

    for version in range(5):
        save_schedule(of_run("a", version, 16 * version), tmp_path)
    assert put_aside(tmp_path, of_run("a", 3, 40)) == set()  # the run itself, taken up at a checkpoint
    assert names("safetensors") == [0, 1, 2] and names("abandoned") == [3, 4]
    assert put_aside(tmp_path, of_run("b", 0, 0)) == {"a"}
    assert names("safetensors") == [] and names("abandoned") == [0, 1, 2, 3, 4]
    for version in range(3):  # of a version that did not say its run: the beginning of another puts all of them aside
        save_schedule(of_run("", version, 16 * version), tmp_path)
    assert put_aside(tmp_path, of_run("b", 2, 40)) == set() and names("safetensors") == [0, 1]
    assert put_aside(tmp_path, of_run("c", 0, 0)) == {""} and names("safetensors") == []
    (tmp_path / "schedule-000007.safetensors").write_bytes(b"torn")
    assert put_aside(tmp_path, of_run("c", 1, 16)) == set() and names("safetensors") == [7]


def test_a_second_run_over_a_run_dir_leaves_only_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def records(run: str, count: int, every: int) -> None:
        recorder = Recorder(str(tmp_path), None)
        for version in range(count):
            schedule = of_run(run, version, every * version)
            schedule = dataclasses.replace(schedule, meta={"decided_at_step": version})
            explanation = {"version": version, "samples": []}
            recorder.made(
                RefreshResult(
                    schedule, Table(SampleRecords.empty(8)), Table(Losses.empty()), RefreshState(), {}, {}, {}, explanation
                )
            )
            recorder.settle()

    for count, (run, length) in enumerate((("a", 5), ("b", 3), ("c", 2))):
        records(run, length, 16 * (count + 1))
        assert [(s.run, s.version) for s in load_book(tmp_path / "schedules").schedules] == [(run, v) for v in range(length)]
        lines = [json.loads(line) for line in (tmp_path / "refreshes.jsonl").read_text().splitlines()]
        assert [(line["run"], line["version"]) for line in lines] == [(run, v) for v in range(length)]
        assert len(list((tmp_path / "reports").glob("report-*.json"))) == length
        assert caplog.text.count("give every run a run_dir of its own") == count
    assert len((tmp_path / "refreshes.abandoned").read_text().splitlines()) == 5
    assert len((tmp_path / "refreshes-1.abandoned").read_text().splitlines()) == 3
    assert (tmp_path / "reports-1.abandoned").is_dir()
