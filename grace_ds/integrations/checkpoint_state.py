"""Read and verify GRACE's part of a checkpoint as a whole, before any state of the run is changed.

The manifest names every file with its digest, and the engine's client state holds the manifest's own digest.  So either the
parsed data are what was written, or an error names the file.  Data that are intact but have another form come from another
version of grace_ds, and the error says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays

from grace_ds.data.schedule import VisitCounts, parse_schedule
from grace_ds.errors import CheckpointError, DamagedState
from grace_ds.gradients.basis import TrustedBasis
from grace_ds.records import Array, Losses, SampleRecords, Schedule
from grace_ds.refresh.state import RefreshState
from grace_ds.refresh.table import Table
from grace_ds.utils.files import digest
from grace_ds.utils.reading import parse_json, read_bytes

SCHEMA = 4
MANIFEST, VISITS, SHARED = "manifest.json", "visits.safetensors", "window.safetensors"
BASIS, GRADIENT = "basis.safetensors", "gradient.safetensors"
_SCHEDULE, _ROWS, _LOSSES, _WINDOW = "schedule-", f"{SampleRecords.name}-", f"{Losses.name}-", "window-"
# Names are joined to the folder, so no other form is accepted.
_PARTS = re.compile(rf"schedule-\d+\.safetensors|({_ROWS}|{_LOSSES}|{_WINDOW})b\d+-b\d+\.safetensors")
# The manifest's numbers, equal on all ranks.
SCALARS = ("samples", "batch", "step", "cursor", "counted", "next_refresh", "lead", "version", "refreshes")


@dataclass(frozen=True)
class CheckpointState:
    """The state of a run, as one rank of a new run takes it over.

    Attributes:
        folder: that it was read from.
        numbers: one for each of :data:`SCALARS`; equal on all ranks.
        reference: unit of the trusted basis of each version; equal on all ranks.
        schedules: the published ones, in order; equal on all ranks.
        visits: visit counts; equal on all ranks.
        basis, gradient: the trusted basis in force, and the gradient that the next one starts from; None without; equal on all
            ranks.
        collect: the collector's state, None if nothing was collected; equal on all ranks.
        table, seen: the latest rows and losses of the samples that this rank owns.
        kept: what the last refresh left, for the samples that this rank owns.
    """

    folder: Path
    numbers: Mapping[str, int]
    reference: Mapping[int, float]
    schedules: list[Schedule]
    visits: VisitCounts
    basis: TrustedBasis | None
    gradient: TrustedBasis | None
    collect: dict[str, Any] | None
    table: Table[SampleRecords]
    seen: Table[Losses]
    kept: RefreshState


def read_saved(folder: Path, state: Any, rank: int, world: int, dim: int) -> CheckpointState:
    """Read what ``rank`` of ``world`` needs, whatever number of ranks wrote it.  Not collective.

    Args:
        folder: GRACE's folder, beside the engine's files.
        state: GRACE's entry of the engine's client state.
        dim: width of a sketch in this run.

    Raises:
        DamagedState: a file is missing, torn, altered or of another checkpoint; names it.
        CheckpointError: another schema, or sketches of another width.
    """
    try:
        schema, expected = state["schema"], state["manifest"]
        if not isinstance(schema, int) or not isinstance(expected, str):
            raise TypeError("schema or digest of another type")
    except (KeyError, TypeError) as error:
        raise DamagedState(
            f"the engine's checkpoint beside {folder} does not say which state belongs to it ({_describe(error)}): it was "
            "altered; use an older checkpoint"
        ) from error
    _refuse_schema(folder, schema)
    raw = _read_checked(folder / MANIFEST, expected)
    try:
        manifest = parse_json(raw)
        _refuse_schema(folder, manifest["schema"])
        return _parse(folder, manifest, rank, world, dim)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        # The digests have matched, so nothing is torn.
        raise CheckpointError(
            f"{folder} does not have the form of schema {SCHEMA} ({_describe(error)}): another version of grace_ds has "
            "written it; load it with that version, or use another checkpoint"
        ) from error


def _parse(folder: Path, manifest: dict[str, Any], rank: int, world: int, dim: int) -> CheckpointState:
    files: dict[str, str] = manifest["files"]
    known = (VISITS, BASIS, GRADIENT, SHARED)
    odd = [name for name in files if not _PARTS.fullmatch(name) and name not in known]
    if odd:
        raise ValueError(f"unknown file {odd[0]!r}")
    numbers = {key: _whole(manifest, key) for key in SCALARS}
    names = [name for name in sorted(files) if name.startswith(_SCHEDULE)]
    visits = _arrays(folder / VISITS, files[VISITS])
    if visits["ids"].dtype != np.int64 or visits["ids"].shape != visits["counts"].shape:
        raise ValueError("visit counts whose columns do not fit together")
    rows, losses, windows = (_with_prefix(files, prefix) for prefix in (_ROWS, _LOSSES, _WINDOW))
    shared = _arrays(folder / SHARED, files[SHARED]) if SHARED in files else {}
    collect = manifest["collect"]
    if not isinstance(collect, dict | None):
        raise TypeError("collect is no object")
    return CheckpointState(
        folder,
        numbers,
        {int(version): float(unit) for version, unit in manifest["reference"].items()},
        [parse_schedule(_read_checked(folder / name, files[name]), folder / name) for name in names],
        VisitCounts(visits["ids"], visits["counts"]),
        _basis(folder, manifest, "basis", BASIS),
        _basis(folder, manifest, "gradient", GRADIENT),
        collect,
        Table.load(folder, rows, rank, world, SampleRecords.empty(dim)),
        Table.load(folder, losses, rank, world, Losses.empty()),
        RefreshState.load(folder, windows, shared, rank, world),
    )


def _with_prefix(files: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {name: file_digest for name, file_digest in files.items() if name.startswith(prefix)}


def _basis(folder: Path, manifest: dict[str, Any], key: str, name: str) -> TrustedBasis | None:
    if manifest[key] is None:
        return None
    return TrustedBasis.from_arrays(_whole(manifest, key), _arrays(folder / name, manifest["files"][name]))


def _refuse_schema(folder: Path, schema: Any) -> None:
    if schema != SCHEMA or isinstance(schema, bool):
        newer = isinstance(schema, int) and schema > SCHEMA
        cure = "install a newer grace_ds" if newer else "load it with the grace_ds that wrote it, or use another checkpoint"
        raise CheckpointError(f"{folder} has schema {schema!r}, this grace_ds knows {SCHEMA}; {cure}")


def _whole(manifest: dict[str, Any], key: str) -> int:
    value = manifest[key]
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{key} = {value!r} is no whole number")
    return value


def _arrays(path: Path, expected: str) -> dict[str, Array]:
    data = _read_checked(path, expected)
    try:
        arrays: dict[str, Array] = load_arrays(data)
    except SafetensorError as error:
        raise ValueError(f"{path.name}: {error}") from error
    return arrays


def _read_checked(path: Path, expected: str) -> bytes:
    try:
        data = read_bytes(path, root=path.parent)
    except OSError as error:
        raise DamagedState(
            f"{path} is missing or cannot be read ({error.strerror}); restore it or use an older checkpoint"
        ) from error
    if digest(data) != expected:
        raise DamagedState(f"{path} does not match its digest: torn, altered, or of another checkpoint; use an older one")
    return data


def _describe(error: Exception) -> str:
    return f"lacks {error}" if isinstance(error, KeyError) else str(error)
