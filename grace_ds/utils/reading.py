"""Read files that others may have written: nothing is allocated before its size is known to be there and allowed.

What a header claims is compared with the file's size first; what is text is limited, and so is what it expands to.  Whatever a
parser raises becomes a ``ValueError``, and whatever the system raises is an ``OSError``, so that a caller has two kinds of error
to put into its own words.  Only regular files are read: a pipe or a device could keep a rank waiting for ever.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from grace_ds.records import Array
from grace_ds.utils.files import open_below

SETTINGS = 1 << 20  # bytes of a config; the largest of DeepSpeed's has some thousands
FACTS = 1 << 26  # bytes of a file of facts: a manifest, a report, a map
TOKENIZER = 1 << 28  # bytes of a tokenizer.json: those of large vocabularies have some tens of millions
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # bytes of this machine: no file of arrays can be larger
YAML, YAML_NODES, YAML_DEPTH = 1 << 17, 20_000, 50  # bytes of a YAML file, its values with aliases written out, and levels
_KINDS = "biufSU"  # of arrays: no objects, no records


@contextmanager
def opened(path: str | Path, limit: int, root: Path | None = None) -> Iterator[IO[bytes]]:
    """Open a regular file of at most ``limit`` bytes for reading.

    Args:
        root: folder below which no symbolic link is followed; None: links are followed.

    Raises:
        OSError: it cannot be opened, is no regular file, is larger, or lies behind a link.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # without O_NONBLOCK, opening a pipe would wait for its writer
    handle = os.open(path, flags) if root is None else open_below(root, Path(path), flags)
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.EINVAL, "no regular file", str(path))
        if found.st_size > limit:
            raise OSError(errno.EFBIG, f"{found.st_size} bytes, and at most {limit} are read", str(path))
        file = os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise
    with file:
        yield file


def read_bytes(path: str | Path, limit: int = MEMORY, root: Path | None = None) -> bytes:
    """Return the content of a regular file; see :func:`opened`."""
    with opened(path, limit, root) as file:
        data = file.read(os.fstat(file.fileno()).st_size)
        if file.read(1):
            raise OSError(errno.EBUSY, "it grows while it is read", str(path))
        return data


def read_text(path: str | Path, limit: int, root: Path | None = None) -> str:
    """Return the content of a file of UTF-8.

    Raises:
        OSError: as :func:`opened`.
        ValueError: it is no UTF-8.
    """
    return read_bytes(path, limit, root).decode("utf-8")


def parse_json(text: str | bytes, **options: Any) -> Any:
    """Return ``json.loads(text)``.

    Raises:
        ValueError: it is no JSON, or too deep for the parser.
    """
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: str | Path, limit: int = FACTS, root: Path | None = None) -> Any:
    """Return the content of a JSON file.

    Raises:
        OSError: as :func:`opened`.
        ValueError: it is no JSON.
    """
    return parse_json(read_bytes(path, limit, root))


def read_yaml(path: str | Path, limit: int = YAML, root: Path | None = None) -> str:
    """Return the text of a YAML file, whose aliases stand for few enough values to write them out.

    Raises:
        OSError: as :func:`opened`.
        ValueError: it is no YAML, too deep, or a value holds itself or is repeated too often.
    """
    import yaml

    text = read_text(path, limit, root)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):  # not in C, whose recursion has no limit
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > YAML_DEPTH:
                raise ValueError("nested too deeply")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        count = _values(node, {}) if node is not None else 0
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if count > YAML_NODES:
        raise ValueError(f"{count} values with its aliases written out, and at most {YAML_NODES} are read")
    return text


def _values(node: Any, known: dict[int, int]) -> int:
    """Return the number of values below a YAML node, aliases written out; ``known`` holds those of other nodes."""
    if id(node) not in known:
        known[id(node)] = YAML_NODES + 1  # of a value that holds itself
        inner = node.value if isinstance(node.value, list) else []
        parts = [part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]


def read_npy(path: str | Path, mapped: bool = False, root: Path | None = None) -> Array:
    """Return the array of a .npy file: numbers or texts, never objects.

    Args:
        mapped: leave it in the file, as a memory map that cannot be written.

    Raises:
        OSError: as :func:`opened`.
        ValueError: it is no such file, or its header does not fit its size.
    """
    with opened(path, MEMORY if not mapped else 1 << 62, root) as file:
        size = os.fstat(file.fileno()).st_size
        shape, fortran, dtype = _header(file, size)
        order: Any = "F" if fortran else "C"
        count = math.prod(shape)
        if mapped and count:
            return np.memmap(file, dtype, "r", file.tell(), shape, order)
        return _filled(file, dtype, count).reshape(shape, order=order)


def read_npz(path: str | Path, root: Path | None = None) -> dict[str, Array]:
    """Return the arrays of a .npz file that was written without compression.

    Raises:
        OSError: as :func:`opened`.
        ValueError: it is no such file, it is compressed, or its headers claim more than is there.
    """
    with opened(path, MEMORY, root) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
                if sum(entry.file_size for entry in entries) > os.fstat(file.fileno()).st_size:
                    raise ValueError("compressed, or with parts that overlap")
                if len({entry.filename for entry in entries}) != len(entries):
                    raise ValueError("a name stands twice")
                return {entry.filename.removesuffix(".npy"): _member(archive, entry) for entry in entries}
        except (OSError, ValueError, MemoryError):
            raise
        except Exception as error:  # zipfile raises errors of zlib, struct and its own
            raise ValueError(f"{type(error).__name__}: {error}") from error


def _member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Array:
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{entry.filename} is compressed")
    with archive.open(entry) as file:
        shape, fortran, dtype = _header(file, entry.file_size)
        array = _filled(file, dtype, math.prod(shape)).reshape(shape, order="F" if fortran else "C")
        file.read(1)  # at its end the archive's checksum is compared
        return array


def _header(file: IO[bytes], size: int) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the header of a .npy file of ``size`` bytes; return shape, whether it is in Fortran's order, and dtype.

    Raises:
        ValueError: it is no header, of objects or records, or the data are not as long as it says.
    """
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file)
    except Exception as error:  # its parser raises what the text provokes
        raise ValueError(f"no header of a .npy file ({type(error).__name__}: {str(error).splitlines()[:1]})") from error
    if dtype.kind not in _KINDS or not dtype.itemsize or min(shape, default=0) < 0:
        raise ValueError(f"it holds {dtype} of shape {shape}, and only numbers and texts are read")
    there, needed = size - file.tell(), math.prod(map(int, shape)) * dtype.itemsize
    if there != needed:
        raise ValueError(f"its header claims {needed} bytes ({dtype} of shape {shape}), and {there} follow it")
    return shape, bool(fortran), dtype


def _filled(file: IO[bytes], dtype: np.dtype[Any], count: int) -> Array:
    """Return the next ``count`` elements of a file, as a flat array."""
    array: Array = np.empty(count, dtype)
    rest = array.view(np.uint8) if count else np.empty(0, np.uint8)
    while len(rest):
        read = file.readinto(rest)  # type: ignore[attr-defined]
        if not read:
            raise ValueError("it ends before its data do")
        rest = rest[read:]
    return array
