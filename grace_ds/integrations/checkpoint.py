"""Save and load GRACE's part of a checkpoint: files beside the engine's, written before them and read after them.

``TAG/grace_ds/`` holds the bucket files of the tables and of the window (one per rank), the published schedules, the visit
counts, the trusted basis and gradient, and ``manifest.json`` with every scalar and every file's digest.  The manifest's own
digest goes into the engine's client state, so that a folder that is torn or of another checkpoint is detected.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as save_arrays

from grace_ds.comm.all_ranks import run_on_all_ranks
from grace_ds.data.schedule import save_schedule
from grace_ds.errors import CheckpointError, DamagedState, TransportError
from grace_ds.gradients.basis import TrustedBasis
from grace_ds.integrations.checkpoint_state import BASIS, GRADIENT, MANIFEST, SCHEMA, SHARED, VISITS, CheckpointState, read_saved
from grace_ds.integrations.controller import Controller
from grace_ds.records import Array
from grace_ds.refresh.choice import uniform_forever
from grace_ds.refresh.gather import gather_rows
from grace_ds.utils.files import digest, write_atomic

log = logging.getLogger("grace_ds")

FOLDER = "grace_ds"


def save(controller: Controller, engine: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Save GRACE's state and then call ``engine.save_checkpoint``, so that the engine's ``latest`` names a complete checkpoint.

    If GRACE's state cannot be written, the engine's checkpoint is saved without it, with a warning in the log.

    Raises:
        CheckpointError: GRACE's state cannot be written and ``checkpoint.on_failed_save: error``; on every rank.
    """
    bound = inspect.signature(original).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = bound.arguments
    tag = str(arguments["tag"]) if arguments["tag"] is not None else f"global_step{engine.global_steps}"
    folder = Path(arguments["save_dir"]) / tag / FOLDER
    state = _try_write(controller, folder, tag)
    if state is not None:
        arguments["tag"], arguments["client_state"] = tag, {**(arguments["client_state"] or {}), FOLDER: state}
    elif controller.comm.rank == 0:  # files of an earlier checkpoint with the same tag do not belong to this one
        with contextlib.suppress(OSError):
            (folder / MANIFEST).unlink(missing_ok=True)
    return original(*bound.args, **bound.kwargs)


def _try_write(controller: Controller, folder: Path, tag: str) -> dict[str, Any] | None:
    """Write GRACE's files and return its client state; None on every rank if they could not be written.  Collective."""
    if not controller.all_live():
        log.warning("GRACE is frozen (its transport has failed): checkpoint %s goes without its state", tag)
        return None
    try:
        return run_on_all_ranks(controller.comm, lambda: write(controller, folder, tag))
    except TransportError as error:
        controller.peer_failures.check(error, f"at the checkpoint of step {controller.step}")
        controller.retire(str(error))
    except Exception as error:
        if controller.config.checkpoint.on_failed_save == "error":
            raise
        log.warning("%s; checkpoint %s goes without GRACE's state", error, tag)
    return None


def load(controller: Controller, engine: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``engine.load_checkpoint`` and then load GRACE's state; a checkpoint without it is resumed at its step, or refused.

    Raises:
        CheckpointError: the state is missing and ``on_missing_state: error``, damaged and ``on_damaged_state: error``, of
            another schema or of another run; on every rank, with GRACE as it was before.
        Exception: the engine's own part cannot be loaded; an error on every rank.
    """
    comm, config, live = controller.comm, controller.config.checkpoint, controller.all_live()
    result = run_on_all_ranks(comm, lambda: original(*args, **kwargs)) if live else original(*args, **kwargs)
    path, client_state = result
    bound = inspect.signature(original).bind(*args, **kwargs)
    if path is None or bound.arguments.get("load_module_only", False):
        return result
    state, step = (client_state or {}).get(FOLDER), engine.global_steps
    folder = _folder(Path(path), state)

    def read() -> CheckpointState | None:
        if state is None:
            if (folder / MANIFEST).exists():
                raise DamagedState(
                    f"{folder} holds GRACE state that the engine's checkpoint does not name: one of them was altered; "
                    "use an older checkpoint"
                )
            return None
        saved = read_saved(folder, state, comm.rank, comm.size, controller.config.collect.dim)
        check(controller, saved, state, step)
        return saved

    if not live:
        _load_frozen(controller, read, step)
        return result
    try:
        saved = run_on_all_ranks(comm, read)
        why = f"checkpoint {path} holds no GRACE state"
        missing = config.on_missing_state
    except DamagedState as error:
        if config.on_damaged_state == "error":
            raise
        saved, why, missing = None, str(error), "rebuild"
    if saved is not None:
        take_over(controller, saved, step)
    elif missing == "error":
        raise CheckpointError(f"{why}; set checkpoint.on_missing_state: rebuild to start a coreset at its step")
    else:
        log.warning("%s: a coreset is started at step %d", why, step)
        controller.begin_at(step, step * controller.geometry.batch)
    return result


def _load_frozen(controller: Controller, read: Callable[[], CheckpointState | None], step: int) -> None:
    """Resume a frozen run at a checkpoint, without GRACE's transport, and with the same order of samples on every rank."""
    saved: CheckpointState | None = None
    try:
        saved = read()
    except CheckpointError as error:
        log.warning("GRACE is frozen, and the checkpoint's state cannot be read: %s", error)
    whole = saved is not None and bool(saved.schedules) and controller.config.replay is None
    # Schedules count only if every rank has read them; the table and the rest are no longer needed.
    if controller.agreement.all_agree(whole) and saved is not None:
        controller.book.replace(saved.schedules)
        controller.counted, controller.lead, controller.visits = saved.numbers["counted"], saved.numbers["lead"], saved.visits
        controller.stand_at(step, saved.numbers["cursor"])
        log.warning("step %d: GRACE is frozen: training goes on with the checkpoint's schedule", step)
        return
    cursor = step * controller.geometry.batch
    if controller.config.replay is None:
        controller.book.replace([uniform_forever(controller.context, controller.metrics.version + 1, step, cursor)])
        log.warning("step %d: GRACE is frozen and has no schedule of this step: training goes on in the job's own order", step)
    controller.stand_at(step, cursor)


def write(controller: Controller, folder: Path, tag: str) -> dict[str, Any]:
    """Write GRACE's files into ``folder`` and return the client state, the same on all ranks.  Collective."""
    if controller.collector is not None:
        # The table at the next refresh must not depend on whether a checkpoint was saved in between, nor on the number of
        # ranks that load it.  So rows that their owners do not have yet are delivered now.
        collect = controller.collector.pending(controller.comm)
        received, _ = gather_rows(controller.comm, collect.rows, controller.context.pool.limit)
        losses, _ = gather_rows(controller.comm, collect.losses, controller.context.pool.limit)
        controller.table, controller.seen = controller.table.merge(received), controller.seen.merge(losses)
        controller.collector.drained(collect.running_mean)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        digests = controller.table.save(folder, controller.comm.rank, controller.comm.size) | controller.seen.save(
            folder, controller.comm.rank, controller.comm.size
        )
        window, shared = controller.kept.save(
            folder, bool(controller.context.pool.advance), controller.comm.rank, controller.comm.size
        )
        digests |= window
        if controller.comm.rank == 0:
            digests |= _write_shared(controller, folder, shared)
    except OSError as error:
        raise CheckpointError(f"GRACE state cannot be written to {folder} ({error}); free space or mend the path") from error
    controller.lead = int(controller.comm.allreduce(np.array([controller.lead], np.int64), "max")[0])
    parts = controller.comm.allgather(np.frombuffer(json.dumps(digests).encode(), np.uint8))
    files = {name: file_digest for part in parts for name, file_digest in json.loads(part.tobytes()).items()}
    manifest = json.dumps({"schema": SCHEMA, "files": files, **scalars(controller)}, indent=1, sort_keys=True).encode()
    if controller.comm.rank == 0:
        write_atomic(folder / MANIFEST, manifest)
    return {"schema": SCHEMA, "manifest": digest(manifest), "step": controller.step, "tag": tag}


def check(controller: Controller, saved: CheckpointState, state: dict[str, Any], step: int) -> None:
    """Check that this run can take over a saved state at the engine's step.

    Raises:
        CheckpointError: it is of another step, dataset, batch geometry or other layers.
    """
    folder, numbers, n = saved.folder, saved.numbers, controller.context.pool.n
    if numbers["samples"] != n:
        raise CheckpointError(
            f"{folder} was made with {_corpus(numbers['samples'])}, this one is {_corpus(n)}; use the same data"
        )
    controller.context.pool.check(saved.schedules)
    if not numbers["step"] == step == state.get("step"):
        raise CheckpointError(
            f"{folder} is of step {numbers['step']}, the engine's checkpoint of step {step} "
            f"(client state: {state.get('step')!r}): they do not belong together; use an older checkpoint"
        )
    if numbers["cursor"] % controller.geometry.micro:
        raise CheckpointError(
            f"{folder} stands at sample {numbers['cursor']}, no multiple of ranks × micro-batch = {controller.geometry.micro}; "
            f"choose a micro-batch that divides it"
        )
    if controller.collector is None:
        return
    try:
        if saved.collect is not None:
            controller.collector.check_state(saved.collect)
        for basis in (saved.basis, saved.gradient):
            if basis is not None:
                basis.check(controller.collector.sketcher.layers)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def _corpus(samples: int) -> str:
    """Return a dataset by its size in words."""
    return f"a dataset of {samples} samples" if samples else "a stream"


def take_over(controller: Controller, saved: CheckpointState, step: int) -> None:
    """Take over a state that all ranks have read and checked, whatever number of ranks wrote it.  Collective."""
    numbers = saved.numbers
    if controller.collector is not None and saved.collect is not None:
        controller.collector.load_state_dict(saved.collect)
    if controller.config.replay is None:
        controller.book.replace(saved.schedules)
        controller.next_refresh = numbers["next_refresh"]
    controller.table, controller.seen, controller.kept = saved.table, saved.seen, saved.kept
    controller.visits, controller.reference = saved.visits, dict(saved.reference)
    if controller.collector is not None:
        controller.take_basis(saved.basis)
    if controller.influence_probe is not None:
        controller.influence_probe.gradient = saved.gradient
    controller.counted, controller.lead = numbers["counted"], numbers["lead"]
    controller.metrics.version, controller.metrics.refreshes = numbers["version"], numbers["refreshes"]
    controller.stand_at(step, numbers["cursor"])
    if controller.config.replay is None and not saved.schedules:
        log.info("%s was saved under replay and holds no schedule: a coreset is started at step %d", saved.folder, step)
        controller.begin_at(step, numbers["cursor"])


def scalars(controller: Controller) -> dict[str, Any]:
    """Return all state that is equal on all ranks and fits into JSON."""
    return {
        "samples": controller.context.pool.n,
        "batch": controller.geometry.batch,
        "step": controller.step,
        "cursor": controller.cursor,
        "counted": controller.counted,
        "next_refresh": controller.next_refresh,
        "lead": controller.lead,
        "version": controller.metrics.version,
        "refreshes": controller.metrics.refreshes,
        "reference": {str(version): value for version, value in controller.reference.items()},
        "basis": None if controller.basis is None else controller.basis.version,
        "gradient": None if (gradient := _gradient(controller)) is None else gradient.version,
        "collect": None if controller.collector is None else controller.collector.state_dict(),
    }


def _gradient(controller: Controller) -> TrustedBasis | None:
    return controller.influence_probe.gradient if controller.influence_probe is not None else None


def _write_shared(controller: Controller, folder: Path, window: dict[str, Array]) -> dict[str, str]:
    """Write the files that are the same on every rank and return {file name: digest}; called on rank 0."""
    digests = {}
    for schedule in controller.book.schedules if controller.config.replay is None else []:
        path = save_schedule(schedule, folder)
        digests[path.name] = digest(path.read_bytes())
    groups: dict[str, dict[str, Array]] = {VISITS: {"ids": controller.visits.ids, "counts": controller.visits.counts}}
    if controller.basis is not None:
        groups[BASIS] = dict(controller.basis.to_arrays())
    if (gradient := _gradient(controller)) is not None:
        groups[GRADIENT] = dict(gradient.to_arrays())
    if window:
        groups[SHARED] = window
    for name, arrays in groups.items():
        data = save_arrays({key: np.ascontiguousarray(value) for key, value in arrays.items()})
        write_atomic(folder / name, data)
        digests[name] = digest(data)
    return digests


def _folder(path: Path, state: Any) -> Path:
    """Return GRACE's folder beside the engine's loaded file or folder, or beside what that was converted from.

    ``ds_to_universal`` writes the engine's part into a separate folder and leaves GRACE's where it is; its digest shows
    whether it is the right one.
    """
    beside = path if path.is_dir() else path.parent
    tag = state.get("tag") if isinstance(state, dict) else None
    if not isinstance(tag, str) or tag != Path(tag).name or tag in ("", ".."):  # a folder beside, and no way elsewhere
        return beside / FOLDER
    if not (beside / FOLDER).exists() and (beside.parent / tag / FOLDER / MANIFEST).is_file():
        return beside.parent / tag / FOLDER
    return beside / FOLDER
