"""What is watched of every step: each breach is counted, told once, and nothing else is."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from grace_ds.comm.local import LocalComm
from grace_ds.data.in_flight import InFlightBatches, IssuedBatch
from grace_ds.data.sampler import Geometry
from grace_ds.data.schedule import ScheduleBook
from grace_ds.integrations import step_watch as watch_module
from grace_ds.integrations.step_watch import StepWatch
from grace_ds.records import Role, Schedule

RANKS, ROWS, ACCUMULATION = 2, 3, 2
HALF = Geometry(1, 0, ROWS, ACCUMULATION)


def book(n: int = 60) -> ScheduleBook:
    ids = np.random.default_rng(1).permutation(1000)[:n].astype(np.int64)
    return ScheduleBook([Schedule(0, 0, ids, np.full(n, Role.CORE, np.uint8), np.ones(n, np.float32), 0)])


def batch(which: ScheduleBook, q: int, g: Geometry) -> IssuedBatch:
    return IssuedBatch(which.slots(q * g.micro + g.rank * g.rows, g.rows).ids, q + 1, [])


def watched(g: Geometry, batches: list[IssuedBatch]) -> StepWatch:
    watch = StepWatch()
    watch.restart(0)
    for one in batches:
        watch.trained(one, g)
    return watch


@pytest.mark.parametrize("shuffle", [False, True])
def test_what_the_schedule_says_passes_in_any_order_of_batches(shuffle: bool, caplog: pytest.LogCaptureFixture) -> None:
    which, count = book(), 8
    batches = [batch(which, q, HALF) for q in range(count)]
    watch = watched(HALF, batches[::-1] if shuffle else batches)
    watch.compare(LocalComm(5.0), which, HALF, count * HALF.micro)
    assert watch.counts()["order_mismatches"] == 0 and not caplog.text


def test_what_is_summed_up_on_the_way_and_from_one_refresh_to_the_next_passes_and_tells(caplog: pytest.LogCaptureFixture) -> None:
    count = 2 * watch_module._FOLDED + 7
    which = book(2 * count * HALF.micro)
    watch = watched(HALF, [batch(which, q, HALF) for q in range(count)])
    watch.compare(LocalComm(5.0), which, HALF, count * HALF.micro)
    for q in range(count, 2 * count):
        watch.trained(batch(which, q, HALF), HALF)
    watch.compare(LocalComm(5.0), which, HALF, 2 * count * HALF.micro)
    assert watch.mismatches == 0 and not caplog.text
    watch = watched(HALF, [batch(which, q, HALF) for q in (1, *range(1, count))])
    watch.compare(LocalComm(5.0), which, HALF, count * HALF.micro)
    assert watch.mismatches == 1


@pytest.mark.parametrize(("q", "row"), list(product(range(3), range(ROWS))))
def test_one_other_sample_is_noticed_wherever_it_stands(q: int, row: int, caplog: pytest.LogCaptureFixture) -> None:
    which = book()
    batches = [batch(which, q, HALF) for q in range(3)]
    batches[q].ids[row] += 1
    watch = watched(HALF, batches)
    watch.compare(LocalComm(5.0), which, HALF, 3 * HALF.micro)
    assert watch.mismatches == 1 and "have not trained on what the schedule says" in caplog.text
    watch.compare(LocalComm(5.0), which, HALF, 3 * HALF.micro)  # nothing since then
    assert watch.mismatches == 1
    watch.trained(IssuedBatch(batches[q].ids, 4, []), HALF)
    watch.compare(LocalComm(5.0), which, HALF, 4 * HALF.micro)
    assert watch.mismatches == 2 and caplog.text.count("have not trained on what the schedule says") == 1


def test_samples_that_have_changed_places_or_were_left_out_are_noticed() -> None:
    which = book()
    for change in ("swapped", "missing", "twice"):
        batches = [batch(which, q, HALF) for q in range(3)]
        if change == "swapped":
            batches[0].ids[0], batches[1].ids[0] = int(batches[1].ids[0]), int(batches[0].ids[0])
        batches = batches[1:] if change == "missing" else batches + batches[:1] * (change == "twice")
        watch = watched(HALF, batches)
        watch.compare(LocalComm(5.0), which, HALF, 3 * HALF.micro)
        assert watch.mismatches == 1, change


@pytest.mark.parametrize("ids", [[-1] * ROWS, [4], []], ids=["hidden", "dropped", "empty"])
def test_batches_whose_samples_are_not_known_are_not_judged(ids: list[int]) -> None:
    which = book()
    batches = [batch(which, q, HALF) for q in range(3)]
    batches[1] = IssuedBatch(np.array(ids, np.int64), 2, [])
    watch = watched(HALF, batches)
    watch.compare(LocalComm(5.0), which, HALF, 3 * HALF.micro)
    assert watch.mismatches == 0


def test_batches_of_the_jobs_own_sampler_are_no_part_of_the_order() -> None:
    which = book()
    watch = watched(HALF, [IssuedBatch(np.arange(ROWS), 0, []), *(batch(which, q, HALF) for q in range(3))])
    watch.compare(LocalComm(5.0), which, HALF, 3 * HALF.micro)
    assert watch.mismatches == 0


def test_steps_that_were_counted_are_not_judged() -> None:
    which, out = book(), in_flight(8, recognised=False)
    watch = watched(HALF, [])
    moved = sum(watch.advance(0, HALF, out) for _ in range(2))
    watch.trained(batch(which, moved, HALF), HALF)  # the first one that is recognised
    watch.compare(LocalComm(5.0), which, HALF, (moved + 1) * HALF.micro)
    assert watch.counting and watch.mismatches == 0


def in_flight(batches: int, recognised: bool) -> InFlightBatches:
    out = InFlightBatches(HALF)
    for q in range(batches):
        out.issue(torch.arange(ROWS) + q * ROWS, torch.arange(ROWS), torch.rand(ROWS, 4))
    out.recognised = recognised
    return out


def test_steps_are_counted_where_no_batch_was_ever_recognised(caplog: pytest.LogCaptureFixture) -> None:
    watch, out = StepWatch(), in_flight(12, recognised=False)
    assert [watch.advance(0, HALF, out) for _ in range(4)] == [0, 2 * ACCUMULATION, ACCUMULATION, ACCUMULATION]
    assert len(out) == 12 - 4 * ACCUMULATION and caplog.text.count("not recognised as the loader's") == 1
    assert watch.slips == 0


@pytest.mark.parametrize("between", ["another source", "a checkpoint"])
def test_steps_are_counted_only_after_several_in_a_row(between: str) -> None:
    watch, out = StepWatch(), in_flight(6, recognised=False)
    assert watch.advance(0, HALF, out) == 0
    if between == "a checkpoint":
        watch.restart(0)
    else:
        assert watch.advance(0, HALF, in_flight(0, recognised=False)) == 0
    assert [watch.advance(0, HALF, out) for _ in range(2)] == [0, 2 * ACCUMULATION]


def test_steps_on_another_source_move_nothing(caplog: pytest.LogCaptureFixture) -> None:
    for out in (in_flight(0, recognised=False), in_flight(3, recognised=True)):
        watch = StepWatch()
        assert [watch.advance(0, HALF, out) for _ in range(9)] == [0] * 9
        assert watch.slips == 0
    assert not caplog.text


def test_a_step_of_another_length_is_a_slip_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = StepWatch()
    for moved in (ACCUMULATION, ACCUMULATION + 1, 1, ACCUMULATION, 5):
        assert watch.advance(moved, HALF, in_flight(1, recognised=True)) == 0
    assert watch.slips == 3 and caplog.text.count("moved the order of samples on") == 1


def test_collected_steps_without_rows_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = StepWatch()
    for rows, expected in ((3, True), (0, False), (0, True), (0, True)):
        watch.collected(rows, expected)
    assert watch.empty_steps == 2 and caplog.text.count("gave no rows") == 1


def test_a_coreset_larger_than_what_the_filters_leave_is_told(caplog: pytest.LogCaptureFixture) -> None:
    watch = StepWatch()
    watch.published({"effective_share": 0.5, "window": 100, "coreset": 50})
    watch.published({"window": 100, "coreset": 100})  # uniform order
    assert not caplog.text
    for _ in range(2):
        watch.published({"effective_share": 0.2, "window": 100, "coreset": 50})
    assert caplog.text.count("leave 20 effective ones") == 1


def test_gradients_that_never_tell_an_influence_are_told(caplog: pytest.LogCaptureFixture) -> None:
    watch, meta = StepWatch(), {"window": 100, "coreset": 20, "parts": ["gradients"]}
    for known in (0, 0, 7, 0, 0):
        watch.published({**meta, "known_influence": known})
    watch.published({"window": 100, "coreset": 100})  # without gradients in between
    for _ in range(2):
        watch.published({**meta, "known_influence": 0})
    assert not caplog.text
    for _ in range(3):
        watch.published({**meta, "known_influence": 0})
    assert caplog.text.count("no influence known") == 1
