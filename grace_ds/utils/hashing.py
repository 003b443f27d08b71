"""Mix integers to pseudo-random words by splitmix64 (Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: the step of splitmix64


def finish(z: Words) -> Words:
    """Apply splitmix64's last steps to ``z`` in place, and return it: every output bit depends on every input bit."""
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def splitmix64(seeds: Any) -> Words:
    """Return the first output of splitmix64 seeded with each of ``seeds`` (integers of any shape); uint64."""
    with np.errstate(over="ignore"):
        return finish(np.asarray(seeds).astype(np.uint64) + np.uint64(GOLDEN))


def finish_one(z: int) -> int:
    """Return :func:`finish` of the lowest 64 bits of one number."""
    return int(finish(np.array([z % 2**64], np.uint64))[0])
