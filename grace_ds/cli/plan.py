"""``grace-ds plan``: what a refresh will ask of each rank, from the sizes of a job and before there is one."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from grace_ds.config.schema import GraceConfig
from grace_ds.graph.plan import GraphPlan, plan_graph
from grace_ds.pool import Pool, implied_repeats
from grace_ds.refresh import carries

TOKEN_RATE = 5e6  # tokens a second and core, both sweeps: measured 4.3 to 6.6 million (benchmarks greedy)
SCHEDULE_BYTES = 8 + 1 + 4  # id, role, weight of a slot
SELECT_BYTES = 16 + 6 * 4  # of a sample of the window on rank 0: what is drawn with, and its signals


@dataclass(frozen=True)
class Sizes:
    """A job.

    Attributes:
        samples: of the corpus.
        dim: width of the content vectors.
        ranks: data-parallel.
        batch: samples of an optimizer step over all ranks.
        interval: steps between two refreshes.
        budget: share of the window that a coreset holds.
        tokens: of a sample.
        steps: of the run; 0: not known.
        gflops: of a rank's products; 0: measured here.
        gbits: a second between two ranks.
    """

    samples: int
    dim: int
    ranks: int
    batch: int
    interval: int
    budget: float
    tokens: int
    steps: int
    gflops: float
    gbits: float


@dataclass(frozen=True)
class RefreshPlan:
    """One refresh, with the k-NN graph over the window; bytes and seconds of the busiest rank.

    Attributes:
        window: samples of a window.
        repeats: of a chosen sample over the run; None where its length is not known.
        features_bytes, table_bytes, select_bytes, schedule_bytes: held.
        feature_seconds, graph_seconds: expected.
        gflops: that the seconds are for.
        builds: whether the configuration builds a graph at all; the default does not.
        graph: of the window.
    """

    window: int
    repeats: float | None
    features_bytes: int
    table_bytes: int
    select_bytes: int
    schedule_bytes: int
    feature_seconds: float
    graph_seconds: float
    gflops: float
    builds: bool
    graph: GraphPlan

    @property
    def peak_bytes(self) -> int:
        """Of the busiest rank, at the widest point of a refresh."""
        widest = max(self.graph.host_bytes if self.builds else 0, self.select_bytes)
        return self.features_bytes + self.table_bytes + self.schedule_bytes + widest


def plan(sizes: Sizes, config: GraceConfig) -> RefreshPlan:
    """The figures for ``sizes`` under ``config``.

    Raises:
        ConfigError, DataError: sizes that no job can have.
    """
    pool = Pool(sizes.samples, config.window, sizes.budget, sizes.interval, sizes.batch, config.seed)
    own = -(-pool.size // sizes.ranks)
    graph = plan_graph(config.graph, pool.size, pool.size, sizes.dim, sizes.ranks, True)
    gflops = sizes.gflops or measured_gflops(sizes.dim)
    row = 2 * config.harvest.dim + 8 + 4 * 3 + 8 + 4  # grace_ds.records.Rows
    slots = (sizes.interval + max(1, sizes.interval // 4)) * sizes.batch
    return RefreshPlan(
        window=pool.size,
        repeats=implied_repeats(sizes.steps, sizes.batch, sizes.budget, sizes.samples) if sizes.steps else None,
        features_bytes=own * (4 * sizes.dim + 8 + 4 + 4),  # vectors, id, density, keep
        table_bytes=own * row if config.recipe == "grace" else 0,
        select_bytes=pool.size * SELECT_BYTES,
        schedule_bytes=2 * slots * SCHEDULE_BYTES,
        feature_seconds=own * sizes.tokens / TOKEN_RATE,
        graph_seconds=graph.seconds(gflops, sizes.gbits),
        gflops=gflops,
        builds=carries(config) or config.selection.objective == "facility_location",
        graph=graph,
    )


def measured_gflops(dim: int, seconds: float = 0.3) -> float:
    """Billions of operations a second of this machine's products, of the shape that the torch leaf makes them in."""
    import torch

    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((512, dim), np.float32))
    out, done, threads = torch.empty(512, 512), 0, torch.get_num_threads()
    torch.set_num_threads(1)  # several count their waiting for one another on a busy machine
    try:
        torch.mm(rows, rows.T, out=out)
        started = time.thread_time()
        while (spent := time.thread_time() - started) < seconds:
            torch.mm(rows, rows.T, out=out)
            done += 1
    finally:
        torch.set_num_threads(threads)
    return done * 2 * 512 * 512 * dim / spent / 1e9


def told(found: RefreshPlan, as_json: bool) -> str:
    """The plan as lines, or as JSON."""
    if as_json:
        return json.dumps({**asdict(found), "peak_bytes": found.peak_bytes}, indent=1) + "\n"
    g = found.graph
    how = f"{g.tier} ({g.why})" + (f", {g.clusters:,} clusters, overlap about {g.overlap}" if g.clusters else "")
    lines: list[tuple[str, Any]] = [
        ("window", f"{found.window:,} samples"),
        ("repeats of a chosen sample", "–" if found.repeats is None else f"{found.repeats:.2f} over the run"),
        ("graph", how if found.builds else f"not built by this configuration; if it were: {how}"),
        ("graph, operations a rank", f"{g.flop:.2e}"),
        ("graph, sent by a rank", _bytes(g.wire_bytes)),
        ("graph, seconds (CPU)", f"{found.graph_seconds:.1f} at {found.gflops:.0f} Gflop/s"),
        ("features, seconds", f"{found.feature_seconds:.1f}, once for each window"),
        ("memory of a rank: features", _bytes(found.features_bytes)),
        ("  harvested rows", _bytes(found.table_bytes)),
        ("  schedules, two", _bytes(found.schedule_bytes)),
        ("  graph, at its peak", _bytes(g.host_bytes)),
        ("  graph, on the GPU", _bytes(g.device_bytes) if g.device_bytes else "none: a CPU leaf"),
        ("  selection, on rank 0", _bytes(found.select_bytes)),
        ("  in all, at the peak", _bytes(found.peak_bytes)),
    ]
    width = max(len(name) for name, _ in lines)
    body = "\n".join(f"{name:<{width}}  {value}" for name, value in lines)
    if not found.builds:
        body += "\nTo build it: --set selection.objective=facility_location, or recipe=grace graph.residuals=true"
    return body + "\nExpected, not measured: bytes within about 15 %, seconds within a factor of two.\n"


def _bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError
