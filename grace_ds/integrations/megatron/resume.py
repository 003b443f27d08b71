"""Resume a run from the schedules in its ``run_dir``; everything else follows from them and the samples consumed.

GRACE does not extend Megatron's checkpoints, which have several formats and are written asynchronously.  Megatron resumes by
``consumed_samples`` alone, and so does GRACE: it reads back the schedules decided up to that step, and puts aside later ones,
which the resumed run has not reached.
"""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from grace_ds.comm.all_ranks import run_on_all_ranks
from grace_ds.comm.buckets import owner_of
from grace_ds.data.schedule import VisitCounts, load_schedule
from grace_ds.errors import CheckpointError
from grace_ds.integrations.controller import Controller
from grace_ds.records import Schedule
from grace_ds.refresh import trigger
from grace_ds.refresh.broadcast import broadcast_schedule
from grace_ds.refresh.state import RefreshState
from grace_ds.utils.files import write_atomic
from grace_ds.utils.reading import read_json

log = logging.getLogger("grace_ds")

_FACTS = "dataset.json"


def keep_facts(run_dir: str, digest: str, samples: int, batch: int) -> None:
    """Record what the run's ids mean; on rank 0.

    Raises:
        CheckpointError: ``run_dir`` cannot be written.
    """
    facts = {"digest": digest, "samples": samples, "batch": batch}
    try:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        write_atomic(Path(run_dir) / _FACTS, json.dumps(facts, indent=1).encode())
    except OSError as error:
        raise CheckpointError(f"run_dir {run_dir} cannot be written ({error}): a resume would not find its schedules") from error


def resume(controller: Controller, run_dir: str | None, digest: str, step: int, cursor: int) -> bool:
    """Restore the controller to its state after ``step`` steps.  Collective.

    Returns:
        Whether there was anything to resume; the same on every rank.

    Raises:
        CheckpointError: the run had another dataset, or schedules are missing, damaged or of other samples; on every rank.
    """
    saved = run_on_all_ranks(
        controller.comm, lambda: _read(run_dir, digest, controller, step, cursor) if controller.comm.rank == 0 else []
    )
    count = int(controller.comm.broadcast(np.array([len(saved)], np.int64))[0])
    if not count:
        return False
    schedules = [broadcast_schedule(controller.comm, saved[i] if saved else None) for i in range(count)]
    controller.context.pool.check(schedules)
    last = schedules[-1]
    controller.book.replace(schedules)
    # The visits are counted again at the next refresh, from all schedules.
    controller.visits, controller.counted = VisitCounts(), schedules[0].start
    controller.metrics.version, controller.metrics.refreshes = last.version, last.version + 1
    controller.next_refresh = int(last.meta["next_refresh_step"])
    controller.stand_at(step, cursor)
    _restore_content(controller, schedules)
    return True


def _restore_content(controller: Controller, schedules: list[Schedule]) -> None:
    """Compute the content features of the last schedule's window as they were.  Collective.

    In a window that moves, a sample's features are those of the window that it entered.  So the windows are followed again from
    the last one that has no sample in common with the present one.  The next refresh computes those of a fixed window itself.
    """
    context = controller.context
    pool, comm = context.pool, context.comm
    read = [s.version for s in schedules if not trigger.is_uniform(controller.config, int(s.meta["decided_at_step"]))]
    if not pool.advance or not read:
        return
    content = None
    for version in range(max(read[0], read[-1] - -(-pool.size // pool.advance)), read[-1] + 1):
        window = pool.known(version, controller.book)
        content = context.contents(content, window[owner_of(window, comm.size) == comm.rank])
    controller.kept = RefreshState(content)


def _read(run_dir: str | None, digest: str, controller: Controller, step: int, cursor: int) -> list[Schedule]:
    """Return the schedules of the run so far, on one rank; put later ones aside."""
    folder = Path(run_dir or "") / "schedules"
    if run_dir is None or not (Path(run_dir) / _FACTS).is_file():
        return []
    facts = _facts(Path(run_dir))
    if facts["digest"] != digest:
        raise CheckpointError(
            f"{run_dir} was made with the dataset {facts['digest']} of {facts['samples']} samples, this one is {digest}: its "
            "path, split, seed, sequence length or tokeniser has changed, so that ids mean other samples. Restore the old "
            "settings, or begin another selection with a fresh run_dir"
        )
    if facts["batch"] != controller.geometry.batch:
        raise CheckpointError(
            f"{run_dir} was made with {facts['batch']} samples a step, this run has {controller.geometry.batch}: steps would not "
            "be the same; restore --global-batch-size, or give a fresh run_dir"
        )
    kept: list[Schedule] = []
    for path in sorted(folder.glob("schedule-*.safetensors")):
        schedule = load_schedule(path, Path(run_dir))
        numbers = [schedule.meta.get(key) for key in ("decided_at_step", "next_refresh_step")]
        if not all(type(number) is int for number in numbers):
            raise CheckpointError(f"{path} does not say at which step it was decided, and which follows; give a fresh run_dir")
        if schedule.meta["decided_at_step"] > step:
            path.rename(path.with_suffix(".abandoned"))
        else:
            kept.append(schedule)
    if kept and [schedule.version for schedule in kept] != list(range(len(kept))):
        missing = sorted(set(range(len(kept))) - {schedule.version for schedule in kept})
        raise CheckpointError(f"{folder} lacks schedule {missing[0]}; restore it, or give a fresh run_dir")
    if kept and kept[0].start > cursor:
        raise CheckpointError(f"{folder} begins at sample {kept[0].start}, and the job resumes at {cursor}; give a fresh run_dir")
    return kept


def _facts(run_dir: Path) -> dict[str, Any]:
    """Return what :func:`keep_facts` has recorded.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        facts = read_json(run_dir / _FACTS, root=run_dir)
        return {key: facts[key] for key in ("digest", "samples", "batch")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{run_dir / _FACTS} cannot be read ({type(error).__name__}: {error}); restore it, or give a fresh run_dir"
        ) from error


def begin(run_dir: str) -> None:
    """Put aside the schedules that an earlier run has left in ``run_dir``, for a run that begins there.  On one rank."""
    folder = Path(run_dir) / "schedules"
    if folder.is_dir():
        number = next(i for i in itertools.count() if not folder.with_name(f"schedules-{i}").exists())
        folder.rename(folder.with_name(f"schedules-{number}"))
