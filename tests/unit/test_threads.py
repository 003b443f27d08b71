"""Work by threads in order, and how many there should be."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

from grace_ds.utils.threads import AHEAD, in_order, threads_of_rank


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_results_come_in_the_order_of_the_parts(threads: int) -> None:
    def work(i: int) -> int:
        time.sleep(0.002 * (i % 3))
        return i * i

    assert list(in_order(work, range(50), threads)) == [i * i for i in range(50)]
    assert list(in_order(work, [], threads)) == []


def test_parts_are_made_by_the_caller_and_not_all_at_once() -> None:
    made: list[int] = []

    def parts() -> Iterator[int]:
        for i in range(100):
            assert threading.current_thread() is caller
            made.append(i)
            yield i

    caller = threading.current_thread()
    results = in_order(lambda i: i, parts(), 3)
    assert next(results) == 0
    assert len(made) <= AHEAD * 3 + 2
    results.close()
    assert len(made) < 100


def test_threads_work_at_the_same_time() -> None:
    meeting = threading.Barrier(3, timeout=20)
    assert len(list(in_order(lambda i: meeting.wait() is not None, range(3), 3))) == 3


def test_an_error_is_raised_and_leaves_no_thread() -> None:
    before = threading.active_count()

    def work(i: int) -> int:
        if i == 5:
            raise ValueError("five")
        return i

    with pytest.raises(ValueError, match="five"):
        list(in_order(work, range(1000), 4))
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("environment", "cores", "threads"),
    [
        ({}, 16, 16),
        ({"OMP_NUM_THREADS": "4"}, 16, 4),
        ({"OMP_NUM_THREADS": "64"}, 16, 16),
        ({"OMP_NUM_THREADS": "3,2"}, 16, 3),  # by level of nesting
        ({"OMP_NUM_THREADS": "many"}, 16, 16),
        ({"OMP_NUM_THREADS": "0"}, 16, 16),
        ({"LOCAL_WORLD_SIZE": "8"}, 64, 8),
        ({"LOCAL_WORLD_SIZE": "8"}, 4, 4),  # bound to its own share: not divided again
        ({"LOCAL_WORLD_SIZE": "128"}, 64, 1),
        ({"LOCAL_SIZE": "4"}, 64, 16),  # of the deepspeed launcher
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMP_NUM_THREADS": "5"}, 64, 5),
        ({"LOCAL_WORLD_SIZE": "8", "OMP_NUM_THREADS": "1"}, 64, 1),
        ({"LOCAL_WORLD_SIZE": "8", "OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, 64, 8),  # torchrun's own
        ({"LOCAL_WORLD_SIZE": "8", "OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "none"}, 64, 2),
    ],
)
def test_a_rank_takes_its_share_of_the_cores(
    environment: dict[str, str], cores: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert threads_of_rank(environment, frozenset(range(cores))) == threads


def test_cores_that_a_process_may_not_run_on_do_not_count() -> None:
    assert threads_of_rank({}) == len(os.sched_getaffinity(0))
