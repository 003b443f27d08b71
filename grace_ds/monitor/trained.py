"""Record in ``run_dir`` how far a run has trained, so that ``grace-ds trace`` tells no step that never was."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from grace_ds.utils.files import open_below
from grace_ds.utils.reading import read_json

log = logging.getLogger("grace_ds")

FILE = "trained.json"
_BYTES = 96  # length of the file, padded: every write covers the one before


@dataclass(frozen=True)
class Trained:
    """What a run has trained on: ``step`` optimizer steps, the samples at the positions before ``position``."""

    step: int
    position: int


class TrainedRecord:
    """Keeps the last step of a run in a file of ``folder``; on rank 0.

    A write takes some microseconds and no other file: the system keeps it even if the process is killed after it.
    """

    def __init__(self, folder: str) -> None:
        self._path = Path(folder) / FILE
        self._file = -1
        self._failed = False

    def write(self, step: int, position: int) -> None:
        """Record that ``step`` optimizer steps are done, up to stream position ``position``."""
        if self._failed:
            return
        line = json.dumps({"step": step, "position": position})
        try:
            if self._file < 0:
                self._file = open_below(self._path.parent, self._path, os.O_WRONLY | os.O_CREAT)
            os.pwrite(self._file, f"{line:<{_BYTES - 1}}\n".encode(), 0)
        except OSError as error:
            self._failed = True
            log.warning("how far the run came cannot be kept in %s (%s); training goes on", self._path, error)

    def close(self) -> None:
        """Close the file.  A second call does nothing."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


def read_trained(folder: Path) -> Trained | None:
    """Return what a run has recorded in ``folder``; None if there is no record, or it cannot be read."""
    try:
        found = read_json(folder / FILE, _BYTES, folder)
        return Trained(int(found["step"]), int(found["position"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
