"""Files that must be whole or absent: atomic writes and digests, for checkpoints, schedules and caches."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path


def digest(data: bytes) -> str:
    """32 hex digits that name ``data``."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def write_atomic(path: Path, data: bytes, private: bool = False) -> None:
    """A reader finds the old file or the new one, also after a power failure.  Makes the folder if it is missing.

    Who may read it the process's umask says, as for any new file.

    Args:
        private: its owner alone may read it, whatever the umask.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile's: its files are for the owner alone, and to ask for the umask is to change it for all threads.
    temporary = path.with_name(f"{path.name}{secrets.token_hex(8)}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600 if private else 0o666)
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
