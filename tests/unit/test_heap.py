"""Freed memory goes back to the system."""

from __future__ import annotations

from pathlib import Path

from grace_ds.utils.heap import trim_heap


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_what_was_freed_below_something_that_is_held_goes_back() -> None:
    pieces = [bytearray(b"x" * 50_000) for _ in range(4000)]  # 200 MB, each too small to be mapped by itself
    last = pieces.pop()
    pieces.clear()
    before = resident()
    trim_heap()
    assert before - resident() > 100_000_000
    assert last[-1:] == b"x"
