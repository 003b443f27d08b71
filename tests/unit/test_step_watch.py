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


def test_batches_whose_samples_are_not_known_are_not_judged() -> None:
    which = book()
    batches = [batch(which, q, HALF) for q in range(3)]
    batches[1] = IssuedBatch(np.full(ROWS, -1, np.int64), 2, [])
    watch = watched(HALF, batches)
    watch.compare(LocalComm(5.0), which, HALF, 3 * HALF.micro)
    assert watch.mismatches == 0


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
    assert not caplog.text
    watch.published({**meta, "known_influence": 0})
    assert "no influence known" in caplog.text
