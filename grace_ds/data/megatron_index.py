"""Read the index of a Megatron or DeepSpeed corpus, check it against itself and the token file, and map it.

The ``.bin`` is all tokens one after another.  The ``.idx`` is a header, then the length (int32) and the byte offset (int64)
of each sequence, then the document index (int64).  Its header names the token type by a code.  The two libraries number
the types differently from 6 on, so each reads the other's uint16 as another type without an error.  The size of the
``.bin`` distinguishes them.

The index holds most facts twice (offsets follow from lengths, both from the ``.bin``'s size), and all of these are
compared, so that a truncated or mixed copy is refused instead of trained on.  There is no checksum: damage to the tokens, or
to several entries of the index that happen to agree, cannot be detected.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from grace_ds.errors import DataError
from grace_ds.records import Array

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, type code, sequences, entries of the document index
BLOCK = 1 << 20  # entries of the index checked at a time
# Meaning of each code in megatron-core, then in DeepSpeed if it differs.
CODES = {
    1: ("uint8",),
    2: ("int8",),
    3: ("int16",),
    4: ("int32",),
    5: ("int64",),
    6: ("float64", "uint16"),
    7: ("float32", "uint32"),
    8: ("uint16", "uint64"),
}
CURE = "copy the .bin and the .idx again, together, or build them anew"


@dataclass(frozen=True)
class Layout:
    """Layout of a checked pair of files; with it they can be mapped without being checked again.

    Attributes:
        prefix: absolute path of both files, without their suffix.
        sequences: number of sequences, at least 1.
        entries: entries of the document index: the number of documents plus one.
        dtype: NumPy's name of the token type.
        total: tokens in the ``.bin``, at least 1.
    """

    prefix: str
    sequences: int
    entries: int
    dtype: str
    total: int

    @property
    def idx(self) -> str:
        """Path of the index file."""
        return self.prefix + ".idx"

    @property
    def bin(self) -> str:
        """Path of the token file."""
        return self.prefix + ".bin"

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of the ``.idx`` and of the ``.bin``."""
        return _index_bytes(self.sequences, self.entries), self.total * np.dtype(self.dtype).itemsize

    def lengths(self) -> Array:
        """Map the tokens of each sequence, (sequences,) int32."""
        return _map(self.idx, "<i4", HEADER.size, self.sequences)

    def pointers(self) -> Array:
        """Map the byte of the ``.bin`` at which each sequence begins, (sequences,) int64."""
        return _map(self.idx, "<i8", HEADER.size + 4 * self.sequences, self.sequences)

    def tokens(self) -> Array:
        """Map the tokens, (total,) of ``dtype``."""
        return _map(self.bin, np.dtype(self.dtype).newbyteorder("<").str, 0, self.total)


def read_layout(prefix: str | os.PathLike[str], dtype: str | None = None) -> Layout:
    """Check a pair of files, including the whole index, in constant memory.

    Args:
        prefix: as for :class:`grace_ds.data.MMapTokens`.
        dtype: as for :class:`grace_ds.data.MMapTokens`.

    Raises:
        DataError: see :class:`grace_ds.data.MMapTokens`.
    """
    path = os.path.abspath(Path(prefix))
    path = path[:-4] if path.endswith((".bin", ".idx")) else path
    idx, size = path + ".idx", file_size(path + ".bin")
    code, sequences, entries = _header(idx)
    types = CODES.get(code)
    if types is None:
        raise DataError(f"{idx}: token type code {code} is none of {sorted(CODES)}; {CURE}")
    layout = Layout(path, sequences, entries, types[0], 0)
    _check_documents(idx, _map(idx, "<i8", HEADER.size + 12 * sequences, entries), sequences)
    total = _total(idx, layout.lengths())
    layout = Layout(path, sequences, entries, _dtype(path, types, total, size, dtype), total)
    _check_pointers(layout)
    return layout


def file_size(path: str) -> int:
    """Return the size of a file in bytes.

    Raises:
        DataError: the file does not exist.
    """
    if not os.path.isfile(path):
        raise DataError(f"{path} is not a file: give the path that .bin and .idx share (Megatron's --data-path)")
    return os.path.getsize(path)


def _map(path: str, dtype: str, offset: int, count: int) -> Array:
    array: Array = np.memmap(path, dtype, "r", offset, (count,)).view(np.ndarray)  # plain: a memmap is slow to slice
    return array


def _index_bytes(sequences: int, entries: int) -> int:
    return HEADER.size + 12 * sequences + 8 * entries


def _header(idx: str) -> tuple[int, int, int]:
    """Return type code, sequences and document index entries, checked against the file's size."""
    size = file_size(idx)
    with open(idx, "rb") as file:
        raw = file.read(HEADER.size)
    if not raw.startswith(MAGIC):
        raise DataError(
            f"{idx} begins with {raw[:9]!r}, not {MAGIC!r}: it is torn, or not of the memory-mapped kind; build it with "
            "--dataset-impl mmap"
        )
    if len(raw) < HEADER.size:
        raise DataError(f"{idx} has {size} bytes, fewer than its header's {HEADER.size}; {CURE}")
    _, version, code, sequences, entries = HEADER.unpack(raw)
    if version != 1:
        raise DataError(f"{idx} is of version {version}, and only 1 is known; {CURE}")
    if sequences < 1 or entries < 1:
        raise DataError(f"{idx} holds {sequences} sequences and {entries} document index entries: at least 1 is needed; {CURE}")
    expected = _index_bytes(sequences, entries)
    if size == expected + sequences:
        raise DataError(f"{idx} ends in {sequences} bytes of modes: a multimodal corpus cannot be read; build it from text alone")
    if size != expected:
        raise DataError(
            f"{idx} has {size} bytes, and {sequences} sequences with {entries} document index entries need {expected}; {CURE}"
        )
    return code, sequences, entries


def _total(idx: str, lengths: Array) -> int:
    """Return the number of tokens of all sequences."""
    total = 0
    for start in range(0, len(lengths), BLOCK):
        block = lengths[start : start + BLOCK]
        if block.min() < 0:
            raise DataError(f"{idx}: sequence {start + int(block.argmin())} has length {block.min()}; {CURE}")
        total += int(block.sum(dtype=np.int64))
    if total == 0:
        raise DataError(f"{idx}: all {len(lengths)} sequences are empty: there is nothing to train on; build the corpus anew")
    return total


def _dtype(path: str, types: tuple[str, ...], total: int, size: int, requested: str | None) -> str:
    """Return the one of ``types`` that makes ``total`` tokens ``size`` bytes long."""
    fits = [name for name in types if total * np.dtype(name).itemsize == size]
    if not fits:
        need = " or ".join(f"{total * np.dtype(name).itemsize} ({name})" for name in types)
        raise DataError(f"{path}.bin has {size} bytes, and the {total} tokens of its index need {need}; {CURE}")
    if requested is not None and requested not in fits:
        raise DataError(f"dtype is {requested!r}, and {path}.idx says {' or '.join(fits)}: leave dtype out, or correct it")
    if requested is None and len(fits) > 1:
        raise DataError(
            f"{path}.idx says {fits[0]} if megatron-core wrote it and {fits[1]} if DeepSpeed did, and the size of the .bin fits "
            f"both: pass dtype={fits[1]!r} if it holds token ids"
        )
    found = requested or fits[0]
    if np.dtype(found).kind == "f":
        raise DataError(f"{path}.bin holds {found}: token ids are integers; give a corpus of token ids")
    return found


def _check_pointers(layout: Layout) -> None:
    """Check that each sequence begins where the one before it ends."""
    lengths, pointers, size = layout.lengths(), layout.pointers(), np.dtype(layout.dtype).itemsize
    start = 0
    for first in range(0, len(lengths), BLOCK):
        ends = start + np.cumsum(lengths[first : first + BLOCK], dtype=np.int64) * size
        expected = np.concatenate(([start], ends[:-1]))
        wrong = np.flatnonzero(pointers[first : first + BLOCK] != expected)
        if len(wrong):
            i = int(wrong[0])
            raise DataError(
                f"{layout.idx}: sequence {first + i} begins at byte {pointers[first + i]}, and those before it end at "
                f"{expected[i]}; {CURE}"
            )
        start = int(ends[-1])


def _check_documents(idx: str, entries: Array, sequences: int) -> None:
    """Check that the document index rises from 0 to the number of sequences.

    Equal neighbours are a document without tokens.  DeepSpeed's builder leaves the index at [0] if ``end_document`` was never
    called; then it holds no information on documents.
    """
    if len(entries) == 1 and entries[0] == 0:
        return
    if entries[0] != 0 or entries[-1] != sequences:
        raise DataError(
            f"{idx}: the document index runs from {entries[0]} to {entries[-1]}, not from 0 to its {sequences} sequences "
            f"(was end_document called after the last one?); {CURE}"
        )
    for start in range(0, len(entries) - 1, BLOCK):
        decreasing = np.flatnonzero(np.diff(entries[start : start + BLOCK + 1]) < 0)
        if len(decreasing):
            i = start + int(decreasing[0])
            raise DataError(f"{idx}: the document index falls from {entries[i]} to {entries[i + 1]} at entry {i + 1}; {CURE}")
