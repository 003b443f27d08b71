"""Check and provide what the k-NN graph needs of RAPIDS: memory, NCCL and RAFT.  Not yet run on a GPU.

Written against RAPIDS 26.10 and checked against its real signatures on machines without a GPU (tests/contract); the tests
that compute (tests/gpu) need a machine that has one.  RAPIDS is imported only if ``graph.backend`` is ``cuvs``, or ``auto``
on a CUDA device.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util

from grace_ds.utils.arrays import gpu_extra

PACKAGES = ("cuvs", "cupy", "rmm", "raft_dask")  # packages that the cuVS back end imports


def obstacle(device: str) -> str:
    """Return why cuVS cannot build the graph on ``device``, on this rank; empty if it can.

    Ranks may differ: one of them may lack a package, or free memory.  Let the ranks agree before choosing a back end.


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
    """Return the first of :data:`PACKAGES` that is not installed; empty if all are."""
    return next((name for name in PACKAGES if importlib.util.find_spec(name) is None), "")


@functools.cache
def broken() -> str:
    """Return the first of :data:`PACKAGES` that cannot be imported, with the error; empty if all can.

    The result is cached for the process.
    """
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:  # a library of another CUDA version, or a missing one
            return f"{name} cannot be imported: {' '.join(str(error).split())}"
    return ""


def _full() -> str:
    from grace_ds.graph.gpu.memory import LEAST, SHARE, free_bytes

    free = free_bytes()
    return f"only {free >> 20} MiB are free on the GPU" if free * SHARE < LEAST else ""
