"""Write files that must be complete or absent: atomic writes and digests, for checkpoints, schedules and caches."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path


def digest(data: bytes) -> str:
    """Return 32 hex digits that identify ``data``."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def write_atomic(path: Path, data: bytes | memoryview, private: bool = False) -> None:
    """Write a file so that a reader finds the old content or the new, also after a power failure.

    The folder is made if it is missing.  Permissions follow the process's umask, as for any new file.

    Args:
        path: of the file.
        data: its content.
        private: only the owner may read it, independent of the umask.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are readable by the owner only, and reading the umask would change it for all threads.
    temporary = path.with_name(f"{path.name}{secrets.token_hex(8)}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600 if private else 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
