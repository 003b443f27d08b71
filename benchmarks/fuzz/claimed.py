"""Headers that claim 10¹² rows: what reading each of them allocates.

Each input is a few hundred bytes that announce terabytes; a sparse file with a consistent header, which has the size that it
claims but no content, is among them.
"""

from __future__ import annotations

import io
import json
import os
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fuzz.frames import ME, RANKS
from grace_ds.comm.framing import DTYPE, LONGEST, NDIM, OP, ROWS, SEAL, WIDTH, FramedComm, Op, seal
from grace_ds.data import MMapTokens
from grace_ds.data.pool import read_ids, read_sources
from grace_ds.data.schedule import load_schedule
from grace_ds.data.trusted import load_trusted
from grace_ds.errors import GraceError
from grace_ds.features import cache
from grace_ds.records import IntArray

ROWS_CLAIMED = 10**12


def npy_header(rows: int, columns: int | None = None) -> bytes:
    """The header of a .npy file of int64."""
    buffer = io.BytesIO()
    shape = (rows,) if columns is None else (rows, columns)
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<i8", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


class _Liar(FramedComm):
    """A transport whose other ranks announce 10¹² rows, with a seal that fits."""

    name = "liar"

    def __init__(self) -> None:
        super().__init__(ME, RANKS, 5.0)

    def _alltoall(self, send: IntArray) -> IntArray:
        received: IntArray = send.copy()
        others = [rank for rank in range(RANKS) if rank != ME]
        received[others, LONGEST] = received[others, ROWS] = ROWS_CLAIMED
        if send[0, OP] == Op.BROADCAST:
            received[others, DTYPE], received[others, NDIM] = 5, 1
        received[:, SEAL] = seal(received)
        assert received.shape == (RANKS, WIDTH)
        return received


def attempts(folder: Path) -> dict[str, Callable[[], Any]]:
    """Readings by name; each must be refused."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.npy").write_bytes(npy_header(ROWS_CLAIMED, 8) + bytes(64))
    (folder / "ids.npy").write_bytes(npy_header(ROWS_CLAIMED) + bytes(64))
    header = json.dumps({"ids": {"dtype": "I64", "shape": [ROWS_CLAIMED], "data_offsets": [0, 8 * ROWS_CLAIMED]}}).encode()
    (folder / "schedule-000000.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    _sparse(folder / "schedule-000001.safetensors", len(header).to_bytes(8, "little") + header, 8 * ROWS_CLAIMED)
    _sparse(folder / "sparse.npy", npy_header(ROWS_CLAIMED), 8 * ROWS_CLAIMED)
    index = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x04" + ROWS_CLAIMED.to_bytes(8, "little") * 2
    (folder / "corpus.idx").write_bytes(index + bytes(64))
    (folder / "corpus.bin").write_bytes(bytes(64))
    for name, kind in (("ab", zipfile.ZIP_STORED), ("cd", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(cache.path_of(folder, name), "w", kind) as archive:
            archive.writestr("quality.npy", npy_header(ROWS_CLAIMED) + bytes(64 if name == "ab" else 1 << 26))
    like = list(range(8))
    return {
        "trusted .npy": lambda: load_trusted(folder / "rows.npy", like),
        "id file .npy": lambda: read_ids(folder / "ids.npy", 100),
        "id file .npy, sparse": lambda: read_ids(folder / "sparse.npy", 100),
        "sources .npy": lambda: read_sources(folder / "ids.npy", 100),
        "schedule": lambda: load_schedule(folder / "schedule-000000.safetensors"),
        "schedule, sparse": lambda: load_schedule(folder / "schedule-000001.safetensors"),
        "Megatron index": lambda: MMapTokens(folder / "corpus"),
        "feature cache": lambda: refused(cache.load(folder, "ab")),
        "feature cache, deflated": lambda: refused(cache.load(folder, "cd")),
        "frame, allgather": lambda: _Liar().allgather(np.zeros((2, 3))),
        "frame, exchange": lambda: _Liar().exchange([np.zeros((2, 3))] * RANKS),
        "frame, broadcast": lambda: _Liar().broadcast(None, root=0),
    }


def refused(found: Any) -> None:
    """Raise if a cache was not read, which is how it refuses."""
    if found is None:
        raise GraceError("the cache is computed anew; leave it")


def allocated(folder: Path) -> dict[str, float]:
    """MiB that each attempt has allocated at most.

    Raises:
        AssertionError: one was not refused.
    """
    found = {}
    for name, read in attempts(folder).items():
        tracemalloc.start()
        try:
            read()
        except GraceError:
            found[name] = tracemalloc.get_traced_memory()[1] / 2**20
        else:
            raise AssertionError(f"{name}: taken")
        finally:
            tracemalloc.stop()
    return found


def _sparse(path: Path, header: bytes, size: int) -> None:
    path.write_bytes(header)
    try:
        os.truncate(path, len(header) + size)
    except OSError:  # a file system without files of this size
        os.truncate(path, len(header) + (1 << 40))
