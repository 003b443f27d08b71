"""The k-NN graph as a refresh asks for it: the tier is planned, measured, and built."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.config.schema import GraphConfig
from grace_ds.graph import backends as backends
from grace_ds.graph import clustered, ring
from grace_ds.graph.merge import finished
from grace_ds.graph.placement import Placement, centroids_of, place
from grace_ds.graph.plan import GraphPlan, clusters_for, plan_graph
from grace_ds.graph.rows import Request
from grace_ds.records import FloatArray, IntArray, Neighbours

log = logging.getLogger(__name__)

PAIR_SHARE = 8  # clusters that leave more than an eighth of all pairs to be compared save too little


@dataclass(frozen=True)
class Found:
    """The nearest rows of this rank's queries, and how they were searched for.

    Attributes:
        keys: (n, wanted) int64 of :mod:`grace_ds.graph.merge`, a query's own among them where it was not excluded.
        placement, centroids: of the clustered tier; None in the exact one.
        exact: whether every pair was compared, so that the same rows always have the same neighbours.
    """

    keys: IntArray
    placement: Placement | None
    centroids: FloatArray | None
    exact: bool


def knn(
    comm: Comm, q_ids: IntArray, Q: FloatArray, ids: IntArray, X: FloatArray, config: GraphConfig, exclude_self: bool = True
) -> Neighbours | None:
    """This rank's queries against the index rows of all ranks.  Collective.

    Args:
        q_ids: (n,) int64, dataset ids of the queries, this rank.
        Q: (n, d) float32, unit norm or zero, this rank.
        ids: (m,) int64, below 2**40, of the index rows, this rank; each on one rank only.
        X: (m, d) float32.  Where ``X is Q`` the rows are held and sent once.
        config: k, recall, backend, tier, clusters, overlap, executor.
        exclude_self: whether a query's own id is no neighbour of it.

    Returns:
        (n, k) ids and cosines, nearest first, ties by the lower id; None where no rank has an index row.

    Raises:
        ConfigError: the backend is unknown, or it or the executor is not installed.
        ExecutorError: the Dask executor could not finish; this rank must call ``comm.abort()``.
        DataError: rows are malformed.
    """
    index = None if Q is X and q_ids is ids else (ids, X)
    asked = Request.of(q_ids, Q, config.k, index, exclude_self)
    found = search_all(comm, asked, config)
    return None if found is None else finished(found.keys, asked.q_ids, asked.k, asked.exclude_self)


def search_all(comm: Comm, asked: Request, config: GraphConfig, spare: int = 0, device: str = "cpu") -> Found | None:
    """The nearest rows of this rank's queries, ``spare`` more than asked for.  Collective; errors as :func:`knn`.

    Args:
        device: of the job's model; ``graph.backend: auto`` is cuVS where it is a GPU and every rank can use it.

    Returns:
        None where no rank has an index row.
    """
    sizes = comm.allgather(np.array([len(asked.q_ids), len(asked.ids)], np.int64))
    n_queries, n_index = (int(n) for n in np.sum(sizes, axis=0))
    if n_index == 0:
        return None
    over = _executor(config.executor)
    joined = None if over else comm  # another executor joins the backends of its own workers
    name = backends.agreed(comm, config.backend, device)
    plan = plan_graph(config, n_queries, n_index, asked.X.shape[1], comm.size, asked.alike)
    wide = asked.with_spare(spare)
    if plan.tier == "clustered":
        centroids = centroids_of(comm, asked.ids, asked.X, clusters_for(config, n_index))
        placement = place(comm, asked, centroids, config.recall, config.overlap)
        if _worth(plan, placement, config, n_queries * n_index):
            backend = backends.exact(name)
            with backends.opened(joined, backend):
                keys = (over.clustered_keys if over else clustered.nearest_keys)(comm, wide, backend, placement)
            return Found(keys, placement, centroids, exact=False)
    else:
        log.info("graph: exact tier (%s)", plan.why)
    largest = max(int(size[1]) for size in sizes)
    backend = backends.choose(name, largest, config.recall)
    with backends.opened(joined, backend):
        keys = ring.nearest_keys(comm, wide, backend, over.exact_keys if over else None)
    return Found(keys, None, None, backend.is_exact(largest))


def _executor(name: str) -> Any:
    """The module of another executor than the ring; Dask is imported where it is asked for."""
    if name == "ring":
        return None
    from grace_ds.graph.dask import executor as dask_executor

    return dask_executor


def _worth(plan: GraphPlan, found: Placement, config: GraphConfig, all_pairs: int) -> bool:
    """Whether the clusters reach the recall at a fair price; logged.  An asked-for tier is built all the same."""
    share = found.pairs / all_pairs
    figures = f"{found.clusters} clusters, overlap {found.overlap}: recall {found.recall:.4f}, {share:.1%} of all pairs"
    good = found.recall >= config.recall and found.pairs * PAIR_SHARE <= all_pairs
    if good:
        log.info("graph: clustered tier (%s), %s", plan.why, figures)
    elif config.tier == "clustered":
        log.warning("graph.tier clustered as asked, though %s (asked %.4f); auto would search exactly", figures, config.recall)
        return True
    else:
        log.info("graph: exact tier, as the rows hardly cluster (%s; asked %.4f)", figures, config.recall)
    return good
