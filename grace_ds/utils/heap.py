"""Memory that was freed, given back to the system."""

from __future__ import annotations

import contextlib
import ctypes


def trim_heap() -> None:
    """Gives back what the C library keeps of freed memory, where it is glibc; does nothing elsewhere.

    It gives back the end of its heap by itself, but not what was freed below something that is still held.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
