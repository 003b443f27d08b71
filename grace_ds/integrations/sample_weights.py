"""Provide ``grace_ds.sample_weights()``: the weights for the losses of the micro-batch in training."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch

from grace_ds.errors import ConfigError
from grace_ds.integrations.controller import Controller
from grace_ds.records import FloatArray

# The controllers of attached engines, in order of attachment; the references are weak and keep no engine alive.
_attached: list[weakref.ref[Controller]] = []


def attached(controller: Controller) -> None:
    """Make this controller's engine the default of ``sample_weights()``."""
    _attached.append(weakref.ref(controller))


def detached(controller: Controller) -> None:
    """Remove this controller's engine from the defaults of ``sample_weights()``."""
    _attached[:] = [other for other in _attached if other() not in (None, controller)]


def sample_weights(engine: Any = None) -> torch.Tensor:
    """Return weights for the losses of the micro-batch in training: (rows,) float32 on the CPU, mean 1 over a coreset.

    With ``weights: inverse_probability`` a mean loss weighted by them estimates the window's mean loss instead of the
    coreset's.  With ``weights: none``, in shadow mode and for batches that GRACE has not issued all weights are 1.

    Args:
        engine: default: the engine that GRACE was attached to last.

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
    geometry = controller.geometry
    slots = controller.book.slots((issued.end - 1) * geometry.micro + geometry.rank * geometry.rows, geometry.rows)
    known = dict(zip(slots.ids.tolist(), slots.weights.tolist(), strict=True))
    return np.array([known.get(i, 1.0) for i in issued.ids.tolist()], np.float32)
