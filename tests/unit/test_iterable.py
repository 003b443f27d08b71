"""The buffer that gives an iterable dataset's samples by their positions, and the windows over it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from grace_ds.config.load import load_config, refuse_over_stream
from grace_ds.data.dataset import IdDataset
from grace_ds.data.iterable import IterableBuffer, IterableSampler, is_iterable, map_style
from grace_ds.data.iterable_pool import IterablePool
from grace_ds.data.sampler import Geometry
from grace_ds.data.schedule import ScheduleBook
from grace_ds.errors import CheckpointError, ConfigError, DataError
from grace_ds.records import IntArray, Role, Schedule


class Numbers(IterableDataset[dict[str, Any]]):
    """Passes of given lengths; sample i of pass p holds (p, i).  It draws from the global random states as it goes."""

    def __init__(self, *lengths: int, salt: int = 0) -> None:
        super().__init__()
        self.lengths, self.salt, self.epoch, self.begun = lengths, salt, 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.begun += 1
        epoch = self.epoch
        for i in range(self.lengths[min(epoch, len(self.lengths) - 1)]):
            random.random(), np.random.rand(), torch.rand(1)
            yield {"at": (epoch, i), "input_ids": [self.salt, epoch, i]}


def at(buffer: IterableBuffer, position: int) -> tuple[int, int]:
    found: tuple[int, int] = buffer[position]["at"]
    return found


def test_what_counts_as_iterable() -> None:
    assert is_iterable(Numbers(3)) and is_iterable(DataLoader([1, 2], batch_size=None))
    assert not is_iterable([1, 2]) and not is_iterable(object())
    assert map_style([1, 2]) == [1, 2]
    with pytest.raises(DataError, match="cannot be started again"):
        map_style(iter([1]))
    IdDataset(map_style(Numbers(3)))


def test_streaming_datasets_of_hugging_face_are_read() -> None:
    datasets = pytest.importorskip("datasets")
    streamed = datasets.Dataset.from_dict({"input_ids": [[i, i] for i in range(30)]}).to_iterable_dataset(num_shards=3)
    shuffled = streamed.shuffle(seed=1, buffer_size=7)
    buffer = IterableBuffer(shuffled)
    seen = [buffer[i]["input_ids"][0] for i in range(60)]
    assert sorted(seen[:30]) == sorted(seen[30:]) == list(range(30))
    assert seen[:30] != seen[30:]  # set_epoch was called for the second pass
    again = IterableBuffer(shuffled)
    again.hold(41, [30])  # by its own skip
    assert [again[i]["input_ids"][0] for i in range(41, 60)] == seen[41:]


def test_positions_go_on_over_the_passes() -> None:
    buffer = IterableBuffer(Numbers(3, 2, 4))
    assert [at(buffer, i) for i in range(10)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (2, 3), (3, 0)]
    assert buffer.ends == [3, 5, 9]
    assert [buffer.pass_length(before) for before in (3, 4, 5, 6, 9, 10)] == [0, 3, 3, 2, 2, 4]


@pytest.mark.parametrize("low", range(12))
@pytest.mark.parametrize("read", [1, 4, 7, 11])
@pytest.mark.parametrize("told", [True, False])
def test_it_goes_to_any_position_and_back(low: int, read: int, told: bool) -> None:
    whole = IterableBuffer(Numbers(3, 2, 4))
    expected = [at(whole, i) for i in range(14)]
    buffer = IterableBuffer(Numbers(3, 2, 4))
    buffer.read_to(read)
    buffer.hold(low, [end for end in (3, 5, 9) if end < low + 3] if told else None)
    assert [at(buffer, i) for i in range(low, 14)] == expected[low:]
    assert at(buffer, 0) == expected[0]  # dropped or not
    assert [at(buffer, i) for i in range(14)] == expected
    assert buffer.ends == whole.ends


def test_a_resume_in_a_later_pass_does_not_read_the_earlier_ones() -> None:
    source = Numbers(3, 2, 400)
    buffer = IterableBuffer(source)
    buffer.hold(6, [3, 5])
    assert at(buffer, 6) == (2, 1) and source.begun == 1


def test_only_what_is_held_stays_in_memory() -> None:
    buffer = IterableBuffer(Numbers(100))
    buffer.read_to(60)
    buffer.hold(40)
    assert sorted(buffer._held) == list(range(40, 60))


def test_reading_leaves_the_random_states_alone() -> None:
    buffer = IterableBuffer(Numbers(100))
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    buffer.read_to(10)
    buffer.hold(30)
    buffer.hold(2)
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert (np.random.get_state()[1] == states[2]).all()


def test_it_reads_ahead_as_far_as_it_may() -> None:
    buffer = IterableBuffer(Numbers(100))
    buffer.read_to(10)
    buffer.read_ahead(4, 21)
    seen = []
    for i in range(5):
        buffer[i]
        seen.append(buffer.high)
    assert seen == [14, 18, 21, 21, 21]


def test_a_change_of_an_item_in_the_collate_function_does_not_last() -> None:
    buffer = IterableBuffer(Numbers(3))
    buffer[0].pop("at")
    assert at(buffer, 0) == (0, 0)


def test_a_stream_that_gives_nothing_is_an_error() -> None:
    with pytest.raises(DataError, match="gave no sample in pass 0"):
        IterableBuffer(Numbers(0))[0]

    class Broken(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield 1
            raise RuntimeError("torn file")

    with pytest.raises(DataError, match="sample 1 of the stream raised RuntimeError: torn file"):
        IterableBuffer(Broken())[1]


def test_the_digest_knows_every_kind_of_entry() -> None:
    kinds = [
        [{"x": torch.arange(3)}, {"x": torch.arange(3).to(torch.bfloat16)}],
        [{"x": [1, 2]}, {"x": [2, 1]}],
        [{"x": np.ones(2)}, {"x": np.ones((2, 1))}],
        [{"x": "a"}, {"y": "a"}],
        [("a", ["b"]), ("a", ["c"])],
    ]
    digests = [
        IterableBuffer(DataLoader(items, batch_size=None, collate_fn=lambda x: x)).digest(i, i + 1)
        for items in kinds
        for i in (0, 1)
    ]
    assert len(set(digests)) == len(digests)


# -- the windows -------------------------------------------------------------------------------------------------------


def chosen(version: int, start: int, ids: IntArray, meta: Any) -> Schedule:
    return Schedule(version, start, ids, np.full(len(ids), Role.CORE, np.uint8), np.ones(len(ids), np.float32), 0, meta)


def pool_of(source: Any, budget: float = 0.25, window: int = 0) -> IterablePool:
    return IterablePool(IterableBuffer(source), window, budget, interval_steps=5, batch=4, ranks=2)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("length", [10_000, 700, 100, 33])
def test_whatever_the_schedules_do_no_sample_is_lost(seed: int, length: int) -> None:
    rng = np.random.default_rng(seed)
    pool, book, trained = pool_of(Numbers(length)), ScheduleBook(), np.empty(0, np.int64)
    behind, start, eligible_until, passed_before = trained, 0, 0, 0
    for version in range(30):
        # A loader has been given more than was trained on when a refresh begins.
        placed = pool.place(version, start, book, behind)
        stand = placed.meta["stream"]
        open_ids = np.setdiff1d(placed.ids, placed.closed)
        assert not np.isin(open_ids, trained).any()
        assert (np.diff(placed.ids) == 1).all() and len(placed.ids) <= min(pool.size, length)
        assert stand["passed"] >= passed_before and len(open_ids)
        if not (book.schedules and "drawn_by" not in book.schedules[-1].meta):
            assert stand["passed"] <= max(eligible_until, 0)  # all below was in some window, and could be chosen
        eligible_until, passed_before = stand["high"], stand["passed"]
        slots = int(rng.integers(8, 30))
        if rng.random() < 0.4:
            ids, meta = placed.order(np.arange(start, start + slots)), {**placed.meta}  # type: ignore[misc]
            assert not np.isin(ids, trained).any() and (np.diff(ids) > 0).all() and ids.min() >= stand["passed"]
            left = np.setdiff1d(np.arange(stand["passed"], ids.max()), ids)
            assert np.isin(left, trained).all()  # in order, what is left out was trained on before
        else:
            ids, meta = rng.choice(open_ids, min(slots, len(open_ids)), replace=False), {**placed.meta, "drawn_by": "grace"}
        book.publish(chosen(version, start, ids, meta))
        pool.hold(book.schedules[-2:])
        used = int(rng.integers(0, len(ids) + 1))
        behind = trained
        trained = np.union1d(trained, book.slots(start, used).ids) if used else trained
        start += used
        book.prune(start)


def test_a_chosen_schedule_passes_as_much_as_the_budget_says() -> None:
    pool, book = pool_of(Numbers(10_000)), ScheduleBook()
    first = pool.place(0, 0, book, np.empty(0, np.int64))
    assert (first.ids[0], len(first.ids), len(first.closed)) == (0, 2 * 5 * 4 * 4, 0)
    book.publish(chosen(0, 0, first.ids[:25], {**first.meta, "drawn_by": "grace"}))
    second = pool.place(1, 20, book, np.empty(0, np.int64))
    assert second.meta["stream"]["passed"] == 80 and len(second.closed) == 40 and second.ids[0] == 40


def test_a_stream_shorter_than_a_window_is_one_window() -> None:
    pool = pool_of(Numbers(50))
    assert pool.size == 50
    placed = pool.place(0, 0, ScheduleBook(), np.empty(0, np.int64))
    assert len(placed.ids) == 50


def test_a_window_too_small_for_the_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match="need at least 107"):
        pool_of(Numbers(1000), window=106)
    assert pool_of(Numbers(1000), window=107).size == 107


def test_another_stream_than_that_of_a_schedule_is_found_out() -> None:
    pool = pool_of(Numbers(500))
    placed = pool.place(0, 0, ScheduleBook(), np.empty(0, np.int64))
    schedule = chosen(0, 0, placed.ids[:20], dict(placed.meta))
    pool_of(Numbers(500)).check([schedule])
    with pytest.raises(CheckpointError, match="gives other samples at its positions 0 to 160"):
        pool_of(Numbers(500, salt=1)).check([schedule])


def test_an_iteration_ends_after_as_many_samples_as_a_pass_holds() -> None:
    meta = {"stream": {"pass_length": 50}}
    book = ScheduleBook([chosen(0, 0, np.arange(30), {"stream": {"pass_length": 0}}), chosen(1, 24, np.arange(30, 300), meta)])
    for rank in range(2):
        sampler = IterableSampler(book, Geometry(2, rank, 2, 1), drop_last=False)
        issued = [pair for pair in sampler]
        assert len(issued) == 2 * 13 and sampler.issued == 13
        sampler.frontier = 13
        assert [position for position, _ in sampler] == [position + 52 for position, _ in issued]
    assert sum(1 for _ in IterableSampler(book, Geometry(2, 0, 2, 1), drop_last=True)) == 2 * 12


@pytest.mark.parametrize(
    "block",
    [
        {"mode": "shadow"},
        {"replay": "x"},
        {"selection": {"include": "x"}},
        {"selection": {"sources": "x"}},
        {"features": {"cache_dir": "x"}},
    ],
)
def test_what_needs_an_index_is_refused(block: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="needs a dataset that can be read by index"):
        refuse_over_stream(load_config({"enabled": True, **block}, "block"))
    refuse_over_stream(load_config({"enabled": True}, "block"))
