"""Search with cuVS: brute force if it is cheap, else NN-descent or compressed lists at a measured recall.

NN-descent loses recall on some distributions (rapidsai/cuvs#785), so no recall is assumed.  A sample of the queries is
searched by brute force, and the effort is raised until the recall is reached, in the end to brute force.  Outputs are
allocated by this module; row ids are positions in a shard, int64.  Not yet run on a GPU.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.graph.backends import padded
from grace_ds.records import Array, FloatArray, IntArray

log = logging.getLogger(__name__)

BRUTE_ROWS = 500_000  # below this a GPU compares all pairs faster than it trains an index
QUERY_BLOCK = 65_536  # bounds the outputs on the device
SAMPLE_QUERIES = 1000
DEGREES = (32, 64, 128)  # of NN-descent, tried in turn
PROBES = (16, 64, 256)  # lists of ivf_pq to search, tried in turn
CANDIDATES = 4  # candidates of ivf_pq, in multiples of k, compared again by refine


@dataclass
class CuvsIndex:
    """Rows on the device, with the search structure chosen for them.

    Attributes:
        X: (m, d) CuPy array, float32, or float16 if configured.
        ids: (m,) int64, host.
        core: brute_force index; None if another search is used.
        compressed: (ivf_pq index, n_probes) once chosen.
    """

    X: Any
    ids: IntArray
    core: Any = None
    compressed: Any = None
    host: FloatArray = field(default_factory=lambda: np.empty((0, 0), np.float32))


class CuvsBackend:
    """Back end that searches on this rank's GPU.

    Args:
        recall: share of the true k nearest that a search must find on average, in (0, 1].
        half: keep the rows as float16: half the memory; the recall of the order is then about .997.

    Attributes:
        resources: handle that cuVS runs on; set while :meth:`open` is in force.
        device: the CuPy device; each thread makes it the current one.
    """

    name = "cuvs"

    def __init__(self, recall: float, half: bool = False) -> None:
        self.recall, self.half = recall, half
        self.resources: Any = None
        self.device: Any = None

    @contextmanager
    def open(self, comm: Comm | None) -> Iterator[None]:
        """Acquire memory, stream, and with several ranks the RAFT handle with its NCCL clique, for one graph.  Collective."""
        import cupy
        import torch
        from cuvs.common import Resources

        from grace_ds.graph.gpu.memory import gpu_memory
        from grace_ds.graph.gpu.raft_comms import clique

        with ExitStack() as stack:
            stream = stack.enter_context(gpu_memory())
            self.device = cupy.cuda.Device(torch.cuda.current_device())
            if comm is not None and comm.size > 1:
                self.bind(stack.enter_context(clique(comm, stream)).resources)
            else:
                self.bind(Resources(stream=stream.ptr))
            try:
                yield
                self.resources.sync()
            finally:
                self.resources = self.device = None

    def bind(self, resources: Any) -> None:
        """Use ``resources`` from here on, in any thread."""
        self.resources = resources

    def build(self, X: FloatArray, ids: IntArray) -> CuvsIndex:
        """See :class:`grace_ds.graph.backends.Backend`."""
        from cuvs.neighbors import brute_force

        self.device.use()
        rows = _on_device(X, np.float16 if self.half else np.float32)
        index = CuvsIndex(rows, ids, host=X)
        if self.is_exact(len(X)) or self.half:
            index.core = brute_force.build(rows, metric="inner_product", resources=self.resources)
        return index

    def is_exact(self, rows: int) -> bool:
        """Return whether the search is brute force in float32."""
        return not self.half and (rows < BRUTE_ROWS or self.recall >= 1.0)

    def search(self, index: CuvsIndex, Q: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
        """See :class:`grace_ds.graph.backends.Backend`; the first search of a large index chooses how."""
        import cupy

        self.device.use()
        kept = min(k, len(index.ids))
        if not kept or not len(Q):
            return padded(np.empty((len(Q), 0), np.int64), np.empty((len(Q), 0), np.float32), k)
        if index.core is None and index.compressed is None:
            if Q is index.host:
                graph = self._descend(index, kept)
                if graph is not None:
                    return padded(index.ids[graph[0]], graph[1], k)
            self._compress(index, Q, kept)
        position = np.empty((len(Q), kept), np.int64)
        similarity = np.empty((len(Q), kept), np.float32)
        for lo in range(0, len(Q), QUERY_BLOCK):
            block = _on_device(Q[lo : lo + QUERY_BLOCK], index.X.dtype)
            near, neighbours = self._block(index, block, kept)
            self.resources.sync()
            position[lo : lo + len(block)] = cupy.asnumpy(neighbours)
            similarity[lo : lo + len(block)] = cupy.asnumpy(near)
        there = (position >= 0) & (position < len(index.ids))  # cuVS marks missing neighbours in more than one way
        return padded(np.where(there, index.ids[np.where(there, position, 0)], -1), np.where(there, similarity, -np.inf), k)

    def _block(self, index: CuvsIndex, Q: Any, k: int) -> tuple[Any, Any]:
        """Return (similarity, positions) on the device, nearest first."""
        import cupy
        from cuvs.neighbors import brute_force

        if index.compressed is not None:
            return self._probe(index, Q, k, *index.compressed)
        near, neighbours = cupy.empty((len(Q), k), cupy.float32), cupy.empty((len(Q), k), cupy.int64)
        brute_force.search(index.core, Q, k, neighbors=neighbours, distances=near, resources=self.resources)
        return near, neighbours

    def _probe(self, index: CuvsIndex, Q: Any, k: int, core: Any, probes: int) -> tuple[Any, Any]:
        """Return the candidates from the compressed lists, compared again using the rows themselves."""
        import cupy
        from cuvs.neighbors import ivf_pq, refine

        wide = min(CANDIDATES * k, len(index.ids))
        some = cupy.empty((len(Q), wide), cupy.int64)
        rough = cupy.empty((len(Q), wide), cupy.float32)
        ivf_pq.search(
            ivf_pq.SearchParams(n_probes=probes), core, Q, wide, neighbors=some, distances=rough, resources=self.resources
        )
        # If the lists held too few rows, a candidate refers to no row, and refine would read past the end.
        some = cupy.clip(some, 0, len(index.ids) - 1)
        near, neighbours = cupy.empty((len(Q), k), cupy.float32), cupy.empty((len(Q), k), cupy.int64)
        refine(index.X, Q, some, k=k, metric="inner_product", indices=neighbours, distances=near, resources=self.resources)
        return near, neighbours

    def _sample(self, index: CuvsIndex, rows: Any, k: int) -> tuple[Any, Any]:
        """Return (positions in ``rows`` of a sample, the similarity of each one's true k-th nearest)."""
        import cupy
        from cuvs.neighbors import brute_force

        positions = np.linspace(0, len(rows) - 1, min(SAMPLE_QUERIES, len(rows))).astype(np.int64)
        core = brute_force.build(index.X, metric="inner_product", resources=self.resources)
        near, neighbours = cupy.empty((len(positions), k), cupy.float32), cupy.empty((len(positions), k), cupy.int64)
        sample = cupy.ascontiguousarray(rows[cupy.asarray(positions)])
        brute_force.search(core, sample, k, neighbors=neighbours, distances=near, resources=self.resources)
        self.resources.sync()
        return positions, near[:, -1:] - 1e-6

    def _descend(self, index: CuvsIndex, k: int) -> tuple[IntArray, FloatArray] | None:
        """Build the graph of the index rows among themselves by NN-descent; return None if no degree reaches the recall."""
        from cuvs.neighbors import nn_descent

        sample, kth_similarity = self._sample(index, index.X, k)
        least = np.asarray(kth_similarity.get())
        for degree in (d for d in DEGREES if d >= k):
            params = nn_descent.IndexParams(
                metric="inner_product",
                graph_degree=degree,
                intermediate_graph_degree=2 * degree,
                return_distances=True,
                dist_comp_dtype=sys.intern("fp32"),  # cuVS compares it by identity
            )
            built = nn_descent.build(params, index.X, resources=self.resources)
            self.resources.sync()
            graph, similarity = with_own(np.asarray(built.graph), np.asarray(built.distances), index.host, k)
            reached = float(np.mean(similarity[sample] >= least))
            self._log_recall(f"nn_descent of degree {degree}", len(graph), reached)
            if reached >= self.recall:
                return graph, similarity
        return None

    def _compress(self, index: CuvsIndex, Q: FloatArray, k: int) -> None:
        """Choose ivf_pq with the fewest lists that reach the recall on a sample of ``Q``, else brute force."""
        import cupy
        from cuvs.neighbors import brute_force, ivf_pq

        rows = _on_device(Q, index.X.dtype)
        sample, kth_similarity = self._sample(index, rows, k)
        lists = int(2 ** np.round(np.log2(4 * np.sqrt(len(index.ids)))))
        params = ivf_pq.IndexParams(n_lists=lists, metric="inner_product", pq_bits=8)
        core = ivf_pq.build(params, index.X, resources=self.resources)
        for probes in (p for p in PROBES if p <= lists):
            near, _ = self._probe(index, cupy.ascontiguousarray(rows[cupy.asarray(sample)]), k, core, probes)
            self.resources.sync()
            reached = float((near >= kth_similarity).mean())
            self._log_recall(f"ivf_pq, {probes} of {lists} lists", len(index.ids), reached)
            if reached >= self.recall:
                index.compressed = (core, probes)
                return
        index.core = brute_force.build(index.X, metric="inner_product", resources=self.resources)

    def _log_recall(self, what: str, rows: int, reached: float) -> None:
        log.info("graph.backend cuvs: %s on %d rows: recall %.4f (asked %.4f)", what, rows, reached, self.recall)


def with_own(graph: Array, distances: Array, X: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
    """Return each row itself and then its k - 1 nearest others: NN-descent leaves a row out of its own list.

    Args:
        graph: (m, degree) positions, nearest first, degree >= k.
        distances: (m, degree) inner products.
        X: (m, d) float32, the rows.
        k: columns wanted, at least 1.

    Returns:
        (m, k) int64 positions and (m, k) float32 similarities.
    """
    own = np.arange(len(graph))[:, None]
    others = np.argsort(graph[:, :k] == own, axis=1, kind="stable")[:, : k - 1]  # if a version lists the row itself, it goes last
    position = np.concatenate([own, np.take_along_axis(graph[:, :k], others, 1).astype(np.int64)], axis=1)
    length = np.einsum("nd,nd->n", X, X)[:, None]
    similarity = np.concatenate([length, np.take_along_axis(distances[:, :k], others, 1)], axis=1)
    return position, similarity.astype(np.float32)


def _on_device(rows: FloatArray, dtype: Any) -> Any:
    """Return a contiguous CuPy copy of ``rows`` (n, d), complete when this returns: cuVS may read it on another stream."""
    import cupy

    copied = cupy.asarray(np.ascontiguousarray(rows), dtype=dtype)
    cupy.cuda.get_current_stream().synchronize()
    return copied
