"""Define the interface of k-NN back ends, which search the index rows of one shard, and choose one.

A back end only proposes candidates.  :mod:`grace_ds.graph.search` requests a few more than it needs and computes their
similarity again in exact arithmetic, so two exact back ends give the same graph bit for bit.
"""

from __future__ import annotations

import importlib.util
import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import numpy as np

from grace_ds import registry
from grace_ds.comm.base import Comm
from grace_ds.errors import ConfigError
from grace_ds.graph import gpu
from grace_ds.records import Array, FloatArray, IntArray

log = logging.getLogger(__name__)

FLAT_ROWS = 100_000  # below this an exact search of real text costs less than training, tuning and searching an approximate index


class Backend(Protocol):
    """A nearest-neighbour library on the rows of one shard; similarity is the inner product of unit vectors.

    Attributes:
        name: as in the configuration.
    """

    name: str

    def build(self, X: FloatArray, ids: IntArray) -> Any:
        """Build the index of ``X`` (m, d) float32, unit norm, with row ids ``ids`` (m,) int64, on this rank."""
        ...

    def is_exact(self, rows: int) -> bool:
        """Return whether a shard of ``rows`` rows is searched exactly, up to float32 rounding."""
        ...

    def search(self, index: Any, Q: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
        """Return the k index rows nearest to each query.

        Args:
            index: what :meth:`build` returned.
            Q: (n, d) float32, unit norm.
            k: number of neighbours; may exceed m.

        Returns:
            ids (n, k) int64 and similarity (n, k) float32, nearest first, padded by -1 and -inf.
        """
        ...


register = registry.backends.register


@register("torch")
def _torch(recall: float) -> Backend:
    from grace_ds.graph.backends.torch_backend import TorchBackend

    return TorchBackend()


@register("faiss")
def _faiss(recall: float) -> Backend:
    if importlib.util.find_spec("faiss") is None:
        raise ConfigError(
            "graph.backend is 'faiss', but faiss is not installed: pip install grace_ds[cpu], or set graph.backend to torch"
        )
    from grace_ds.graph.backends.faiss_backend import FaissBackend

    return FaissBackend(recall)


@register("cuvs")
def _cuvs(recall: float) -> Backend:
    module = gpu.missing()
    if module:
        cure = "pip install grace_ds[gpu-cu12] (or gpu-cu13), or set graph.backend to faiss or torch"
        raise ConfigError(f"graph.backend is 'cuvs', but {module} is not installed: {cure}")
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("graph.backend is 'cuvs', but torch sees no GPU on this rank: set graph.backend to faiss or torch")
    broken = gpu.broken()
    if broken:
        raise ConfigError(
            f"graph.backend is 'cuvs', but {broken}; install the extra for the CUDA that torch was built for "
            "(grace_ds[gpu-cu12] or [gpu-cu13]), or set graph.backend to faiss or torch"
        )
    from grace_ds.graph.backends.cuvs_backend import CuvsBackend

    return CuvsBackend(recall)


@runtime_checkable
class Opened(Protocol):
    """A back end that holds resources while a graph is built: memory, a stream, a communicator."""

    def open(self, comm: Comm | None) -> AbstractContextManager[None]:
        """Acquire the resources, and release them on exit.  Collective.

        Args:
            comm: ranks to join by a communicator of the back end's own; None: :meth:`bind` provides one later.
        """
        ...

    def bind(self, resources: Any) -> None:
        """Use ``resources`` instead of its own until the back end is closed."""
        ...


def opened(comm: Comm | None, backend: Backend) -> AbstractContextManager[None]:
    """Return the context in which ``backend`` can be used."""
    return backend.open(comm) if isinstance(backend, Opened) else nullcontext()


def choose(name: str, rows: int, recall: float = 0.99, *, device: str = "cpu") -> Backend:
    """Return the back end called ``name``; ``auto`` decides by device, size and installed packages, and logs the choice.

    Args:
        name: a registered backend, or ``auto``.
        rows: index rows of the *largest* shard over all ranks, so that all ranks decide the same.
        recall: the recall that an approximate back end must reach, in (0, 1]; 1 keeps the search exact.
        device: of the engine, such as ``cpu`` or ``cuda:0``; read by ``auto`` only.  With several ranks leave the default and
            pass the name that :func:`agreed` returns: all ranks must take the same back end.

    Raises:
        ConfigError: the name is unknown, its library is missing.
    """
    if name == "auto":
        name, why = automatic(device, rows)
        log.info("graph.backend auto: %s (%s)", name, why)
    backend: Backend = registry.backends.get(name)(recall)
    return backend


def exact(name: str, *, device: str = "cpu") -> Backend:
    """Return the back end called ``name`` in its exact form, for the clustered tier's many small searches.

    Args:
        name: a registered backend; ``auto``: cuvs if it can be used on ``device``, else torch.
        device: as in :func:`choose`.
    """
    if name == "auto":
        reason = gpu.obstacle(device)
        name = "torch" if reason else "cuvs"
        why = f"the device is {device}" if not reason else "; ".join(["small exact searches", *_not_cuvs(device, reason)])
        log.info("graph.backend auto: %s (%s)", name, why)
    return choose(name, 0, 1.0)


def agreed(comm: Comm, name: str, device: str) -> str:
    """Return ``cuvs`` instead of ``auto`` if every rank can use it on its GPU; else ``name``.  Collective.

    Ranks that chose alone could take different back ends, and only some of them would wait for the NCCL clique of cuVS.


    Args:
        comm: of the ranks that build the graph.
        name: as configured, the same on all ranks.
        device: of this rank's engine, of the same kind on all ranks.
    """
    if name != "auto" or device.split(":")[0] != "cuda":
        return name
    reason = gpu.obstacle(device)
    able = np.concatenate(comm.allgather(np.array([not reason], np.int64)))
    if able.all():
        log.info("graph.backend auto: cuvs (the device is %s)", device)
        return "cuvs"
    unable = ", ".join(map(str, np.flatnonzero(able == 0)))
    log.info("graph.backend auto: not cuvs, which rank(s) %s cannot use%s", unable, f"; here: {reason}" if reason else "")
    return name


def automatic(device: str, rows: int | None = None) -> tuple[str, str]:
    """Return (the back end that ``auto`` takes, the reason in words).

    Args:
        device: as in :func:`choose`.
        rows: as in :func:`choose`; None: not known yet.
    """
    reason = gpu.obstacle(device)
    if not reason:
        return "cuvs", f"the device is {device}"
    large = rows is not None and rows >= FLAT_ROWS
    why = [] if rows is None else [f"{rows} index rows in the largest shard"]
    name = "torch" if importlib.util.find_spec("faiss") is None else "faiss"
    if name == "faiss":
        why.append(f"approximate from {FLAT_ROWS} rows" if large else f"exact below {FLAT_ROWS} rows")
    else:
        why.append("faiss is not installed (pip install grace_ds[cpu])" + ("; this is slow" if large else ""))
    return name, "; ".join([*why, *_not_cuvs(device, reason)])


def _not_cuvs(device: str, reason: str) -> list[str]:
    """Return the addition to a reason: on a GPU, why cuVS is not used; elsewhere nothing."""
    return [f"not cuvs: {reason}"] if device.split(":")[0] == "cuda" else []


def padded(ids: Array, similarity: Array, k: int) -> tuple[IntArray, FloatArray]:
    """Return ``ids`` and ``similarity`` (n, j), j <= k, extended to k columns by -1 and -inf."""
    n, j = ids.shape
    out_ids = np.full((n, k), -1, np.int64)
    out_sim = np.full((n, k), -np.inf, np.float32)
    out_ids[:, :j] = ids
    out_sim[:, :j] = similarity
    return out_ids, out_sim
