"""Store columns of samples on disk, split by bucket, so that any number of ranks can read what any other number has written.

Every rank writes one file with the samples that it owns, ``PREFIX-bXXXX-bYYYY.safetensors``, and returns its digest.  A reader
loads the buckets that it owns now.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from grace_ds.comm.buckets import N_BUCKETS, bucket_of, buckets_of, owner_of
from grace_ds.errors import CheckpointError, DamagedState, DataError
from grace_ds.records import Array
from grace_ds.utils.files import digest as digest_of
from grace_ds.utils.files import write_atomic
from grace_ds.utils.reading import read_bytes

Columns = dict[str, Array]


def save_columns(
    directory: str | os.PathLike[str], prefix: str, schema: int, columns: Mapping[str, Array], rank: int, world: int
) -> dict[str, str]:
    """Write this rank's samples, atomically; files of another world size in ``directory`` stay untouched.

    Args:
        columns: ``ids`` (n,) int64, sorted, unique, of samples that this rank owns, and other columns of n rows.

    Returns:
        {file name: digest}: at most one file, none if this rank owns no bucket.  The checkpoint's manifest needs the union
        over all ranks.

    Raises:
        DataError: a sample belongs to another rank.
        OSError: the file cannot be written.
    """
    if (owner_of(columns["ids"], world) != rank).any():
        raise DataError(f"rank {rank} of {world} holds rows of samples that it does not own; gather them first")
    buckets = buckets_of(rank, world)
    if not len(buckets):
        return {}
    from safetensors.numpy import save

    data = save(
        {**{key: np.ascontiguousarray(column) for key, column in columns.items()}, "schema": np.array([schema], np.int64)}
    )
    name = f"{prefix}-b{buckets[0]:04d}-b{buckets[-1]:04d}.safetensors"
    write_atomic(Path(directory) / name, data)
    return {name: digest_of(data)}


def load_columns(
    directory: str | os.PathLike[str],
    prefix: str,
    schema: int,
    files: Mapping[str, str],
    rank: int,
    world: int,
    names: tuple[str, ...] | None = None,
) -> list[tuple[Path, Columns]]:
    """Load the samples of the buckets that ``rank`` of ``world`` owns, whatever world size wrote them.

    Args:
        files: {file name: digest} of all ranks that took part in the save.
        names: of the columns that a file must have; None: any.

    Returns:
        For each file that holds any of those buckets its path and its columns: ids sorted, samples of other owners left out.

    Raises:
        CheckpointError: a file is missing, changed, of another schema or form, or the files overlap or leave gaps.
    """
    mine, loaded = buckets_of(rank, world), []
    for name, buckets in _ranges(prefix, files).items():
        if mine.start < buckets.stop and buckets.start < mine.stop:
            path = Path(directory) / name
            columns = _read(path, prefix, schema, files[name], buckets, names)
            own = owner_of(columns["ids"], world) == rank
            loaded.append((path, {key: column[own] for key, column in columns.items()}))
    return loaded


def _ranges(prefix: str, files: Mapping[str, str]) -> dict[str, range]:
    """Return {file name: its buckets} in order of the buckets, and check that the files hold each bucket exactly once."""
    pattern, ranges = re.compile(rf"{prefix}-b(\d{{4}})-b(\d{{4}})\.safetensors"), {}
    for name in files:
        match = pattern.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{name!r} is not a file of {prefix} ({prefix}-bXXXX-bYYYY.safetensors)")
        ranges[name] = range(int(match[1]), int(match[2]) + 1)
    ordered = dict(sorted(ranges.items(), key=lambda item: item[1].start))
    at = 0
    for name, buckets in ordered.items():
        if buckets.start != at or not len(buckets):
            what = "overlaps another file" if buckets.start < at else f"leaves buckets from {at} on to no file"
            raise CheckpointError(f"{name} {what}: the checkpoint is incomplete or mixed; load another one")
        at = buckets.stop
    if at != N_BUCKETS:
        raise CheckpointError(f"the files of {prefix} hold {at} of {N_BUCKETS} buckets: the checkpoint is incomplete")
    return ordered


def _read(path: Path, prefix: str, schema: int, digest: str, buckets: range, names: tuple[str, ...] | None) -> Columns:
    """Read and verify one file: the bytes that are parsed are those that were hashed."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        data = read_bytes(path, root=path.parent)
    except OSError as error:
        raise DamagedState(f"{path} cannot be read: {error}; load another checkpoint") from error
    if digest_of(data) != digest:
        raise DamagedState(f"{path} has digest {digest_of(data)}, not {digest}: torn or changed; load another checkpoint")
    try:
        columns: Columns = load(data)
        stored_schema, ids = int(columns.pop("schema")[0]), columns["ids"]
    except (SafetensorError, KeyError, IndexError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} is not a file of {prefix} ({error!r}); load another checkpoint") from error
    if stored_schema != schema or (names is not None and set(columns) != set(names)):
        raise CheckpointError(
            f"{path} has schema {stored_schema} with columns {sorted(columns)}; this version reads {schema}; "
            "load it with the grace_ds that wrote it, or use another checkpoint"
        )
    odd = [name for name, column in columns.items() if column.ndim == 0 or len(column) != len(ids)]
    if odd or ids.dtype != np.int64 or ids.ndim != 1:
        names_of = ", ".join(odd or ["ids"])
        raise CheckpointError(f"{path} has columns of another type or length: {names_of}; load another checkpoint")
    where = bucket_of(ids)
    if (np.diff(ids) <= 0).any() or (where < buckets.start).any() or (where >= buckets.stop).any():
        raise CheckpointError(f"{path} repeats ids or holds ids of other buckets than its name says; load another checkpoint")
    return columns
