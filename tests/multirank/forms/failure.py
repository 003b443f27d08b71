"""What fails on the way."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.multirank.forms.job import Job, trained
from tests.multirank.forms.registry import LEFT_OUT, form

FAILURES = "Failures"


def _tag(name: str) -> str:
    folder = Path(sys.argv[2]) / "saved" / name
    return str(folder)


@form(FAILURES, "a checkpoint in the middle of the run, loaded again")
def failure_none() -> dict[str, Any]:
    job = Job()
    job.train(5)
    job.engine.save_checkpoint(_tag("none"))
    job.train(2)
    job.engine.load_checkpoint(_tag("none"))
    job.train(4)
    return job.found(expected=9 * job.controller.geometry.batch)


@form(FAILURES, "GRACE's part of a checkpoint cannot be written: the engine's is saved")
def failure_save() -> dict[str, Any]:
    import torch.distributed as dist

    job, folder = Job(), Path(_tag("blocked"))
    job.train(5)
    if dist.get_rank() == 0:
        (folder / "t").mkdir(parents=True)
        (folder / "t" / "grace_ds").write_text("a file where our folder would be")
    dist.barrier()
    job.engine.save_checkpoint(str(folder), tag="t")
    job.train(5)
    assert (folder / "t" / "mp_rank_00_model_states.pt").exists()
    return job.found()


@form(FAILURES, "a rank late for a refresh: training, saving and loading go on", LEFT_OUT, "GRACE is frozen")
def failure_late() -> dict[str, Any]:
    job = Job(grace={"refresh": {"interval_steps": 4, "cadence": "fixed", "timeout_seconds": 2}})
    c = job.controller
    job.train(1)
    job.engine.save_checkpoint(_tag("late"))
    saved = [schedule.digest() for schedule in c.book.schedules]
    job.train(2)
    _spoil(job, rank=1, late=4.0)
    job.train(3)
    assert c.frozen and [schedule.digest() for schedule in c.book.schedules] != saved
    job.engine.save_checkpoint(_tag("late"), tag="frozen")
    job.engine.load_checkpoint(_tag("late"), tag="global_step1")
    assert [schedule.digest() for schedule in c.book.schedules] == saved
    job.train(3)
    job.engine.save_checkpoint(_tag("late"), tag="again")
    job.engine.load_checkpoint(_tag("late"), tag="again")  # has no state of ours: the job's own order goes on
    ahead = c.cursor + np.arange(2 * c.geometry.batch)
    assert c.book.slots(c.cursor, len(ahead)).ids.tolist() == c.context.order(ahead).tolist()
    job.train(2)
    return job.found(expected=6 * c.geometry.batch)


@form(FAILURES, "the answer to a refresh lost on one rank, a checkpoint after it", LEFT_OUT, "GRACE is frozen")
def failure_answer_lost() -> dict[str, Any]:
    from grace_ds.errors import TransportTimeout

    job = Job()
    job.train(3)
    comm, original = job.controller.comm, job.controller.comm.agree

    def agree() -> None:
        original()
        comm._retire("the answer was lost")  # type: ignore[attr-defined]
        raise TransportTimeout("the answer was lost")

    if comm.rank == 1:
        comm.agree = agree  # type: ignore[method-assign]
    job.train(1)
    job.engine.save_checkpoint(_tag("lost"))
    job.train(5)
    job.engine.load_checkpoint(_tag("lost"))
    job.train(2)
    assert job.controller.frozen
    return job.found(expected=6 * job.controller.geometry.batch)


@form(FAILURES, "an exception in a refresh on one rank: the old schedule stays")
def failure_refresh() -> dict[str, Any]:
    job = Job()
    job.train(3)
    _spoil(job, rank=1)
    job.train(7)
    return job.found(gave_up=job.controller.metrics.refresh_failures)


def _spoil(job: Job, rank: int, late: float = 0.0) -> None:
    """Lets the next refresh fail on a rank, or be late there."""
    import time

    context, original = job.controller.context, job.controller.context.contents
    once = [job.controller.comm.rank == rank]

    def contents(kept: Any, ids: Any) -> Any:
        if once.pop() if once else False:
            if not late:
                raise OSError("the disk has gone")
            time.sleep(late)
        return original(kept, ids)

    changed = dataclasses.replace(context, contents=contents)
    job.controller.context = job.controller.runner.context = changed


@form(FAILURES, "a loss that is not finite on one rank")
def failure_nan() -> dict[str, Any]:
    def forward(job: Job, b: Any) -> torch.Tensor:
        loss = job.engine(b)
        return loss * (float("nan") if job.controller.comm.rank == 1 and job.engine.global_steps == 4 else 1.0)

    return trained(forward)
