"""What grows with the window and what does not: memory on root, the exactness of the sharded draw, a refresh of 1e7 samples.

Every rank is a process of its own, with gloo between them. `root_memory`: two ranks; rank 0 owns the same few samples whatever
the size of the window, rank 1 all others, as in a job whose ranks grow with its window. Content is given, so what grows on
rank 0 is what it holds of the samples of others. The figure is the peak of the memory that Python and NumPy hold during a whole
refresh, less the schedule, which has one length. `threshold`: the draw of 1 to 4 ranks against a sort of all keys on one.
`facility`: the objective that the sharded greedy reaches on 1 to 4 ranks against greedy on one rank, on the quickstart's crawl
pool. `large`: two ranks that own half each, content given (statistics, quality, density and vectors), 5 % of the window newly
collected: one refresh, and one more, as the default recipe does them without its k-NN graph; with `--graph`, at another size,
with it.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from grace_ds_quickstart.corpus import CorpusSpec, prepare
from rich.console import Console

from benchmarks.graph_rows import clustered_rows
from benchmarks.greedy import NEIGHBOURS, pool_neighbours
from benchmarks.record import Claim, Record
from benchmarks.refresh import status_mib
from grace_ds.comm.base import Comm
from grace_ds.comm.buckets import owner_of
from grace_ds.comm.choose import choose
from grace_ds.config.schema import GraceConfig
from grace_ds.data.order import SamplerOrder
from grace_ds.data.pool import Placed
from grace_ds.data.schedule import ScheduleBook, VisitCounts
from grace_ds.features.content import ContentFeatures
from grace_ds.features.quality import STATISTICS
from grace_ds.records import HIDDEN, Array, Coreset, IntArray, Losses, Neighbours, SampleRecords, Schedule
from grace_ds.refresh.line import refresh
from grace_ds.refresh.signals import RefreshContext, RefreshInputs
from grace_ds.refresh.table import Table
from grace_ds.selection.facility_location import coverage, lazy_greedy, objective
from grace_ds.selection.gumbel import gumbel
from grace_ds.selection.objectives import select

SIZES = (100_000, 1_000_000, 10_000_000)
OWN = 20_000  # samples that rank 0 owns where its memory is measured
INTERVAL, BATCH = 625, 32  # 25,000 slots
LARGE, WIDTH, SKETCH = 10_000_000, 64, 64
SEEDS, DRAWN = 20, 50_000  # of the draws that are compared, and their samples
POOL, GRAPHS = 20_000, 4  # rows of the quickstart's pool, and most ranks
LIMIT = 7200.0  # seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), metavar="N", help="samples of a window")
    parser.add_argument("--large", type=int, default=LARGE, metavar="N", help="samples of the refresh on two ranks; 0: none")
    parser.add_argument("--graph", type=int, default=0, metavar="N", help="samples of the same with the k-NN graph; 0: none")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help="draws that are compared")
    parser.add_argument("--pool", type=int, default=POOL, metavar="N", help="rows of facility location; 0: none")
    parser.add_argument("--data", type=Path, default=Path("runs/benchmarks/refresh-data"), help="where the pool is kept")


def run(args: argparse.Namespace, console: Console) -> Record:
    record = Record("scale")
    memory = [_on_ranks(2, root_memory, n)[0] for n in args.sizes]
    for row in memory:
        console.print(
            f"  root, window of {row['n']:>10,}: {row['beyond MiB']:.1f} MiB beyond a schedule of {row['schedule MiB']:.1f} MiB"
        )
    record.rows["root memory"] = memory
    if len(memory) > 1:
        logs = [np.log([row[key] for row in memory]) for key in ("n", "beyond MiB")]
        unit = f"d log(root's peak beyond the schedule) / d log(window), {min(args.sizes):,} to {max(args.sizes):,} samples"
        record.claims.append(Claim("root_memory_exponent", float(np.polyfit(logs[0], logs[1], 1)[0]), unit, 0.1))
    drawn = [row for ranks in range(1, 5) for row in _on_ranks(ranks, threshold, args.seeds)[0]]
    record.rows["threshold"] = drawn
    unit = f"share of {len(drawn)} draws (1 to 4 ranks, {args.seeds} seeds) with the ids and weights of a sort on one"
    record.claims.append(Claim("threshold_exact", float(np.mean([row["exact"] for row in drawn])), unit, 1.0, True))
    if args.pool:
        prepare(CorpusSpec(pool_size=args.pool), args.data)
        neighbours, weights = pool_neighbours(args.data, args.pool)
        graph = coverage(np.arange(args.pool), neighbours)
        everyone = np.ones(args.pool, np.bool_)
        best = objective(graph, weights, lazy_greedy(graph, weights, args.pool // 5, everyone, np.empty(0, np.int64)))
        rows = []
        for ranks in range(1, GRAPHS + 1):
            began = time.perf_counter()
            parts = _on_ranks(ranks, facility, neighbours, weights)
            chosen = np.sort(np.concatenate(parts))
            took = time.perf_counter() - began
            rows.append(
                {"ranks": ranks, "chosen": len(chosen), "F / one rank's": objective(graph, weights, chosen) / best, "s": took}
            )
        record.rows["facility location"] = rows
        unit = f"objective / greedy's on one rank, worst of 1 to {GRAPHS} ranks, {args.pool:,} rows, {NEIGHBOURS} neighbours"
        record.claims.append(Claim("sharded_facility_ratio", min(row["F / one rank's"] for row in rows), unit, 0.99, True))
    record.rows["refresh"] = []
    for n, graph_too in ((args.large, False), (args.graph, True)):
        if n:
            both = _on_ranks(2, large, n, graph_too)
            record.rows["refresh"] += both
            what = f"{n:,} samples x {WIDTH}, 2 ranks, content given, {'with the' if graph_too else 'no k-NN'} graph"
            name = "with_graph" if graph_too else "without_graph"
            minutes, peak = max(row["total"] for row in both) / 60, max(row["peak GB"] for row in both)
            goals = (20.0, 8.0) if graph_too and n == LARGE else (None, None)  # they are meant for a whole refresh
            record.claims.append(Claim(f"refresh_minutes_{name}", minutes, f"min, {what}", goals[0]))
            record.claims.append(Claim(f"refresh_gb_{name}", peak, f"GB a rank, {what}", goals[1]))
    record.notes.append(
        "memory on root by tracemalloc; of the large refresh by the high-water mark of the whole process, inputs included"
    )
    return record


def root_memory(comm: Comm, n: int) -> dict[str, Any]:
    """Peak memory of this rank in a refresh of a window of n samples, of which rank 0 owns :data:`OWN`."""
    windows = OwnedWindows(n, OWN)
    config = _config("content")
    context = _context(comm, config, windows, np.empty((0, 1), np.float32))
    inputs = _inputs(SampleRecords.empty(SKETCH), VisitCounts())
    refresh(context, replace(inputs, uniform=True))  # imports what it needs
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    began = time.perf_counter()
    made = refresh(context, inputs)
    seconds = time.perf_counter() - began
    peak = (tracemalloc.get_traced_memory()[1] - before) / 2**20
    tracemalloc.stop()
    slots = made.schedule
    size = (slots.ids.nbytes + slots.roles.nbytes + slots.weights.nbytes) / 2**20
    facts = {"n": n, "coreset": slots.meta["coreset"], "slots": len(slots), "schedule MiB": size}
    return facts | {"peak MiB": peak, "beyond MiB": peak - size, "s": seconds}


def threshold(comm: Comm, seeds: int) -> list[dict[str, Any]]:
    """Whether each draw is that of a sort of all keys."""
    found = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        ids = np.sort(rng.choice(10 * DRAWN, DRAWN, replace=False)).astype(np.int64)
        log_p = np.round(rng.normal(size=DRAWN), 1) if seed % 2 else rng.normal(size=DRAWN)
        k = int(rng.integers(1, DRAWN))
        mine = owner_of(ids, comm.size) == comm.rank
        part = select("sample", ids[mine], log_p[mine], k, seed=seed, version=seed, comm=comm)
        drawn, weights = (np.concatenate(comm.allgather(array)) for array in (part.ids, part.weights))
        order, perturbed = np.argsort(drawn), log_p + gumbel(seed, seed, ids)
        first = np.lexsort((ids, -perturbed))
        wanted = np.sort(first[:k])
        chance = -np.expm1(-np.exp(log_p[wanted] - perturbed[first[k]]))
        close = np.allclose(weights[order], (1 / chance) / np.mean(1 / chance), rtol=1e-5)
        found.append(
            {"ranks": comm.size, "seed": seed, "k": k, "exact": bool(np.array_equal(drawn[order], ids[wanted]) and close)}
        )
    return found


def facility(comm: Comm, neighbours: Neighbours, weights: Array) -> IntArray:
    """The members that this rank owns of a fifth of the pool, chosen by facility location."""
    ids = np.arange(len(weights), dtype=np.int64)
    mine = owner_of(ids, comm.size) == comm.rank
    edges = Neighbours(neighbours.ids[mine], neighbours.similarity[mine])
    k = len(weights) // 5
    drawn: Coreset = select(
        "facility_location", ids[mine], np.log(weights[mine]), k, seed=0, version=0, neighbours=edges, comm=comm
    )
    return drawn.ids


def large(comm: Comm, n: int, graph: bool) -> dict[str, Any]:
    """Seconds of a refresh of n samples and of a later one, by stage, and this process's largest memory."""
    windows = OwnedWindows(n, None)
    config = _config("grace")
    config.ablate = [] if graph else ["graph", "sketches"]
    rng = np.random.default_rng(comm.rank)
    count = n // 20 // comm.size
    ids = windows.some(rng, count)
    draw = rng.standard_normal((3, count)).astype(np.float32)
    rows = SampleRecords(
        ids=ids,
        sketch=rng.standard_normal((count, SKETCH), np.float32).astype(np.float16),
        norm=np.abs(draw[0]),
        loss=draw[1],
        influence=0.4 + 0.2 * draw[2],
        step=np.full(count, 9, np.int64),
        basis=np.zeros(count, np.int32),
        hidden=rng.standard_normal((count, HIDDEN), np.float32).astype(np.float16),
    )
    context = _context(comm, config, windows, rng.standard_normal((500, STATISTICS)).astype(np.float32))
    inputs = _inputs(rows, VisitCounts())
    before = status_mib("VmRSS")
    began = time.perf_counter()
    first = refresh(context, inputs)
    total = time.perf_counter() - began
    later = replace(inputs, table=first.table, seen=first.seen, kept=first.kept, step=inputs.step + INTERVAL, version=2)
    began = time.perf_counter()
    refresh(context, replace(later, rows=SampleRecords.empty(SKETCH), losses=Losses.empty()))
    facts = {"n": n, "with graph": graph, "rank": comm.rank, "total": total, "later": time.perf_counter() - began}
    memory = {"inputs GB": before * 2**20 / 1e9, "peak GB": status_mib("VmHWM") * 2**20 / 1e9}
    return facts | {stage: first.seconds.get(stage, 0.0) for stage in first.seconds} | memory


class OwnedWindows:
    """One window of n ids; of two ranks rank 0 owns ``few`` of them, or each its share if that is None."""

    n, advance = 0, 0

    def __init__(self, n: int, few: int | None) -> None:
        self.size, self.few, self.limit = n, few, 4 * n

    def blocks(self) -> Iterator[IntArray]:
        """The ids, block by block."""
        left = {0: self.size if self.few is None else self.few, 1: self.size}
        total, start = self.size, 0
        while total:
            block = np.arange(start, start + (1 << 18), dtype=np.int64)
            start += len(block)
            if self.few is not None:
                owner = owner_of(block, 2)
                few = np.flatnonzero(owner == 0)[: left[0]]
                left[0] -= len(few)
                block = np.sort(np.concatenate([block[few], block[owner == 1]]))
            block = block[:total]
            total -= len(block)
            yield block

    def some(self, rng: np.random.Generator, count: int) -> IntArray:
        """Different ids of the window."""
        return np.unique(rng.integers(0, self.size, 2 * count))[rng.permutation(count)]

    def known(self, version: int, book: ScheduleBook) -> IntArray:
        """See :class:`grace_ds.data.pool.Windows`."""
        return np.empty(0, np.int64)

    def place(self, version: int, start: int, book: ScheduleBook, trained: IntArray) -> Placed:
        """See :class:`grace_ds.data.pool.Windows`."""
        return Placed(self.blocks)

    def hold(self, schedules: Iterable[Schedule]) -> None:
        """See :class:`grace_ds.data.pool.Windows`."""

    def check(self, schedules: Iterable[Schedule]) -> None:
        """See :class:`grace_ds.data.pool.Windows`."""


def _config(recipe: str) -> GraceConfig:
    config = GraceConfig(recipe=recipe)
    config.start_step = 0
    config.refresh.interval_steps, config.refresh.slack_steps = INTERVAL, INTERVAL // 4
    config.features.dim, config.collect.dim = WIDTH, SKETCH
    config.guard.clean_share = 1.0
    return config


def _context(comm: Comm, config: GraceConfig, windows: OwnedWindows, trusted: Array) -> RefreshContext:
    def contents(kept: ContentFeatures | None, ids: IntArray) -> ContentFeatures:
        if kept is not None:
            return kept
        rng = np.random.default_rng(7)
        n = len(ids)
        numbers: dict[str, Any] = {
            "density": rng.integers(0, 4, n).astype(np.float32),
            "quality": rng.random(n, np.float32) * 0.98 + 0.02,
        }
        if not config.collects:
            return ContentFeatures(ids, **numbers, statistics=None, vectors=None)
        vectors = clustered_rows(n, WIDTH, owner=comm.rank)
        return ContentFeatures(ids, **numbers, statistics=rng.standard_normal((n, STATISTICS), np.float32), vectors=vectors)

    nobody = np.empty(0, np.int64)
    return RefreshContext(comm, config, windows, SamplerOrder(1000), BATCH, contents, nobody, nobody, trusted)


def _inputs(rows: SampleRecords, visits: VisitCounts) -> RefreshInputs:
    empty = Table(SampleRecords.empty(SKETCH)), Table(Losses.empty())
    return RefreshInputs(rows, rows.losses, *empty, visits, 10, 1, 10 * BATCH, INTERVAL, {0: 0.4})


def _on_ranks(size: int, work: Callable[..., Any], *given: Any) -> list[Any]:
    """What ``work(comm, *given)`` returns on each of ``size`` processes."""
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(size) as children:
        task = partial(_rank, size, f"{folder}/rendezvous", work, given)
        return children.map_async(task, range(size), 1).get(LIMIT)


def _rank(size: int, rendezvous: str, work: Callable[..., Any], given: tuple[Any, ...], rank: int) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    found = work(choose("torch" if size > 1 else "local", timeout=LIMIT), *given)
    dist.destroy_process_group()
    return found
