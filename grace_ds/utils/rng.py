"""The global random states, which are the job's own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


@contextmanager
def undisturbed_rng() -> Iterator[None]:
    """Puts the global random states of Python, NumPy and torch (CPU) back at exit, so that reading leaves no trace."""
    import torch

    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
