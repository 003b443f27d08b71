"""Keep rows of 32-bit words by sample id in files that are memory-mapped and read row by row, each row with its own check.

A file holds a header, the rows' ids (left out if they are consecutive), where each row ends, a check of each row, and the
words.  A check covers the row's id, its length, its words and the key of the folder.  So a reader that needs a thousandth of a
file reads that alone, and refuses a row that is torn, altered, of another sample or of other settings: it is as if the row
were not there.  Files are written whole or not at all, and never changed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import struct
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from grace_ds.records import Array, IntArray
from grace_ds.utils.files import write_atomic
from grace_ds.utils.hashing import GOLDEN, Words, finish

log = logging.getLogger(__name__)

MAGIC = b"GRACEROW"
HEADER = struct.Struct("<8s16sqQQ")  # magic, key, first id (-1: ids follow), rows, words
RANGE = re.compile(r"(\d{15})-(\d{15})\.rows")  # name of a file of consecutive ids: first, last + 1
BUFFERED = 1 << 24  # words of rows that wait to be written: 64 MiB

Words32 = npt.NDArray[np.uint32]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Ragged:
    """Rows of 32-bit words, one after another.

    Attributes:
        lengths: (n,) int64, words of each row.
        words: (total,) uint32.
    """

    lengths: IntArray
    words: Words32

    @staticmethod
    def table(values: Array) -> Ragged:
        """Return the rows of ``values`` (n, w), of any type of 4 bytes."""
        lengths = np.full(len(values), values.shape[1], np.int64)
        return Ragged(lengths, np.ascontiguousarray(values).reshape(-1).view(np.uint32))

    @staticmethod
    def joined(parts: list[Ragged]) -> Ragged:
        """Return the rows of all ``parts``."""
        lengths = np.concatenate([np.empty(0, np.int64), *(part.lengths for part in parts)])
        return Ragged(lengths, np.concatenate([np.empty(0, np.uint32), *(part.words for part in parts)]))

    def take(self, rows: IntArray) -> Ragged:
        """Return the rows at ``rows`` (m,), in that order."""
        ends = np.cumsum(self.lengths)
        return Ragged(self.lengths[rows], self.words[_places(ends[rows] - self.lengths[rows], self.lengths[rows])])


@dataclass(frozen=True)
class _File:
    """A mapped file.

    Attributes:
        path: of the file.
        ids: (n,) int64, ascending; None: ``first`` and those that follow.
        first: first id of a file of consecutive ids.
        ends: (n,) uint64, words up to the end of each row.
        checks: (n,) uint64.
        words: (total,) uint32.
    """

    path: Path
    ids: IntArray | None
    first: int
    ends: Words
    checks: Words
    words: Words32

    def find(self, ids: IntArray) -> tuple[IntArray, IntArray]:
        """Return the positions in ``ids`` (m,) that this file has rows of, and the places of these rows, (k,) int64 each."""
        if self.ids is None:
            at = np.flatnonzero((ids >= self.first) & (ids < self.first + len(self.ends)))
            return at, ids[at] - self.first
        place = np.minimum(np.searchsorted(self.ids, ids), max(len(self.ids) - 1, 0))
        at = np.flatnonzero(self.ids[place] == ids) if len(self.ids) else np.empty(0, np.int64)
        return at, place[at].astype(np.int64)

    def read(self, ids: IntArray, places: IntArray, salt: int) -> tuple[Bools, Ragged]:
        """Return which of the rows at ``places`` (k,) are whole, (k,) bool, and those that are."""
        last = self.ends[places].astype(np.int64)
        begin = np.where(places > 0, self.ends[np.maximum(places - 1, 0)].astype(np.int64), 0)
        sound: Bools = (begin >= 0) & (begin <= last) & (last <= len(self.words))
        if int((last - begin)[sound].sum()) > len(self.words):  # rows that overlap: more than the file holds is not read
            sound[:] = False
        keep = np.flatnonzero(sound)
        lengths = (last - begin)[keep]
        rows = Ragged(lengths, self.words[_places(begin[keep], lengths)])
        good = _checks(ids[keep], rows, salt) == self.checks[places[keep]]
        sound[keep] = good
        return sound, rows if good.all() else rows.take(np.flatnonzero(good))


class RowFiles:
    """The rows of one kind and key, in one or several folders; files that others write later are not seen.

    Reading may be done by several threads, writing by one.

    Args:
        folders: read in this order; one that does not exist is empty.
        key: 32 hex digits of everything that the rows depend on.
        target: folder that new rows go to; None: nowhere.
    """

    def __init__(self, folders: list[Path], key: str, target: Path | None) -> None:
        self.key, self.target, self._salt = key, target, int(key[:16], 16)
        self.folder = folders[0] if folders else Path()  # for messages
        self._paths: list[Path] = []
        self._first = self._stop = np.empty(0, np.int64)  # of the files of consecutive ids: the ids that the name promises
        self._files: dict[Path, _File | None] = {}
        self._lock = threading.Lock()
        self._told: set[Path] = set()
        self._waiting: list[tuple[IntArray, Ragged]] = []
        for folder in folders:
            if folder.is_dir():
                self._include(sorted(folder.glob("*.rows")))

    def read(self, ids: IntArray) -> tuple[Bools, Ragged]:
        """Return which of ``ids`` (n,) there are rows of, (n,) bool, and these rows in the order of the ids."""
        found = np.zeros(len(ids), np.bool_)
        taken: list[IntArray] = []
        parts: list[Ragged] = []

        def look_into(path: Path, wanted: IntArray) -> None:
            if (file := self._open(path)) is None:
                return
            at, places = file.find(ids[wanted])
            if not len(at):
                return
            sound, rows = file.read(ids[wanted[at]], places, self._salt)
            if not sound.all():
                self.refuse(path, f"the check of {int((~sound).sum())} rows does not match")
            taken.append(wanted[at[sound]])
            parts.append(rows)
            found[taken[-1]] = True

        nearest = np.searchsorted(self._first, ids, "right") - 1
        for number in np.unique(nearest[nearest >= 0]).tolist():  # one file of many thousands holds an id, as a rule
            look_into(self._paths[number], np.flatnonzero(nearest == number))
        ranges = len(self._first)
        for number, path in enumerate(self._paths):
            left = np.flatnonzero(~found)
            if not len(left):
                break
            if number < ranges:
                left = left[(ids[left] >= self._first[number]) & (ids[left] < self._stop[number]) & (nearest[left] != number)]
            if len(left):
                look_into(path, left)
        rows = Ragged.joined(parts)
        if len(parts) < 2:  # one file gives its rows in the order of the ids
            return found, rows
        return found, rows.take(np.argsort(np.concatenate(taken), kind="stable"))

    def _include(self, paths: list[Path]) -> None:
        """Read from these new files too; those of consecutive ids come first, by their first id."""
        for path in paths:
            self._files.pop(path, None)  # it may take the place of a damaged one
            self._told.discard(path)
        everything = list(dict.fromkeys([*self._paths, *paths]))
        named = {path: match for path in everything if (match := RANGE.fullmatch(path.name))}
        ranges = {path: (int(match[1]), int(match[2])) for path, match in named.items()}
        inside = sorted(ranges, key=lambda path: ranges[path])
        self._paths = inside + [path for path in everything if path not in ranges]
        self._first, self._stop = (np.array([ranges[path][side] for path in inside], np.int64) for side in (0, 1))

    def refuse(self, path: Path, reason: str) -> None:
        """Warn, once for each file, that rows of it are computed anew."""
        with self._lock:
            new = path not in self._told
            self._told.add(path)
        if new:
            log.warning("feature cache %s is ignored and computed anew: %s", path, reason)

    def add(self, ids: IntArray, rows: Ragged) -> None:
        """Take the rows of samples to be written; without a target this does nothing."""
        if self.target is None or not len(ids):
            return
        self._waiting.append((ids, rows))
        if sum(len(part.words) for _, part in self._waiting) >= BUFFERED:
            self.flush()

    def flush(self) -> None:
        """Write the rows that wait, and find them from now on; damaged files of the folder are replaced by what is whole of them.

        A folder that cannot be written costs a warning, not the run: the cache only saves time.
        """
        if not self._waiting or self.target is None:
            return
        ids, rows = np.concatenate([ids for ids, _ in self._waiting]), Ragged.joined([part for _, part in self._waiting])
        self._waiting = []
        order = np.argsort(ids, kind="stable")
        if (np.diff(order) != 1).any():
            ids, rows = ids[order], rows.take(order)
        try:
            self._include([write_rows(self.target, self.key, ids, rows)])
            self._mend()
        except OSError as error:
            log.warning("feature cache %s was not written: %s (set features.cache_dir to a writable folder)", self.target, error)
            self.target = None

    def _mend(self) -> None:
        """Replace the damaged files of the folder that is written to, so that the next run need not find them damaged again."""
        for path in [path for path in self._paths if path in self._told and path.parent == self.target]:
            file = self._files.pop(path)
            self._paths.remove(path)
            kept = None
            if file is not None:
                ids = file.ids if file.ids is not None else file.first + np.arange(len(file.ends), dtype=np.int64)
                sound, rows = file.read(ids, np.arange(len(ids)), self._salt)
                kept = write_rows(path.parent, self.key, ids[sound], rows) if sound.any() else None
            if kept != path:
                path.unlink(missing_ok=True)
            self._include([] if kept is None else [kept])

    def _open(self, path: Path) -> _File | None:
        reason = ""
        with self._lock:
            if path not in self._files:
                try:
                    self._files[path] = _mapped(path, self.key)
                except (OSError, ValueError) as error:
                    self._files[path], reason = None, str(error)
            file = self._files[path]
        if reason:
            self.refuse(path, reason)
        return file


def write_rows(folder: Path, key: str, ids: IntArray, rows: Ragged) -> Path:
    """Write a file of rows, and return its path.

    Args:
        folder: made if it is missing.
        key: as for :class:`RowFiles`.
        ids: (n,) int64, ascending, each once.
        rows: of these samples.

    Raises:
        OSError: it cannot be written.
    """
    consecutive = len(ids) > 0 and int(ids[-1]) - int(ids[0]) == len(ids) - 1
    first = int(ids[0]) if consecutive else -1
    header = HEADER.pack(MAGIC, bytes.fromhex(key), first, len(ids), len(rows.words))
    ends = np.cumsum(rows.lengths).astype("<u8")
    body = [b"" if consecutive else ids.astype("<i8").tobytes(), ends.tobytes()]
    body += [_checks(ids, rows, int(key[:16], 16)).astype("<u8").tobytes(), rows.words.astype("<u4", copy=False).tobytes()]
    if consecutive:
        name = f"{first:015d}-{first + len(ids):015d}.rows"
    else:
        name = hashlib.blake2b(body[0], digest_size=16).hexdigest() + ".rows"
    write_atomic(folder / name, b"".join([header, *body]))
    return folder / name


def _mapped(path: Path, key: str) -> _File:
    """Map a file.

    Raises:
        OSError, ValueError: it cannot be read, or is no file of rows with this key.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        raw = file.read(HEADER.size)
    if len(raw) < HEADER.size:
        raise ValueError(f"it has {size} bytes, fewer than a header's {HEADER.size}")
    magic, found, first, n, total = HEADER.unpack(raw)
    if magic != MAGIC or found.hex() != key:
        raise ValueError("it is of another kind or of other settings")
    sizes = [HEADER.size, 0 if first >= 0 else 8 * n, 8 * n, 8 * n, 4 * total]
    if sum(sizes) != size or first < -1 or first + n >= 2**63:
        raise ValueError(f"it has {size} bytes, and its header promises {sum(sizes)}")
    whole = np.memmap(path, np.uint8, "r").view(np.ndarray)  # one map a file: a process may have some 65,000
    _, ids, ends, checks, words = np.split(whole, np.cumsum(sizes[:-1]))
    return _File(path, ids.view("<i8") if first < 0 else None, first, ends.view("<u8"), checks.view("<u8"), words.view("<u4"))


def _places(begin: IntArray, lengths: IntArray) -> IntArray:
    """Return the positions begin[i] … begin[i] + lengths[i] - 1 of all rows, one row after another."""
    before = np.cumsum(lengths) - lengths
    places: IntArray = np.arange(int(lengths.sum()), dtype=np.int64)
    places += np.repeat(begin - before, lengths)
    return places


def _checks(ids: IntArray, rows: Ragged, salt: int) -> Words:
    """Return the check of each row, (n,) uint64.

    A word and its position in the row make one hash, a bijection of the word; the check is the hash of the sum of these, of
    the id and of the length.  So any change of one word changes it, and other changes do but for one in 2^64.
    """
    ends = np.cumsum(rows.lengths)
    position = _places(np.zeros(len(ids), np.int64), rows.lengths).view(np.uint64)
    position *= np.uint64(GOLDEN)
    position += rows.words
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(finish(position))])
    total = sums[ends] - sums[ends - rows.lengths]
    named = finish(ids.astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(salt))
    return finish(total ^ named ^ (rows.lengths.astype(np.uint64) << np.uint64(40)))
