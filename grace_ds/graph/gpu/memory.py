"""Provide GPU memory for one graph: a capped pool next to torch's own cache, released completely afterwards.

Not yet run on a GPU.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from grace_ds.errors import DataError

SHARE = 0.8  # of what is free after torch has returned its cache
LEAST = 256 << 20  # bytes below which no graph is worth starting
_UNIT = 256  # RMM asks for multiples of it


def pool_bytes(free: int, share: float = SHARE) -> int:
    """Return the size limit of the pool if ``free`` bytes are free.

    Raises:
        DataError: too little memory is free.
    """
    limit = int(free * share) // _UNIT * _UNIT
    if limit < LEAST:
        cure = "set graph.backend to faiss or torch, or a smaller window"
        raise DataError(f"{free >> 20} MiB are free on the GPU: too few for a graph there; {cure}")
    return limit


def free_bytes() -> int:
    """Return the bytes of the current GPU that a pool could have: what is free, and what torch caches without using it."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    return int(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())


@contextmanager
def gpu_memory(share: float = SHARE) -> Iterator[Any]:
    """Give RMM and CuPy a memory pool within this context; yield the CUDA stream to work on.

    torch's cached blocks go back to the device first.  The stream is a separate one, because cuVS reads stream 0 as "none given".

    Raises:
        DataError: too little memory is free.
    """
    import cupy
    import rmm
    import torch
    from rmm.allocators.cupy import rmm_cupy_allocator

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    cupy.cuda.Device(torch.cuda.current_device()).use()
    free, _ = cupy.cuda.runtime.memGetInfo()
    limit = pool_bytes(free, share)
    before, allocator = rmm.mr.get_current_device_resource(), cupy.cuda.get_allocator()
    pool = rmm.mr.PoolMemoryResource(rmm.mr.CudaMemoryResource(), initial_pool_size=LEAST, maximum_pool_size=limit)
    rmm.mr.set_current_device_resource(pool)
    cupy.cuda.set_allocator(rmm_cupy_allocator)
    stream = cupy.cuda.Stream(non_blocking=True)
    try:
        with stream:
            yield stream
        stream.synchronize()
    finally:
        cupy.cuda.set_allocator(allocator)
        rmm.mr.set_current_device_resource(before)
        gc.collect()  # any object that still holds a block of the pool would keep the pool alive
        del pool
