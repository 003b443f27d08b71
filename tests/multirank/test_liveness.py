"""Asking after the other ranks, and the time limit of groups that were made without one: on real processes."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest

from grace_ds.comm.liveness import ENDED, LivenessProbe
from tests.multirank.harness import World, run_ranks

pytestmark = pytest.mark.multirank


def roll_call(world: World, folder: str) -> list[dict[int, str]]:
    """Rank 1 is stuck, rank 2 is killed while a child of its own lives on."""
    import torch.distributed as dist

    if world.rank == 1:
        Path(folder, "stuck").write_text(str(os.getpid()))
    call = LivenessProbe.open({})
    found = [call.absent()]
    dist.barrier()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)  # no thread of it runs any more, until rank 0 wakes it
    elif world.rank == 2:
        if os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        found.append(call.absent(patience=10.0))
        os.kill(int(Path(folder, "stuck").read_text()), signal.SIGCONT)
    call.close()
    return [*found, call.absent()]


def test_a_stuck_rank_answers_and_a_killed_one_does_not_though_its_child_lives(tmp_path: Path) -> None:
    first, *_ = run_ranks(roll_call, 3, str(tmp_path), timeout=60, may_fail=[2])
    assert first == [{}, {2: ENDED}, {}]


def limits(world: World) -> list[tuple[str, float]]:
    import torch
    import torch.distributed as dist

    from grace_ds.comm.time_limits import adopt_job_limit, job_limit

    rendezvous = f"file://{world.rendezvous}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=world.rank, world_size=world.size, timeout=timedelta(seconds=7))
    groups = {"usual": dist.new_group([0, 1]), "own": dist.new_group([0, 1], timeout=timedelta(seconds=90))}
    assert job_limit() == timedelta(seconds=7)
    changed = adopt_job_limit()
    cpu = torch.device("cpu")
    told = [(name, group._get_backend(cpu).options._timeout.total_seconds()) for name, group in groups.items()]
    if world.rank == 0:  # the other never comes
        started = time.monotonic()
        with pytest.raises(RuntimeError):
            dist.all_reduce(torch.zeros(3), group=groups["usual"])
        told.append(("waited", time.monotonic() - started))
    else:
        time.sleep(10)
    return [*told, ("changed", float(changed)), ("again", float(adopt_job_limit()))]


def refresh_limits(world: World) -> tuple[float, float, float]:
    import torch.distributed as dist

    from grace_ds.comm.time_limits import within_job_limit

    before = within_job_limit(600.0)
    rendezvous = f"file://{world.rendezvous}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=world.rank, world_size=world.size, timeout=timedelta(seconds=60))
    return before, within_job_limit(59.0), within_job_limit(60.0)


def test_a_refresh_is_given_up_before_the_jobs_own_limit_ends_the_job(tmp_path: Path) -> None:
    assert run_ranks(refresh_limits, 1, timeout=60, join=False) == [(600.0, 59.0, 30.0)]


def test_a_group_made_without_a_limit_waits_as_long_as_the_job(tmp_path: Path) -> None:
    for told in run_ranks(limits, 2, timeout=60, join=False):
        found = dict(told)
        assert (found["usual"], found["own"], found["changed"], found["again"]) == (7.0, 90.0, 1.0, 0.0)
        assert 6 < found.get("waited", 7.0) < 20
