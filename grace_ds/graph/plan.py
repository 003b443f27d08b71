"""Plan how to build a k-NN graph and estimate its cost, from sizes alone, before any row is sent.

Tier ``exact``: index shards rotate over the ranks.  Tier ``clustered``: rows go to their nearest clusters and are compared
within them.  Figures are for one rank, assuming equal shares.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from grace_ds.config.schema import GraphConfig
from grace_ds.graph.backends.cuvs_backend import QUERY_BLOCK
from grace_ds.graph.clustered import wave_bytes
from grace_ds.graph.clusters import ROUNDS, SAMPLE_ROWS
from grace_ds.graph.placement import MOST, SAMPLE_QUERIES

log = logging.getLogger(__name__)

CLUSTERED_ROWS = 30_000  # from this size on, rows that cluster well are compared faster within their clusters
EXPECTED_OVERLAP = 3  # for the estimates; the build measures the overlap that it needs
IMBALANCE = 1.5  # of the sum over clusters of m^2; measured 1.3 to 1.6 on the rows of the graph benchmark
PAIR_SECONDS, VISIT_SECONDS = 2.5e-9, 8e-6  # one thread of a 2020s x86 core, k = 15, 128 columns: within a factor of two
LARGEST = 4.0  # size of the largest cluster relative to the mean: measured 3 to 4
FIXED_BYTES = 4 << 20  # scratch blocks of the backend, of exact similarities and of the assignment


@dataclass(frozen=True)
class GraphPlan:
    """How one graph is built, and its expected cost on each rank.

    Attributes:
        tier: exact | clustered.
        why: the reason, in words.
        clusters: number of clusters of the clustered tier; 0 otherwise.
        overlap: clusters that a row is expected to go to; 0 in the exact tier.
        flop: multiplications and additions of the similarities.
        pairs: similarities that are sorted.
        visits: queries times the number of shards or clusters that each is compared in.
        wire_bytes: bytes sent.
        host_bytes: bytes held at the peak, beyond the rows themselves and including the result.
        device_bytes: on the GPU with ``backend: cuvs``: rows and outputs of one block of queries; 0 otherwise.  Not measured.
    """

    tier: str
    why: str
    clusters: int
    overlap: int
    flop: float
    pairs: float
    visits: float
    wire_bytes: int
    host_bytes: int
    device_bytes: int

    def seconds(self, gflops: float, gbits: float) -> float:
        """Return the expected seconds on a CPU rank: products, sorting, exact similarities and transfers.

        Args:
            gflops: speed of the products.
            gbits: speed of the wire.
        """
        return (
            self.flop / gflops / 1e9 + self.pairs * PAIR_SECONDS + self.visits * VISIT_SECONDS + 8 * self.wire_bytes / gbits / 1e9
        )


def plan_graph(config: GraphConfig, n_queries: int, n_index: int, dim: int, ranks: int, alike: bool) -> GraphPlan:
    """Plan the search of ``n_queries`` rows among ``n_index`` rows, both over all ranks.

    Args:
        config: ``graph`` of the configuration.
        dim: width of the rows, float32.
        alike: the queries are the index rows.
    """
    tier, why = config.tier, "asked for"
    if tier == "auto":
        small = n_index < CLUSTERED_ROWS
        tier = "exact" if small or config.recall >= 1 else "clustered"
        why = f"{n_index} index rows, {'fewer than' if small else 'at least'} {CLUSTERED_ROWS}"
        if not small and config.recall >= 1:
            why = "graph.recall is 1"
    plan_tier = _clustered if tier == "clustered" else _exact
    return plan_tier(config, n_queries, n_index, dim, ranks, alike, why)


def clusters_for(config: GraphConfig, n_index: int) -> int:
    """Return the number of clusters: the square root of the rows, so that assigning and comparing cost about the same."""
    return config.clusters or max(1, math.isqrt(n_index))


def _exact(config: GraphConfig, n_q: int, n_x: int, d: int, ranks: int, alike: bool, why: str) -> GraphPlan:
    q, x, row = n_q / ranks, n_x / ranks, 4 * d + 16
    keys = 8 * (config.k + 1)
    held = (2 * x * row if ranks > 1 else 0) + q * (3 * keys + 12 * config.k) + q * 8 * (config.k + 9)
    backend = int(4 * d * x) + (16 << 20)  # faiss keeps a copy of the rows
    wire = int((ranks - 1) * x * row)
    device = _device(config, x, d)
    return GraphPlan("exact", why, 0, 0, 2.0 * q * n_x * d, q * n_x, q * ranks, wire, int(held) + backend + FIXED_BYTES, device)


def _device(config: GraphConfig, rows: float, d: int) -> int:
    return int(4 * d * rows + min(rows, QUERY_BLOCK) * (4 * d + 12 * (config.k + 9))) if config.backend == "cuvs" else 0


def _clustered(config: GraphConfig, n_q: int, n_x: int, d: int, ranks: int, alike: bool, why: str) -> GraphPlan:
    c = clusters_for(config, n_x)
    o = min(config.overlap or EXPECTED_OVERLAP, c)
    q, x, travelling = n_q / ranks, n_x / ranks, (n_x if alike else n_x + n_q) / ranks
    sample = min(SAMPLE_ROWS * c, n_x)
    pairs = IMBALANCE * o * o * n_q * n_x / c
    # similarities; assignment, k-means (on root, the slowest rank) and the exact search of the sample count in full
    flop = 2.0 * d * (pairs / ranks + travelling * c + sample * c * ROUNDS + min(SAMPLE_QUERIES, n_q) * x)
    wire = (ranks - 1) / ranks * o * (travelling * (4 * d + 8) + q * 8 * (config.k + 1))
    wire += (ranks - 1) * sample * (4 * d + 8) / ranks
    held = travelling * (4 * MOST + 16 * o + 16)  # the clusters of each row, and its order
    fitting = sample * 16 * d  # the sample as it is sent, gathered, sorted and converted
    keys, result = 8.8 * (config.k + 1) * q, 12 * config.k * q
    peak = fitting + held + keys + max(3 * wave_bytes(n_x, d, ranks), result)
    return GraphPlan(
        "clustered",
        why,
        c,
        o,
        flop,
        pairs / ranks,
        o * q,
        int(wire),
        int(peak) + FIXED_BYTES,
        _device(config, LARGEST * o * n_x / c, d),
    )
