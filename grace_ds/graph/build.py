"""Build the k-NN graph for a refresh: plan the tier, measure the clusters, search."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.config.schema import GraphConfig
from grace_ds.graph import backends, clustered, ring
from grace_ds.graph.merge import finished
from grace_ds.graph.placement import Placement, centroids_of, place
from grace_ds.graph.plan import GraphPlan, clusters_for, plan_graph
from grace_ds.graph.rows import Request
from grace_ds.records import FloatArray, IntArray, Neighbours

log = logging.getLogger(__name__)

PAIR_SHARE = 8  # clusters that still compare more than an eighth of all pairs save too little


@dataclass(frozen=True)
class Found:
    """The nearest rows of this rank's queries, and how they were found.

    Attributes:
        keys: (n, wanted) int64 of :mod:`grace_ds.graph.merge`; they include a query's own key if it was not excluded.
        placement, centroids: of the clustered tier; None in the exact one.
        exact: whether every pair was compared, so that equal rows always give equal neighbours.
    """

    keys: IntArray
    placement: Placement | None
    centroids: FloatArray | None
    exact: bool


def knn(
    comm: Comm, q_ids: IntArray, Q: FloatArray, ids: IntArray, X: FloatArray, config: GraphConfig, exclude_self: bool = True
) -> Neighbours | None:
    """Search this rank's queries among the index rows of all ranks.  Collective.

    Args:
        q_ids: (n,) int64, dataset ids of the queries, this rank.
        Q: (n, d) float32, unit norm or zero, this rank.
        ids: (m,) int64, below 2**40, of the index rows, this rank; each on one rank only.
        X: (m, d) float32.  If ``X is Q``, the rows are held and sent once.
        config: k, recall, backend, tier, clusters, overlap, executor.
        exclude_self: whether to leave a query's own id out of its neighbours.

    Returns:
        (n, k) ids and cosines, nearest first, ties by the lower id; None if no rank has an index row.

    Raises:
        ConfigError: the back end is unknown, or the back end or the executor is not installed.
        ExecutorError: the Dask executor could not finish; this rank must call ``comm.abort()``.
        DataError: rows are malformed.
    """
    index = None if Q is X and q_ids is ids else (ids, X)
    request = Request.of(q_ids, Q, config.k, index, exclude_self)
    found = search_all(comm, request, config)
    return None if found is None else finished(found.keys, request.q_ids, request.k, request.exclude_self)


def search_all(comm: Comm, request: Request, config: GraphConfig, spare: int = 0, device: str = "cpu") -> Found | None:
    """Search for the nearest rows of this rank's queries, ``spare`` more than requested.  Collective; errors as :func:`knn`.

    Args:
        comm: of all ranks.
        request: of this rank.
        config: ``graph`` of the configuration.
        spare: number of additional neighbours.
        device: of the job's model; ``graph.backend: auto`` takes cuVS if this is a GPU that every rank can use.

    Returns:
        None if no rank has an index row.
    """
    sizes = comm.allgather(np.array([len(request.q_ids), len(request.ids)], np.int64))
    n_queries, n_index = (int(n) for n in np.sum(sizes, axis=0))
    if n_index == 0:
        return None
    executor = _executor(config.executor)
    joined = None if executor else comm  # another executor connects the back ends of its own workers itself
    name = backends.agreed(comm, config.backend, device)
    plan = plan_graph(config, n_queries, n_index, request.X.shape[1], comm.size, request.alike)
    wide = request.with_spare(spare)
    if plan.tier == "clustered":
        centroids = centroids_of(comm, request.ids, request.X, clusters_for(config, n_index))
        placement = place(comm, request, centroids, config.recall, config.overlap)
        if _worth(plan, placement, config, n_queries * n_index):
            backend = backends.exact(name)
            with backends.opened(joined, backend):
                keys = (executor.clustered_keys if executor else clustered.nearest_keys)(comm, wide, backend, placement)
            return Found(keys, placement, centroids, exact=False)
    else:
        log.info("graph: exact tier (%s)", plan.why)
    largest = max(int(size[1]) for size in sizes)
    backend = backends.choose(name, largest, config.recall)
    with backends.opened(joined, backend):
        keys = ring.nearest_keys(comm, wide, backend, executor.exact_keys if executor else None)
    return Found(keys, None, None, backend.is_exact(largest))


def _executor(name: str) -> Any:
    """Return the module of an executor other than the ring, else None; Dask is imported only if requested."""
    if name == "ring":
        return None
    from grace_ds.graph.dask import executor as dask_executor

    return dask_executor


def _worth(plan: GraphPlan, found: Placement, config: GraphConfig, all_pairs: int) -> bool:
    """Return whether the clusters reach the recall at a fair price; log the decision.

    A tier that the configuration requests is built in any case.
    """
    share = found.pairs / all_pairs
    figures = f"{found.clusters} clusters, overlap {found.overlap}: recall {found.recall:.4f}, {share:.1%} of all pairs"
    worth = found.recall >= config.recall and found.pairs * PAIR_SHARE <= all_pairs
    if worth:
        log.info("graph: clustered tier (%s), %s", plan.why, figures)
    elif config.tier == "clustered":
        log.warning("graph.tier clustered as asked, though %s (asked %.4f); auto would search exactly", figures, config.recall)
        return True
    else:
        log.info("graph: exact tier, as the rows hardly cluster (%s; asked %.4f)", figures, config.recall)
    return worth
