"""Which array library computes with the rows of a rank: NumPy, or on a CUDA device CuPy, or torch if CuPy cannot be used.

Propagation and importance are written on the array API (https://data-apis.org/array-api) and compute where their arguments
lie.  Move the arguments in with :func:`to_device`, and the results out with :func:`to_host`; keep the device's memory only
for the length of :func:`device_memory`.  The edges of the graph and all that travels between ranks stay NumPy.
"""

from __future__ import annotations

import functools
import importlib
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
    """(numpy | cupy | torch, the reason in words) for rows on ``device``.

    NumPy everywhere but on CUDA: propagation needs float64, which other accelerators may not have.

    Args:
        device: a torch device, or its name, such as ``cpu``, ``cuda`` or ``cuda:1``.
    """
    if _kind(device) != "cuda":
        return "numpy", f"the device is {device}"
    problem = _cupy_problem()
    return ("torch", problem) if problem else ("cupy", f"the device is {device}")


def namespace_for(device: Any) -> Any:
    """The array-API namespace of the library for ``device``; what was chosen and why is logged once."""
    library, why = library_for(device)
    _tell(library, why)
    return importlib.import_module(f"array_api_compat.{library}")


def to_device(array: Any, device: Any) -> Any:
    """``array`` as an array of the library for ``device``, lying there.

    Args:
        array: of NumPy, CuPy or torch, of any shape and dtype that the library has.  It may be shared, not copied: do not
            change it afterwards.
        device: as in :func:`library_for`.  Under CuPy it becomes the calling thread's current device.
    """
    library, why = library_for(device)
    _tell(library, why)
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
    """``array`` of NumPy, CuPy or torch as a NumPy array of its shape and dtype, without a copy if it lies in host memory.

    bfloat16, which NumPy does not have, becomes float32.
    """
    if is_torch_array(array):
        import torch

        array = array.detach().cpu()
        found: Array = (array.float() if array.dtype == torch.bfloat16 else array).numpy()
        return found
    return np.asarray(array.get() if is_cupy_array(array) else array)


@contextmanager
def device_memory(device: Any) -> Iterator[None]:
    """Lets the library for ``device`` have memory for the length of the block, and the others have it back afterwards.

    torch and CuPy keep what they have freed in caches of their own: without this, CuPy finds no room beside a training job, and
    the job none after a refresh.  Nothing is done for NumPy and torch.
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
    """The extra of ``grace_ds`` with CuPy and RAPIDS for the CUDA that torch was built for; without one, for CUDA 12."""
    import torch

    return "gpu-cu13" if (torch.version.cuda or "12").split(".")[0] == "13" else "gpu-cu12"


def _kind(device: Any) -> str:
    return str(device).split(":")[0]


@functools.cache
def _cupy_problem() -> str:
    """Why CuPy cannot be used here; empty if it can.  It compiles its first kernel to know, once a process."""
    if importlib.util.find_spec("cupy") is None:
        return f"cupy is not installed (pip install grace_ds[{gpu_extra()}])"
    try:
        import cupy
        import torch

        cupy.cuda.Device(torch.cuda.current_device()).use()
        float((cupy.arange(3, dtype=cupy.float64) + 0.5).sum())
    except Exception as error:  # a library of another CUDA, no compiler, no memory: torch computes the same
        return f"cupy does not work here: {type(error).__name__}: {' '.join(str(error).split())}"
    return ""


@functools.cache
def _tell(library: str, why: str) -> None:
    log.info("rows of propagation and importance: %s (%s)", library, why)
