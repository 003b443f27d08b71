"""What the k-NN graph needs of RAPIDS: memory, NCCL and RAFT; and whether this rank can use them.  Not yet run on a GPU.

Written against RAPIDS 26.10 and checked against its real signatures on machines without a GPU (tests/contract); the tests
that compute (tests/gpu) wait for a machine that has one.  RAPIDS is imported only where ``graph.backend`` is ``cuvs``, or
``auto`` on a CUDA device.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util

from grace_ds.utils.arrays import gpu_extra

PACKAGES = ("cuvs", "cupy", "rmm", "raft_dask")  # that the cuVS backend imports


def obstacle(device: str) -> str:
    """Why the graph cannot be built on ``device`` by cuVS, on this rank; empty if it can.

    Ranks may differ: one of them may lack a package, or free memory.  Agree on the answer before choosing a backend by it.

    Args:
        device: of the engine, such as ``cpu``, ``cuda`` or ``cuda:1``.
    """
    if device.split(":")[0] != "cuda":
        return f"the device is {device}"
    import torch

    if not torch.cuda.is_available() or torch.version.cuda is None:
        return f"torch {torch.__version__} sees no NVIDIA GPU"
    package = missing()
    if package:
        return f"{package} is not installed (pip install grace_ds[{gpu_extra()}])"
    return broken() or _full()


def missing() -> str:
    """The first of :data:`PACKAGES` that is not installed; empty if all are."""
    return next((name for name in PACKAGES if importlib.util.find_spec(name) is None), "")


@functools.cache
def broken() -> str:
    """The first of :data:`PACKAGES` that cannot be imported, with the error; empty if all can.  Asked once a process."""
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:  # a library of another CUDA, or one that is not there
            return f"{name} cannot be imported: {' '.join(str(error).split())}"
    return ""


def _full() -> str:
    from grace_ds.graph.gpu.memory import LEAST, SHARE, free_bytes

    free = free_bytes()
    return f"only {free >> 20} MiB are free on the GPU" if free * SHARE < LEAST else ""
