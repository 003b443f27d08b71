"""Choose the array library for the rows of a rank: NumPy, or on a CUDA device CuPy, or torch if CuPy cannot be used.

Propagation and importance are written on the array API (https://data-apis.org/array-api) and compute on the device of their
arguments.  Move the arguments in with :func:`to_device`, and the results out with :func:`to_host`; keep the device's memory
only within :func:`device_memory`.  The edges of the graph and all data sent between ranks stay NumPy.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from array_api_compat import is_cupy_array, is_torch_array

from grace_ds.records import Array

log = logging.getLogger(__name__)


def library_for(device: Any) -> tuple[str, str]:
    """Return (numpy | cupy | torch, the reason in words) for rows on ``device``.

    NumPy everywhere except on CUDA: propagation needs float64, which other accelerators may lack.

    Args:
        device: a torch device, or its name, such as ``cpu``, ``cuda`` or ``cuda:1``.
    """
    if _kind(device) != "cuda":
        return "numpy", f"the device is {device}"
    problem = _cupy_problem()
    return ("torch", problem) if problem else ("cupy", f"the device is {device}")


def to_device(array: Any, device: Any) -> Any:
    """Return ``array`` as an array of the library for ``device``, on that device.

    Args:
        array: of NumPy, CuPy or torch, of any shape and dtype that the library has.  It may be shared, not copied: do not
            change it afterwards.
        device: as in :func:`library_for`.  With CuPy it becomes the calling thread's current device.
    """
    library, why = library_for(device)
    _log_choice(library, why)
    if library == "numpy":
        return to_host(array)
    import torch

    if library == "torch":
        if not is_torch_array(array):
            array = torch.from_numpy(np.require(to_host(array), requirements=("C", "W")))  # torch warns of what it cannot write
        return array.detach().to(device)
    import cupy

    index = torch.device(device).index
    cupy.cuda.Device(torch.cuda.current_device() if index is None else index).use()
    return cupy.from_dlpack(array.detach()) if is_torch_array(array) and array.is_cuda else cupy.asarray(to_host(array))


def to_host(array: Any) -> Array:
    """Return ``array`` of NumPy, CuPy or torch as a NumPy array of its shape and dtype.

    There is no copy if it is in host memory.  bfloat16, which NumPy does not have, becomes float32.
    """
    if is_torch_array(array):
        import torch

        array = array.detach().cpu()
        converted: Array = (array.float() if array.dtype == torch.bfloat16 else array).numpy()
        return converted
    return np.asarray(array.get() if is_cupy_array(array) else array)


@contextmanager
def device_memory(device: Any) -> Iterator[None]:
    """Give device memory to the library for ``device`` within this context, and return it to the others afterwards.

    torch and CuPy keep freed memory in their own caches.  Without this, CuPy finds no room next to a training job, and the job
    none after a refresh.  Nothing is done for NumPy and torch.
    """
    if library_for(device)[0] != "cupy":
        yield
        return
    import cupy
    import torch

    torch.cuda.empty_cache()
    try:
        yield
    finally:
        cupy.get_default_memory_pool().free_all_blocks()


def gpu_extra() -> str:
    """Return the extra of ``grace_ds`` with CuPy and RAPIDS for the CUDA version of torch; without one, for CUDA 12."""
    import torch

    return "gpu-cu13" if (torch.version.cuda or "12").split(".")[0] == "13" else "gpu-cu12"


def _kind(device: Any) -> str:
    return str(device).split(":")[0]


@functools.cache
def _cupy_problem() -> str:
    """Return why CuPy cannot be used on this machine; empty if it can.

    It compiles a first kernel to find out, once per process.
    """
    if importlib.util.find_spec("cupy") is None:
        return f"cupy is not installed (pip install grace_ds[{gpu_extra()}])"
    try:
        import cupy
        import torch

        cupy.cuda.Device(torch.cuda.current_device()).use()
        float((cupy.arange(3, dtype=cupy.float64) + 0.5).sum())
    except Exception as error:  # a library of another CUDA version, no compiler, no memory: use torch, which computes the same
        return f"cupy does not work here: {type(error).__name__}: {' '.join(str(error).split())}"
    return ""


@functools.cache
def _log_choice(library: str, why: str) -> None:
    log.info("rows of propagation and importance: %s (%s)", library, why)
