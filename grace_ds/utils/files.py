"""Write files that must be complete or absent: atomic writes and digests, for checkpoints, schedules and caches.

Files of a run lie below its folder (``run_dir``, or GRACE's folder of a checkpoint), and others may be able to write there.
Below such a root no symbolic link is followed, for reading or for writing: each component of the path is opened relative to the
one before (``O_NOFOLLOW``), so that there is no moment between the check and the use.  The root itself may be a link.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def digest(data: bytes) -> str:
    """Return 32 hex digits that identify ``data``."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@contextmanager
def folder_below(root: Path, folder: Path, make: bool = False) -> Iterator[int]:
    """Open ``folder`` without following a symbolic link below ``root``; give its descriptor, for calls with ``dir_fd``.

    Args:
        root: may be a link itself.
        folder: ``root``, or below it by name (both absolute, or both relative).
        make: whether to make missing folders.

    Raises:
        OSError: a component is a link (``ELOOP``), or cannot be opened.
    """
    parts = folder.relative_to(root).parts
    if ".." in parts:
        raise OSError(errno.EINVAL, f"leads out of {root}", str(folder))
    if make:
        root.mkdir(parents=True, exist_ok=True)
    current, place = os.open(root, _FOLDER), root
    try:
        for part in parts:
            place = place / part
            if make:
                _make_folder(part, current)
            opened = open_in(current, place, os.O_RDONLY | os.O_DIRECTORY)
            os.close(current)
            current = opened
        yield current
    finally:
        os.close(current)


def open_in(folder: int, path: Path, flags: int, mode: int = 0o666) -> int:
    """Open the entry ``path.name`` of an open folder, and return its descriptor; a symbolic link is refused.

    Args:
        path: of the entry, for messages.
        mode: of a new file, before the umask.

    Raises:
        OSError: it is a link (``ELOOP``), or cannot be opened.
    """
    try:
        return os.open(path.name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):  # the second for a link where a folder is wanted
            raise OSError(errno.ELOOP, "a symbolic link, or no folder: put what it stands for in its place", str(path)) from None
        raise


def open_below(root: Path, path: Path, flags: int) -> int:
    """Open a file below ``root`` without following a link, make its folders where it is written, and return its descriptor.

    Raises:
        OSError: as :func:`folder_below`.
    """
    with folder_below(root, path.parent, make=bool(flags & os.O_CREAT)) as folder:
        return open_in(folder, path, flags)


def write_atomic(path: Path, data: bytes | memoryview, private: bool = False, root: Path | None = None) -> None:
    """Write a file so that a reader finds the old content or the new, also after a power failure.

    The folder is made if it is missing.  Permissions follow the process's umask, as for any new file.  A link at ``path`` is
    replaced, not followed.

    Args:
        path: of the file.
        data: its content.
        private: only the owner may read it, independent of the umask.
        root: folder below which no link is followed; None: the file's own folder.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    with folder_below(root or path.parent, path.parent, make=True) as folder:
        # Not tempfile: its files are readable by the owner only, and reading the umask would change it for all threads.
        temporary = path.with_name(f"{path.name}{secrets.token_hex(8)}.tmp")
        handle = open_in(folder, temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary.name, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            os.unlink(temporary.name, dir_fd=folder)
            raise
        os.fsync(folder)


def _make_folder(name: str, parent: int) -> None:
    try:
        os.mkdir(name, dir_fd=parent)
    except FileExistsError:
        return
