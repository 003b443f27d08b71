"""Our part of a checkpoint: files of our own beside the engine's, written before it, read after it.

``TAG/grace_ds/`` holds the table's bucket files (each rank its own), the published schedules, the ledger and the trusted
basis, and ``manifest.json`` with every scalar and the digest of every file.  The manifest's own digest goes into the
engine's client state, so a checkpoint and a foreign or torn folder cannot be taken for one another.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from grace_ds.errors import CheckpointError
from grace_ds.files import digest, write_atomic
from grace_ds.gather import gather_rows
from grace_ds.integrations.controller import Controller
from grace_ds.integrations.together import together
from grace_ds.records import Array
from grace_ds.schedule import Ledger, load_schedule, save_schedule
from grace_ds.sketch.basis import TrustedBasis
from grace_ds.table import Table

log = logging.getLogger("grace_ds")

SCHEMA = 1
FOLDER = "grace_ds"
_MANIFEST = "manifest.json"


def save(controller: Controller, engine: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``engine.save_checkpoint`` with our state: ours first, so that the engine's ``latest`` names a complete checkpoint.

    Raises:
        CheckpointError: our files cannot be written; on every rank.
    """
    bound = inspect.signature(original).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    tag = str(given["tag"]) if given["tag"] is not None else f"global_step{engine.global_steps}"
    if controller.frozen:
        log.warning("GRACE is frozen (its transport has failed): checkpoint %s goes without its state", tag)
    else:
        state = together(controller.comm, lambda: write(controller, Path(given["save_dir"]) / tag / FOLDER))
        given["tag"], given["client_state"] = tag, {**(given["client_state"] or {}), FOLDER: state}
    return original(*bound.args, **bound.kwargs)


def load(controller: Controller, engine: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``engine.load_checkpoint`` with our state; a checkpoint without one is taken up at its step, or refused.

    Raises:
        CheckpointError: the state is missing and ``on_missing_state: error``, or it is damaged, of another schema, or of
            another dataset; on every rank.
    """
    result = original(*args, **kwargs)
    path, client_state = result
    bound = inspect.signature(original).bind(*args, **kwargs)
    if path is None or bound.arguments.get("load_module_only", False):
        return result
    state = (client_state or {}).get(FOLDER)
    if state is not None:
        folder = _folder(Path(path))
        together(controller.comm, lambda: read(controller, folder, state, engine.global_steps))
    elif controller.config.checkpoint.on_missing_state == "error":
        raise CheckpointError(
            f"checkpoint {path} holds no GRACE state; set checkpoint.on_missing_state: rebuild to start a coreset at its step"
        )
    else:
        log.info("checkpoint %s holds no GRACE state: a coreset is started at step %d", path, engine.global_steps)
        controller.begin_at(engine.global_steps, engine.global_steps * controller.geometry.batch)
    return result


def write(c: Controller, folder: Path) -> dict[str, Any]:
    """Writes our files into ``folder``; returns the client state, the same on all ranks.  Collective."""
    if c.harvester is not None:
        # The table at the next refresh must not depend on whether somebody saved in between, nor on the number of
        # ranks that load: what is still on its way to its owner is delivered now.
        rows, mean = c.harvester.pending(c.comm)
        received, _ = gather_rows(c.comm, rows, c.pipeline.pool.n)
        c.table = c.table.merge(received)
        c.harvester.drained(mean)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mine = c.table.save(folder, c.comm.rank, c.comm.size)
        if c.comm.rank == 0:
            mine |= _write_shared(c, folder)
    except OSError as error:
        raise CheckpointError(f"GRACE state cannot be written to {folder} ({error}); free space or mend the path") from error
    c.lead = int(c.comm.allreduce(np.array([c.lead], np.int64), "max")[0])
    parts = c.comm.allgather(np.frombuffer(json.dumps(mine).encode(), np.uint8))
    files = {name: named for part in parts for name, named in json.loads(part.tobytes()).items()}
    manifest = json.dumps({"schema": SCHEMA, "files": files, **scalars(c)}, indent=1, sort_keys=True).encode()
    if c.comm.rank == 0:
        write_atomic(folder / _MANIFEST, manifest)
    return {"schema": SCHEMA, "manifest": digest(manifest), "step": c.step}


def read(c: Controller, folder: Path, state: dict[str, Any], step: int) -> None:
    """Takes over what :func:`write` wrote, at any number of ranks."""
    if int(state["schema"]) > SCHEMA:
        raise CheckpointError(
            f"{folder} has schema {state['schema']}, this grace_ds knows up to {SCHEMA}; install a newer grace_ds"
        )
    raw = _read_checked(folder / _MANIFEST, state["manifest"])
    manifest = json.loads(raw)
    n = c.pipeline.pool.n
    if manifest["samples"] != n:
        raise CheckpointError(
            f"{folder} was made with a dataset of {manifest['samples']} samples, this one has {n}; use the same data"
        )
    if manifest["step"] != step:
        raise CheckpointError(
            f"{folder} is of step {manifest['step']}, the engine's checkpoint of step {step}; they do not belong together"
        )
    if manifest["cursor"] % c.geometry.micro:
        raise CheckpointError(
            f"{folder} stands at sample {manifest['cursor']}, which is no multiple of ranks × micro-batch = {c.geometry.micro}; "
            f"choose a micro-batch that divides it"
        )
    files = manifest["files"]
    arrays = {name: _load_file(folder / name, files) for name in ("ledger.safetensors", "basis.safetensors") if name in files}
    for name, expected in files.items():
        if name.startswith("schedule-"):
            _read_checked(folder / name, expected)
    schedules = [load_schedule(folder / name) for name in sorted(files) if name.startswith("schedule-")]
    shards = {name: expected for name, expected in files.items() if name.startswith("rows-")}
    table = Table.load(folder, shards, c.comm.rank, c.comm.size, c.config.harvest.dim)
    if c.harvester is not None and manifest["harvest"] is not None:
        c.harvester.load_state_dict(manifest["harvest"])
    if c.config.replay is None:
        c.book.replace(schedules)
        c.next_refresh = manifest["next_refresh"]
    c.table = table
    ledger = arrays["ledger.safetensors"]
    c.ledger = Ledger(ledger["ids"], ledger["counts"])
    c.reference = {int(k): float(v) for k, v in manifest["reference"].items()}
    if c.harvester is not None:
        saved = manifest["basis"]
        c.take_basis(None if saved is None else TrustedBasis.from_arrays(saved, arrays["basis.safetensors"]))
    c.counted = manifest["counted"]
    c.metrics.version, c.metrics.refreshes = manifest["version"], manifest["refreshes"]
    c.lead = manifest["lead"]
    c.stand_at(step, manifest["cursor"])
    if c.config.replay is None and not schedules:
        log.info("%s was saved under replay and holds no schedule: a coreset is started at step %d", folder, step)
        c.begin_at(step, manifest["cursor"])


def scalars(c: Controller) -> dict[str, Any]:
    """Everything that is equal on all ranks and fits into JSON."""
    return {
        "samples": c.pipeline.pool.n,
        "batch": c.geometry.batch,
        "step": c.step,
        "cursor": c.cursor,
        "counted": c.counted,
        "next_refresh": c.next_refresh,
        "lead": c.lead,
        "version": c.metrics.version,
        "refreshes": c.metrics.refreshes,
        "reference": {str(k): v for k, v in c.reference.items()},
        "basis": None if c.basis is None else c.basis.version,
        "harvest": None if c.harvester is None else c.harvester.state_dict(),
    }


def _write_shared(c: Controller, folder: Path) -> dict[str, str]:
    """The files that are the same on every rank; rank 0 writes them."""
    digests = {}
    for schedule in c.book.schedules if c.config.replay is None else []:
        path = save_schedule(schedule, folder)
        digests[path.name] = digest(path.read_bytes())
    groups: dict[str, dict[str, Array]] = {"ledger.safetensors": {"ids": c.ledger.ids, "counts": c.ledger.counts}}
    if c.basis is not None:
        groups["basis.safetensors"] = dict(c.basis.to_arrays())
    for name, arrays in groups.items():
        data = save_arrays({key: np.ascontiguousarray(value) for key, value in arrays.items()})
        write_atomic(folder / name, data)
        digests[name] = digest(data)
    return digests


def _folder(path: Path) -> Path:
    """Our folder beside the engine's file or folder that was loaded."""
    return (path if path.is_dir() else path.parent) / FOLDER


def _load_file(path: Path, files: dict[str, str]) -> dict[str, Array]:
    try:
        arrays: dict[str, Array] = load_arrays(_read_checked(path, files[path.name]))
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); restore it or use an older checkpoint") from error
    return arrays


def _read_checked(path: Path, expected: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path} is missing or cannot be read ({error.strerror}); restore it or use an older checkpoint"
        ) from error
    if digest(data) != expected:
        raise CheckpointError(f"{path} does not match its digest: torn, altered, or of another checkpoint; use an older one")
    return data
