"""Protect the global random states, which belong to the job."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


@contextmanager
def undisturbed_rng() -> Iterator[None]:
    """Restore the global random states of Python, NumPy and torch (CPU) at exit, so that reading data does not change them."""
    import torch

    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
