"""Turn a coreset into an order of samples (a schedule), and keep the book of schedules.

Positions count samples over the whole run and over all data-parallel ranks.  The sample at a position is a pure function of
the schedules in the book, so sampler, resume, ``trace`` and ``replay`` all call the same few functions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from grace_ds.errors import CheckpointError
from grace_ds.records import Array, Coreset, IntArray, Role, Schedule
from grace_ds.utils.files import digest, folder_below, write_atomic
from grace_ds.utils.reading import MEMORY, opened, parse_json, read_bytes

_PREFIX = "schedule-"
_HEADER = 1 << 24  # bytes of a schedule's header: its meta is some thousands
# Beyond these, the key of a lap's random numbers or a position would overflow.
_VERSIONS, _POSITIONS, _SEEDS = 1 << 40, 1 << 60, 1 << 63


@dataclass(frozen=True)
class ScheduleSlice:
    """The samples of a range of positions, one entry per position.

    Attributes:
        ids: (n,) int64.
        roles: (n,) uint8, :class:`~grace_ds.records.Role`.
        weights: (n,) float32.
        versions: (n,) int64, of the schedule that each came from.
    """

    ids: IntArray
    roles: Array
    weights: Array
    versions: IntArray


def compose(
    coreset: Coreset,
    length: int,
    *,
    visits: IntArray,
    explore: IntArray,
    audit: IntArray,
    seed: int,
    version: int,
    start: int,
    meta: Mapping[str, Any] | None = None,
) -> Schedule:
    """Put a coreset, exploration and audit samples into one shuffled order of ``length`` slots.

    The core is walked least-visited first, so members that an earlier schedule held but did not reach come first.  A core
    smaller than its slots is walked repeatedly, each pass in a different order.

    Args:
        coreset: at least one sample.
        length: slots L of the schedule.
        visits: (m,) int64, how often the run has trained on each coreset member.
        explore: ids for exploration slots, disjoint from the coreset; all are placed.
        audit: ids for audit slots; all are placed.
        seed: of the run.
        version: of the new schedule.
        start: stream position of its slot 0.
        meta: stored with the schedule.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, version]))
    n_core = length - len(explore) - len(audit)
    if len(coreset.ids) == 0 or n_core < 1:
        raise ValueError(f"a schedule of {length} slots with {len(coreset.ids)} core samples leaves no slot for the core")
    passes: list[IntArray] = []
    for done in range(0, n_core, len(coreset.ids)):
        tie_break = rng.permutation(len(coreset.ids))
        one_pass = tie_break if passes else np.lexsort((tie_break, visits))
        # Visits decide which members a pass holds, but not their order within it: consecutive batches must not run from
        # rarely visited to often visited samples.
        passes.append(rng.permutation(one_pass[: n_core - done]))
    order = np.concatenate(passes)
    guests = np.concatenate([explore, audit]).astype(np.int64)
    guest_roles = np.repeat(np.array([Role.EXPLORE, Role.AUDIT], np.uint8), [len(explore), len(audit)])
    shuffle = rng.permutation(len(guests))
    places = np.zeros(length, bool)
    places[rng.choice(length, len(guests), replace=False)] = True
    ids = np.empty(length, np.int64)
    roles = np.full(length, Role.CORE, np.uint8)
    weights = np.ones(length, np.float32)
    ids[~places], weights[~places] = coreset.ids[order], coreset.weights[order]
    ids[places], roles[places] = guests[shuffle], guest_roles[shuffle]
    return Schedule(version, start, ids, roles, weights, seed, dict(meta or {}))


def lap_order(schedule: Schedule, lap: int) -> IntArray:
    """Return the order of the slots in lap ``lap``: lap 0 as published, later ones reshuffled by the schedule's seed."""
    if lap == 0:
        return np.arange(len(schedule), dtype=np.int64)
    key = [schedule.seed, (schedule.version << 20) + lap]
    return np.random.Generator(np.random.Philox(key=key)).permutation(len(schedule)).astype(np.int64)


class ScheduleBook:
    """The published schedules that positions still refer to, in order of their start."""

    def __init__(self, schedules: list[Schedule] | None = None) -> None:
        self.replace(schedules or [])

    def replace(self, schedules: list[Schedule]) -> None:
        """Replace the schedules of the book by ``schedules``."""
        self.schedules = sorted(schedules, key=lambda s: (s.start, s.version))
        self._laps: dict[tuple[int, int], IntArray] = {}

    def publish(self, schedule: Schedule) -> None:
        """Add a schedule; from its start on it replaces the one before."""
        if self.schedules and schedule.start < self.schedules[-1].start:
            raise ValueError(f"schedule {schedule.version} would start at {schedule.start}, before its predecessor")
        self.schedules.append(schedule)

    def at(self, position: int) -> Schedule | None:
        """Return the schedule that a position belongs to; None before the first."""
        i = sum(s.start <= position for s in self.schedules) - 1
        return self.schedules[i] if i >= 0 else None

    def prune(self, cursor: int) -> None:
        """Drop the schedules that no position from ``cursor`` on refers to."""
        last = sum(s.start <= cursor for s in self.schedules) - 1
        self.schedules = self.schedules[max(last, 0) :]
        versions = {s.version for s in self.schedules}
        self._laps = {key: value for key, value in self._laps.items() if key[0] in versions}

    def slots(self, start: int, count: int) -> ScheduleSlice:
        """Return the samples of positions ``start … start + count - 1``."""
        parts: list[ScheduleSlice] = []
        while count > 0:
            i = sum(s.start <= start for s in self.schedules) - 1
            if i < 0:
                first = self.schedules[0].start if self.schedules else None
                raise ValueError(f"position {start} lies before the first schedule (which starts at {first})")
            schedule = self.schedules[i]
            lap, offset = divmod(start - schedule.start, len(schedule))
            n = min(count, len(schedule) - offset)
            if i + 1 < len(self.schedules):
                n = min(n, self.schedules[i + 1].start - start)
            index = self._lap(schedule, lap)[offset : offset + n]
            versions = np.full(n, schedule.version, np.int64)
            parts.append(ScheduleSlice(schedule.ids[index], schedule.roles[index], schedule.weights[index], versions))
            start, count = start + n, count - n
        if len(parts) == 1:
            return parts[0]
        return ScheduleSlice(*(np.concatenate([getattr(p, f) for p in parts]) for f in ("ids", "roles", "weights", "versions")))

    def _lap(self, schedule: Schedule, lap: int) -> IntArray:
        key = (schedule.version, lap)
        if key not in self._laps:
            self._laps = {k: v for k, v in self._laps.items() if k[0] != schedule.version or k[1] >= lap - 1}
            self._laps[key] = lap_order(schedule, lap)
        return self._laps[key]


class VisitCounts:
    """Counts of how often the run has trained on each sample; identical on every rank, 12 bytes per sample seen."""

    def __init__(self, ids: IntArray | None = None, counts: Array | None = None) -> None:
        self.ids = np.empty(0, np.int64) if ids is None else ids
        self.counts = np.empty(0, np.int32) if counts is None else counts

    def add(self, ids: IntArray) -> None:
        """Count one use for every entry of ``ids``."""
        new, times = np.unique(ids, return_counts=True)
        merged, index = np.unique(np.concatenate([self.ids, new]), return_inverse=True)
        counts = np.zeros(len(merged), np.int32)
        np.add.at(counts, index, np.concatenate([self.counts, times.astype(np.int32)]))
        self.ids, self.counts = merged, counts

    def of(self, ids: IntArray) -> IntArray:
        """Return the number of uses of each id, (n,) int64."""
        if len(self.ids) == 0:
            return np.zeros(len(ids), np.int64)
        index = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.where(self.ids[index] == ids, self.counts[index], 0).astype(np.int64)


def save_schedule(schedule: Schedule, directory: str | Path, root: Path | None = None) -> Path:
    """Write ``schedule-VERSION.safetensors`` into a directory, atomically; return its path.

    Args:
        root: the run's folder, below which no link is followed; None: ``directory``.
    """
    target = Path(directory) / f"{_PREFIX}{schedule.version:06d}.safetensors"
    identity = {"version": schedule.version, "start": schedule.start, "seed": schedule.seed, "digest": schedule.digest()}
    facts = json.dumps({**identity, "run": schedule.run})
    meta = json.dumps(dict(schedule.meta))
    header = {"schedule": facts, "meta": meta, "check": _check(facts, meta)}
    arrays: dict[str, Array] = {"ids": schedule.ids, "roles": schedule.roles, "weights": schedule.weights}
    write_atomic(target, save(arrays, metadata=header), root=root)
    return target


def load_schedule(path: str | Path, root: Path | None = None) -> Schedule:
    """Read one schedule back and check that it is complete.

    Args:
        root: the run's folder, below which no link is followed; None: the file's own folder.

    Raises:
        CheckpointError: the file is missing, torn, altered, a link, or larger than the memory; the message names it.
    """
    try:
        return parse_schedule(read_bytes(path, root=root or Path(path).parent), path)
    except OSError as e:
        raise CheckpointError(f"schedule {path} cannot be read ({e.strerror}); restore it or choose an older one") from e


def parse_schedule(data: bytes, path: str | Path) -> Schedule:
    """Build a schedule from its file's bytes.

    Raises:
        CheckpointError: the data are torn or altered; the message names ``path``.
    """
    try:
        arrays = load(data)
        # The library reads the metadata of files only.  The format: the header's length, then the header in JSON.
        header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        if header["check"] != _check(header["schedule"], header["meta"]):
            raise ValueError("its header does not match the header's digest")
        facts, meta = parse_json(header["schedule"]), parse_json(header["meta"])
        version, start, seed = int(facts["version"]), int(facts["start"]), int(facts["seed"])
        run = str(facts.get("run", ""))
        schedule = Schedule(version, start, arrays["ids"], arrays["roles"], arrays["weights"], seed, meta, run)
        intact = {name: (a.dtype, a.shape) for name, a in arrays.items()} == _form(len(schedule)) and schedule.digest() == facts[
            "digest"
        ]
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, OverflowError) as e:
        raise CheckpointError(
            f"schedule {path} cannot be read ({type(e).__name__}: {e}); restore it or choose an older one"
        ) from e
    if not intact:
        raise CheckpointError(f"schedule {path} does not match its digest: it was altered or torn; restore it")
    _check_values(schedule, path)
    return schedule


def _check_values(schedule: Schedule, path: str | Path) -> None:
    """Check that every position of a schedule can be served; a digest is no proof of that, since anyone can compute one.

    Raises:
        CheckpointError: naming what cannot be.
    """
    odd = {
        "version": not 0 <= schedule.version < _VERSIONS,
        "start": not 0 <= schedule.start < _POSITIONS,
        "seed": not 0 <= schedule.seed < _SEEDS,
        "meta": not isinstance(schedule.meta, dict),
        "slots": not len(schedule),
        "ids": bool((schedule.ids < 0).any()),
        "roles": not np.isin(schedule.roles, list(Role)).all(),
        "weights": not (np.isfinite(schedule.weights) & (schedule.weights >= 0)).all(),
    }
    wrong = [name for name, is_wrong in odd.items() if is_wrong]
    if wrong:
        raise CheckpointError(f"schedule {path} holds {', '.join(wrong)} that no run can have written; restore it")


def load_book(directory: str | Path, root: Path | None = None) -> ScheduleBook:
    """Read every schedule in ``directory``.

    Args:
        root: the run's folder, below which no link is followed; None: ``directory``.

    Raises:
        CheckpointError: there is none, or one is damaged, missing between the others, or of another run.
    """
    paths = sorted(Path(directory).glob(f"{_PREFIX}*.safetensors"))
    if not paths:
        raise CheckpointError(f"no {_PREFIX}*.safetensors in {directory}; give the folder 'schedules' of a run's run_dir")
    schedules = [load_schedule(p, root) for p in paths]
    first = schedules[0].version
    for expected, schedule, path in zip(range(first, first + len(paths)), schedules, paths, strict=True):
        if schedule.version != expected:
            raise CheckpointError(
                f"{path} holds schedule {schedule.version} where {expected} must follow: a file is missing from {directory}, "
                "or was overwritten by another; restore it"
            )
    for path, before, after in zip(paths[1:], schedules, schedules[1:], strict=False):
        # Schedules of earlier versions do not name their run; one without a name may belong to any run.
        if (before.run and after.run and before.run != after.run) or after.start < before.start:
            runs = [f"run {one.run or 'unknown'}, from sample {one.start}" for one in (before, after)]
            raise CheckpointError(
                f"{path} ({runs[1]}) does not follow schedule {before.version} ({runs[0]}): {directory} mixes the schedules of "
                "two runs; move those of one of them away, and give every run a run_dir of its own"
            )
    return ScheduleBook(schedules)


def put_aside(directory: str | Path, schedule: Schedule, root: Path | None = None) -> set[str]:
    """Rename to ``.abandoned`` the files in ``directory`` that conflict with ``schedule``.

    These are all schedules of other runs, and those of this version or later from the same run, which was since resumed at an
    earlier step.

    Args:
        root: the run's folder, below which no link is followed; None: ``directory``.

    Returns:
        The names of the other runs; an empty name for one without.

    Raises:
        OSError: a file cannot be read or renamed.
    """
    others: set[str] = set()
    root, folder = root or Path(directory), Path(directory)
    with folder_below(root, folder) as handle:
        for path in sorted(folder.glob(f"{_PREFIX}*.safetensors")):
            try:
                version, run = _named(path, root)
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError):  # damaged: reading it reports the error
                continue
            foreign = run != schedule.run and (bool(run) or schedule.version == 0)
            if foreign or version >= schedule.version:
                os.replace(path.name, path.with_suffix(".abandoned").name, src_dir_fd=handle, dst_dir_fd=handle)
            if foreign:
                others.add(run)
    return others


def _named(path: Path, root: Path) -> tuple[int, str]:
    """Return (version, run) from the header of a schedule's file, without reading its arrays."""
    with opened(path, MEMORY, root) as file:
        header = parse_json(file.read(min(int.from_bytes(file.read(8), "little"), _HEADER)))
    facts = parse_json(header["__metadata__"]["schedule"])
    return int(facts["version"]), str(facts.get("run", ""))


def _check(facts: str, meta: str) -> str:
    """Return the digest of the header; the arrays have theirs in ``facts``."""
    return digest(f"{facts}\n{meta}".encode())


def _form(length: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Return the types and shapes of a schedule's arrays.

    The digest alone does not distinguish them from others of the same bytes.
    """
    return {name: (np.dtype(kind), (length,)) for name, kind in (("ids", "i8"), ("roles", "u1"), ("weights", "f4"))}
