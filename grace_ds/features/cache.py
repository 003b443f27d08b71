"""Keep a few computed arrays between runs: one small .npz without pickle per key, written atomically, with a digest inside."""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from grace_ds.records import Array
from grace_ds.utils.files import write_atomic
from grace_ds.utils.reading import read_npz

log = logging.getLogger(__name__)


def _digest(key: str, arrays: Mapping[str, Array]) -> Array:
    digest = hashlib.blake2b(key.encode(), digest_size=16)
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def path_of(folder: str | os.PathLike[str], key: str) -> Path:
    """Return the file of ``key`` (hex digits) in ``folder``."""
    return Path(folder) / f"features-{key}.npz"


def load(folder: str | os.PathLike[str], key: str) -> dict[str, Array] | None:
    """Load the arrays stored under ``key``; return None if there are none, or (with a warning) if the file is damaged."""
    path = path_of(folder, key)
    if not path.exists():
        return None
    try:
        arrays = read_npz(path)
        if not np.array_equal(arrays.pop("digest"), _digest(key, arrays)):
            raise ValueError("its digest does not match")
    except Exception as error:  # a damaged archive can raise anything, including errors of zlib, struct and the parser
        log.warning("feature cache %s is ignored and computed anew: %s", path, error)
        return None
    return arrays


def store(folder: str | os.PathLike[str], key: str, arrays: Mapping[str, Array]) -> None:
    """Store the arrays under ``key``; readers see the old file or the new one, never half of one.

    A folder that cannot be written costs a warning, not the run: the cache only saves time.
    """
    path = path_of(folder, key)
    buffer = io.BytesIO()
    contents: dict[str, Any] = {"digest": _digest(key, arrays), **arrays}
    np.savez(buffer, allow_pickle=False, **contents)
    try:
        write_atomic(path, buffer.getbuffer())
    except OSError as error:
        log.warning("feature cache %s was not written: %s (set features.cache_dir to a writable folder)", path, error)
