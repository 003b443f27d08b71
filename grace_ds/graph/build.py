"""The k-NN graph as a refresh asks for it: the tier is planned, measured, and built."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.config.schema import GraphConfig
from grace_ds.errors import DataError
from grace_ds.graph import leaves
from grace_ds.graph.clustered import nearest_clustered
from grace_ds.graph.placement import Placement, centroids_of, place
from grace_ds.graph.plan import GraphPlan, clusters_for, plan_graph
from grace_ds.graph.ring import nearest
from grace_ds.graph.rows import prepared
from grace_ds.records import FloatArray, IntArray, Neighbours

log = logging.getLogger(__name__)

PAIR_SHARE = 8  # clusters that leave more than an eighth of all pairs to be compared save too little


def knn(
    comm: Comm, q_ids: IntArray, Q: FloatArray, ids: IntArray, X: FloatArray, config: GraphConfig, exclude_self: bool = True
) -> Neighbours | None:
    """This rank's queries against the index rows of all ranks.  Collective.

    Args:
        q_ids: (n,) int64, dataset ids of the queries, this rank.
        Q: (n, d) float32, unit norm or zero, this rank.
        ids: (m,) int64, below 2**40, of the index rows, this rank; each on one rank only.
        X: (m, d) float32.  Where ``X is Q`` the rows are held and sent once.
        config: k, recall, leaf, tier, clusters, overlap, executor.
        exclude_self: whether a query's own id is no neighbour of it.

    Returns:
        (n, k) ids and cosines, nearest first, ties by the lower id; None where no rank has an index row.

    Raises:
        ConfigError: the leaf is unknown, or it or the executor is not installed.
        ExecutorError: the Dask executor could not finish; this rank must call ``comm.abort()``.
        DataError: rows are malformed.
    """
    alike, over = Q is X and q_ids is ids, _executor(config.executor)
    joined = None if over else comm  # another executor joins the leaves of its own workers
    if Q.ndim == 2 and X.ndim == 2 and Q.shape[1] != X.shape[1]:
        raise DataError(f"queries are {Q.shape[1]} wide, index rows {X.shape[1]}: use one feature space")
    X = prepared(ids, X)
    Q = X if alike else prepared(q_ids, Q)
    n_queries, n_index = (int(n) for n in comm.allreduce(np.array([len(q_ids), len(ids)], np.int64)))
    largest = int(comm.allreduce(np.array([len(ids)], np.int64), "max")[0])
    if n_index == 0:
        return None
    plan = plan_graph(config, n_queries, n_index, X.shape[1], comm.size, alike)
    if plan.tier == "clustered":
        centroids = centroids_of(comm, ids, X, clusters_for(config, n_index))
        placement = place(comm, q_ids, Q, ids, X, config.k, centroids, config.recall, config.overlap, exclude_self)
        if _worth(plan, placement, config, n_queries * n_index):
            leaf, many = leaves.exact(config.leaf), over.clustered_keys if over else None
            with leaves.opened(joined, leaf):
                return nearest_clustered(comm, q_ids, Q, ids, X, config.k, leaf, placement, exclude_self, many)
    else:
        log.info("graph: exact tier (%s)", plan.why)
    leaf = leaves.choose(config.leaf, largest, config.recall)
    with leaves.opened(joined, leaf):
        return nearest(comm, q_ids, Q, ids, X, config.k, leaf, exclude_self, over.exact_keys if over else None)


def _executor(name: str) -> Any:
    """The module of another executor than the ring; Dask is imported where it is asked for."""
    if name == "ring":
        return None
    from grace_ds.graph import dask_executor

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
