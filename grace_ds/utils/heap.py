"""Return freed memory to the system."""

from __future__ import annotations

import contextlib
import ctypes


def trim_heap() -> None:
    """Return freed memory that the C library retains to the system, if it is glibc; do nothing elsewhere.

    glibc returns the end of its heap by itself, but not memory freed below something that is still in use.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
