"""``grace_ds.sample_weights()``: what the losses of the micro-batch in training are to be weighted with."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch

from grace_ds.errors import ConfigError
from grace_ds.integrations.controller import Controller
from grace_ds.records import FloatArray

# The controllers of attached engines, the last one last; an engine that nobody holds is not held here either.
_attached: list[weakref.ref[Controller]] = []


def attached(controller: Controller) -> None:
    """From here on ``sample_weights()`` is about this controller's engine."""
    _attached.append(weakref.ref(controller))


def detached(controller: Controller) -> None:
    """And from here on no more."""
    _attached[:] = [other for other in _attached if other() not in (None, controller)]


def sample_weights(engine: Any = None) -> torch.Tensor:
    """Weights for the losses of the micro-batch that is being trained on: (rows,) float32 on the CPU, mean 1 over a coreset.

    With ``weights: inverse_probability`` a mean loss weighted by them estimates the window's instead of the coreset's;
    with ``weights: none``, in shadow mode and for batches that GRACE has not issued they are ones.

    Args:
        engine: the engine; default: the one that GRACE was attached to last.

    Raises:
        ConfigError: GRACE is attached to no engine, or no training forward has begun.
    """
    handle = getattr(engine, "grace_ds", None)
    controller = handle.controller if handle is not None else _latest() if engine is None else None
    if controller is None:
        raise ConfigError("sample_weights() needs an engine with GRACE; call it after grace_ds.initialize, or leave it out")
    return torch.from_numpy(_of_last_batch(controller))


def _latest() -> Controller | None:
    living = [controller for controller in (ref() for ref in _attached) if controller is not None]
    return living[-1] if living else None


def _of_last_batch(controller: Controller) -> FloatArray:
    issued = controller.weighed
    if issued is None:
        raise ConfigError("sample_weights() was called before the first training forward; call it inside or after one")
    ones = np.ones(len(issued.ids), np.float32)
    if controller.config.weights == "none" or controller.sampler is None or not issued.end:
        return ones
    g = controller.geometry
    slots = controller.book.slots((issued.end - 1) * g.micro + g.rank * g.rows, g.rows)
    known = dict(zip(slots.ids.tolist(), slots.weights.tolist(), strict=True))
    return np.array([known.get(i, 1.0) for i in issued.ids.tolist()], np.float32)
