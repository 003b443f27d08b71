"""Measure the planner's rates for ``grace-ds plan --calibrate``, in some seconds, with the code that a job runs.

If a launcher (``torchrun``, ``mpirun``) starts it, every rank takes part, and the transport between them is measured too.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grace_ds.cli.plan_rates import MEASURED, Rates
from grace_ds.comm.base import Comm
from grace_ds.comm.choose import choose
from grace_ds.config.schema import GraceConfig
from grace_ds.data.sampler import Geometry
from grace_ds.data.schedule import VisitCounts
from grace_ds.errors import ConfigError
from grace_ds.features.content import ContentFeatures
from grace_ds.gradients.basis import TRUSTED_RANK
from grace_ds.gradients.projection import Side, bases
from grace_ds.graph.build import knn
from grace_ds.graph.plan import plan_graph
from grace_ds.integrations.setup import prepare, refresh_context
from grace_ds.integrations.trusted_set import UserInputs
from grace_ds.recipes import recipe
from grace_ds.records import HIDDEN, Array, IntArray, Losses, SampleRecords
from grace_ds.refresh.line import refresh
from grace_ds.refresh.signals import RefreshInputs
from grace_ds.refresh.table import Table
from grace_ds.utils.grid import on_grid
from grace_ds.utils.heap import trim_heap

FEW, TOKENS, MOST = 64, 600_000, 8_000  # rows of the small refresh; total tokens and maximum rows of the large one
ANCHORS = 3_000  # rows per rank of the small graph
WORDS = 1 << 20  # int64 numbers of the all-reduce


def world() -> tuple[Comm, bool]:
    """Return the transport between the ranks that this process was started with, and whether this rank prints the result.

    Raises:
        ConfigError: there are several ranks, and torch cannot connect them.
    """
    import torch.distributed as dist

    size = int(os.environ.get("WORLD_SIZE") or os.environ.get("OMPI_COMM_WORLD_SIZE") or 1)
    if size > 1 and not dist.is_initialized():
        if "RANK" not in os.environ and "OMPI_COMM_WORLD_RANK" in os.environ:
            os.environ |= {"RANK": os.environ["OMPI_COMM_WORLD_RANK"], "WORLD_SIZE": str(size)}
        try:
            dist.init_process_group("gloo")
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"{size} ranks cannot be brought together for --calibrate ({error}); start it by torchrun"
            ) from error
    comm = choose("auto", timeout=60.0)
    return comm, comm.rank == 0


def calibrate(config: GraceConfig, dim: int, tokens: int, hidden: int, comm: Comm) -> Rates:
    """Measure the rates; equal on all ranks, each is the slowest rank's.  Collective; takes about ten seconds.

    Args:
        config: of the job.
        dim: ``features.dim``.
        tokens: of a sample.
        hidden: width of the model's layers; 0: unknown.
        comm: between the ranks.
    """
    config = copy.deepcopy(config)
    config.features.dim, config.run_dir, config.features.cache_dir, config.features.precomputed = dim, None, None, None
    config.features.threads = 1  # the rates are of one core
    config.trusted, config.replay = None, None
    bare = copy.deepcopy(config)
    bare.ablate = sorted({*bare.ablate, "graph"} & recipe(bare.recipe).uses)
    if bare.covers:
        bare.selection.objective = "sample"
    many = max(8 * FEW, min(MOST, TOKENS // tokens))
    # Measure memory first: the first refresh still has to load libraries and tables.
    first = _measured(comm, config, FEW * comm.size, tokens)
    few = min((_measured(comm, bare, FEW * comm.size, tokens) for _ in range(2)), key=lambda taken: taken.seconds)
    large = _measured(comm, bare, many * comm.size, tokens)
    values = {
        "fixed_bytes": first.peak or Rates.fixed_bytes,
        "resting_bytes": first.stays if first.peak else Rates.resting_bytes,
        "fixed_feature_seconds": few.feature_seconds,
        "fixed_seconds": few.seconds - few.feature_seconds,
        "token_seconds": max(large.feature_cpu - few.feature_cpu, 0.0) / (tokens * (many - FEW)),
        "sample_seconds": max(large.cpu - large.feature_cpu - few.cpu + few.feature_cpu, 0.0) / (comm.size * (many - FEW)),
        "busy": max(1.0, large.seconds / max(large.cpu, 1e-6)),
        "gflops": -products(dim),
        "narrow_gflops": -narrow(hidden, config.collect.rank) if hidden else 0.0,
        "gbits": -1e-9 * link(comm) if comm.size > 1 else -Rates.gbits,
        "message_seconds": latency(comm) if comm.size > 1 else Rates.message_seconds,
    }  # speeds are negative, so that of each the largest is the worst
    slowest = comm.allreduce(np.array(list(values.values()), np.float64), "max")
    agreed = {name: abs(float(value)) for name, value in zip(values, slowest, strict=True)}
    measured = [
        name
        for name in agreed
        if not (name in ("gbits", "message_seconds") and comm.size == 1) and not (name.endswith("bytes") and not first.peak)
    ]
    rates = Rates().having(MEASURED, **{name: agreed[name] for name in measured}, measured_ranks=comm.size)
    return rates.having(MEASURED, graph=graph_factor(comm, config, dim, rates))


def products(dim: int, seconds: float = 0.3) -> float:
    """Return the speed of this machine's products in the shapes of the graph, 10⁹ operations per second; one thread."""
    import torch

    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((512, dim), np.float32))
    out = torch.empty(512, 512)
    return 2e-9 * 512 * 512 * dim / _each(lambda: torch.mm(rows, rows.T, out=out), seconds)


def narrow(hidden: int, rank: int, seconds: float = 0.3) -> float:
    """Return the speed of the collection's projections of a layer ``hidden`` wide, 10⁹ operations per second."""
    import torch

    side = Side(np.concatenate([bases("calibration", 0, rank, hidden, hidden)[0]] * (1 + -(-TRUSTED_RANK // rank))))
    x = torch.randn(2048, hidden)
    width = side.project(x).shape[0]
    return 2e-9 * width * x.numel() / _each(lambda: side.project(x), seconds)


def link(comm: Comm) -> float:
    """Return the bits per second that a rank sends in an all-reduce of 8 MB."""
    x = np.ones(WORDS, np.int64)
    comm.allreduce(x)
    started = time.perf_counter()
    for _ in range(3):
        comm.allreduce(x)
    return 8 * 2 * (comm.size - 1) / comm.size * x.nbytes * 3 / (time.perf_counter() - started)


def latency(comm: Comm, times: int = 100) -> float:
    """Return the seconds of a small message to another rank, many of which are under way at once."""
    comm.agree()
    started = time.perf_counter()
    for _ in range(times):
        comm.agree()
    return (time.perf_counter() - started) / times / (comm.size - 1)


def graph_factor(comm: Comm, config: GraceConfig, dim: int, rates: Rates) -> float:
    """Return the CPU seconds of a real small graph relative to the estimate for it; the slowest rank's."""
    rng = np.random.default_rng(comm.rank)
    x = rng.standard_normal((ANCHORS, dim), np.float32)
    x = on_grid(x / np.linalg.norm(x, axis=1, keepdims=True))
    ids = np.arange(ANCHORS, dtype=np.int64) * comm.size + comm.rank
    total = ANCHORS * comm.size
    counted = plan_graph(config.graph, total, total, dim, comm.size, True).seconds(rates.gflops, rates.gbits or 10.0)
    knn(comm, ids[:FEW], x[:FEW], ids[:FEW], x[:FEW], config.graph)
    started = time.process_time()
    knn(comm, ids, x, ids, x, config.graph)
    taken = np.array([time.process_time() - started])
    return float(comm.allreduce(taken, "max")[0]) / counted


@dataclass
class _Taken:
    """Cost of a refresh on this rank: seconds, CPU seconds, those of the features, bytes at the peak, bytes that stay."""

    seconds: float = 0.0
    cpu: float = 0.0
    feature_seconds: float = 0.0
    feature_cpu: float = 0.0
    peak: float = 0.0
    stays: float = 0.0


def _measured(comm: Comm, config: GraceConfig, n: int, tokens: int) -> _Taken:
    """Measure a refresh of ``n`` samples of all ranks; bytes are 0 if the system does not report them."""
    data, trusted = _Tokens(n, tokens), _Tokens(96, tokens, 1)
    before, cost = _resident(), _Taken()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # a new high-water mark
    config = copy.deepcopy(config)
    config.window, config.refresh.interval_steps = n, 1
    geometry = Geometry(comm.size, comm.rank, max(1, n // 20 // comm.size), 1)
    parts = prepare(data, config, geometry, UserInputs(trusted_data=trusted))
    context = refresh_context(comm, config, geometry, parts)
    read = context.contents

    def contents(kept: ContentFeatures | None, ids: IntArray) -> ContentFeatures:
        started, cpu = time.perf_counter(), time.process_time()
        features = read(kept, ids)
        cost.feature_seconds, cost.feature_cpu = time.perf_counter() - started, time.process_time() - cpu
        return features

    rows = _collected(n, comm, config.collect.dim) if config.collects else SampleRecords.empty(config.collect.dim)
    nothing = Table(SampleRecords.empty(config.collect.dim)), Table(Losses.empty())
    inputs = RefreshInputs(rows, rows.losses, *nothing, VisitCounts(), 40, 1, 0, 1, {0: 0.4})
    comm.agree()
    started, cpu = time.perf_counter(), time.process_time()
    refresh(dataclasses.replace(context, contents=contents), inputs)
    cost.seconds, cost.cpu = time.perf_counter() - started, time.process_time() - cpu
    cost.peak = max(0.0, _status("VmHWM") - before)
    cost.stays = max(0.0, _resident() - before)
    return cost


def _collected(n: int, comm: Comm, dim: int) -> SampleRecords:
    """Return rows as if each rank had collected its share of the samples."""
    rng = np.random.default_rng(comm.rank)
    ids = np.arange(comm.rank, n, comm.size, dtype=np.int64)
    sketch = rng.standard_normal((len(ids), dim), np.float32).astype(np.float16)
    draw = rng.standard_normal((3, len(ids))).astype(np.float32)
    steps, basis = np.full(len(ids), 39, np.int64), np.zeros(len(ids), np.int32)
    hidden = rng.standard_normal((len(ids), HIDDEN), np.float32).astype(np.float16)
    influence = 0.4 + 0.2 * draw[2]
    return SampleRecords(ids, steps, sketch, np.abs(draw[0]), draw[1], influence, basis, hidden)


class _Tokens:
    """Rows of tokens with the frequencies of text: the r-th most frequent token in proportion to 1 / r."""

    def __init__(self, n: int, tokens: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.rows = np.exp(rng.random((n, tokens)) * np.log(30_000)).astype(np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Array]:
        return {"input_ids": self.rows[i]}


def _each(work: Callable[[], Any], seconds: float) -> float:
    """Return the CPU seconds of one call, on one thread, after a first call that is not counted."""
    import torch

    threads, done = torch.get_num_threads(), 0
    torch.set_num_threads(1)  # several threads would count the time they wait for one another on a busy machine
    try:
        work()
        started = time.thread_time()
        while (spent := time.thread_time() - started) < seconds:
            work()
            done += 1
    finally:
        torch.set_num_threads(threads)
    return spent / done


def _resident() -> float:
    gc.collect()
    trim_heap()
    return _status("VmRSS")


def _status(key: str) -> float:
    """Return a figure of /proc/self/status in bytes; 0 if there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(key + ":"))) * 1024
    except (OSError, StopIteration):
        return 0.0
