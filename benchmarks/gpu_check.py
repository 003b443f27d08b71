"""The GPU path on one card: the backend that auto takes, propagation, a whole refresh; seconds, recall, memory, in two minutes.

Rows are those of the graph benchmark: clustered, unit norm. Recall is taken against a search of all pairs on the CPU, by
similarity computed anew from the ids that were found. Propagation is compared with NumPy on the same rows. The refresh is graph
(exact tier), propagation, importance and draw, one process, half of the rows collected; the tiers are compared on a fifth of the
rows. Memory is what nvidia-smi sees of the card several times a second, this and other processes together, and the most that
this process has held on the host so far. A stage that fails is a row
that says so, and the others still run; figures are written after every stage, so that a killed run leaves what it has.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks.graph_rows import clustered_rows, true_bar
from benchmarks.record import Claim, Record
from grace_ds.comm.local import LocalComm
from grace_ds.comm.statistics import quantile
from grace_ds.config.schema import GraphConfig
from grace_ds.errors import ConfigError
from grace_ds.graph import backends
from grace_ds.graph.build import knn
from grace_ds.graph.propagate import Propagated, crowding, propagate
from grace_ds.recipes.weights import SPARSE, rank01, soft_pass, uncrowded
from grace_ds.records import Array, FloatArray, IntArray
from grace_ds.selection.gumbel import sample_without_replacement
from grace_ds.utils.arrays import device_memory, library_for, to_device, to_host

K, WIDTH, RECALL = 15, 128, 0.99
ROWS = 1_000_000
QUERIES = 300  # standard error of a recall of .99 on 300 x 15: about .002
HOPS = 2
SECONDS = 100.0  # after which no further stage is started
DIFFERENCE = 1e-6  # of propagation on the device and by NumPy
ROUNDING = 2e-6  # of the oracle's float32 products
DISTRIBUTIONS = ("torch", "numpy", "cupy-cuda", "cuvs-cu", "libcuvs-cu", "raft-dask-cu", "pylibraft-cu", "rmm-cu", "faiss-cpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=ROWS, metavar="N", help=f"rows of width {WIDTH}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to see that this program runs")
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="S", help="start no stage after so long")


def run(args: argparse.Namespace, console: Console) -> Record:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"torch {torch.__version__} sees no GPU here: give --device cpu to try the program itself")
    record = Record("gpu_check", rows={"machine": [machine(args.device)], "stages": []})
    record.notes.append("seconds of wall time, one turn each")
    check = Check(args.rows, args.device, record)
    ended = time.perf_counter() + args.seconds
    for stage in (check.rows, check.backend, check.propagation, check.refresh, check.tiers):
        row: dict[str, Any] = {"stage": stage.__name__, "seconds": None, "gpu GiB": None, "host GiB": None, "failed": ""}
        started = time.perf_counter()
        if started > ended:
            row["failed"] = f"not started: {args.seconds:.0f} s were over"
        else:
            with gpu_peak(args.device) as peak:
                row["failed"] = _failure(stage)
            host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            row |= {"seconds": time.perf_counter() - started, "gpu GiB": peak.gib, "host GiB": host}
        record.rows["stages"].append(row)
        console.print(f"  {row['stage']}: {row['failed'] or 'done'}, {time.perf_counter() - started:.1f} s", highlight=False)
        if args.json is not None:
            record.write(args.json)
    return record


def _failure(stage: Callable[[], None]) -> str:
    """Runs ``stage``; the error in one line, empty if there was none."""
    try:
        stage()
    except Exception as error:  # whatever it is, the other stages are still to be seen
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return ""


@dataclass
class Check:
    """The stages, in order; each leaves its claims in the record.

    Attributes:
        n: rows.
        device: cuda | cpu.
        record: of all figures.
        X: (n, WIDTH) float32, unit norm, on the grid.
        sample, bar: of the oracle.
        ids, similarity: (n, K), the graph of the last stage that made one.
    """

    n: int
    device: str
    record: Record
    X: FloatArray = field(default_factory=lambda: np.empty((0, WIDTH), np.float32))
    sample: Array = field(default_factory=lambda: np.empty(0, np.int64))
    bar: Array = field(default_factory=lambda: np.empty((0, 1), np.float32))
    ids: IntArray | None = None
    similarity: FloatArray | None = None

    def rows(self) -> None:
        """Rows and their true neighbours."""
        self.X = clustered_rows(self.n, WIDTH)
        self.sample, self.bar = true_bar(self.X, K, QUERIES)

    def backend(self) -> None:
        """The backend that auto takes, its whole graph, and the recall of it."""
        name = self._name()
        backend = backends.choose("auto", self.n, RECALL, device=self.device)
        with backends.opened(None, backend):
            warm = self.X[: min(self.n, 2000)]
            backend.search(backend.build(warm, np.arange(len(warm))), warm, K + 1)  # libraries are loaded once a job
            started = time.perf_counter()
            ids, similarity = backend.search(backend.build(self.X, np.arange(self.n)), self.X, K + 1)
            self._claim("leaf_seconds", time.perf_counter() - started, f"s, {name}, {self.n} x {WIDTH}, k = {K}")
        self._recall("leaf_recall", ids)
        own = np.argsort(ids == np.arange(self.n)[:, None], axis=1, kind="stable")[:, :K]
        self.ids, self.similarity = np.take_along_axis(ids, own, 1), np.take_along_axis(similarity, own, 1)

    def propagation(self) -> None:
        """Values spread along the graph (a random one if there is none) by NumPy and on the device."""
        draw = np.random.default_rng(0)
        if self.ids is None or self.similarity is None:
            self.ids = draw.integers(0, self.n, (self.n, K))
            self.similarity = draw.uniform(-0.2, 1.0, (self.n, K)).astype(np.float32)
        ids, similarity = self.ids, self.similarity
        values, age = collected(self.n)
        few = (values[:2000], age[:2000], ids[:2000] % min(self.n, 2000), similarity[:2000])
        _spread(*few)  # imports what it imports
        started = time.perf_counter()
        wanted = _spread(values, age, ids, similarity)
        self._claim("propagate_numpy_seconds", time.perf_counter() - started, f"s, {self.n} x {K}")
        library = library_for(self.device)[0]
        with device_memory(self.device):
            self._on_device(*few)  # compiles
            started = time.perf_counter()
            found = [to_host(x) for x in self._on_device(values, age, ids, similarity)]
            self._claim("propagate_seconds", time.perf_counter() - started, f"s, {library}, copies included")
        pairs = zip((wanted.values, wanted.reached, wanted.disagreement), found, strict=True)
        worst = max(difference(a, b) for a, b in pairs)
        self._claim("propagate_difference", worst, f"largest, {library} and numpy", DIFFERENCE)

    def refresh(self) -> None:
        """Graph, propagation, importance and draw, as a refresh does them."""
        name = self._name()
        started = time.perf_counter()
        self._graph("refresh", self.X, GraphConfig(k=K, recall=RECALL, tier="exact", backend=name))
        assert self.ids is not None and self.similarity is not None
        built = time.perf_counter()
        values, age = collected(self.n)
        with device_memory(self.device):
            spread, _, _ = self._on_device(values, age, self.ids, self.similarity)
            around = crowding(to_device(self.similarity, self.device))
            sparse = quantile(LocalComm(60.0), to_host(around), SPARSE) or 0.0
            importance = soft_pass(spread[:, 0], -1.5, 0.2) * (0.3 + rank01(spread[:, 0])) * uncrowded(around, sparse)
            log_p = np.log(to_host(importance))
        weighed = time.perf_counter()
        sample_without_replacement(np.arange(self.n), log_p, self.n // 5, 1, 1)
        done = time.perf_counter()
        self._claim("refresh_seconds", done - started, f"s, {self.n} rows, backend {name}")
        parts = {"graph": built - started, "propagation and importance": weighed - built, "draw": done - weighed}
        self.record.rows["refresh"] = [parts]

    def tiers(self) -> None:
        """The exact and the clustered tier beside each other."""
        rows = self.X[: max(self.n // 5, 100)]
        found: dict[str, float] = {}
        for tier in ("exact", "clustered"):
            started = time.perf_counter()
            knn(*_asked(rows), GraphConfig(k=K, recall=RECALL, tier=tier, backend=self._name()))
            found[tier] = time.perf_counter() - started
        self.record.rows["tiers"] = [{"rows": len(rows), **found}]

    def _name(self) -> str:
        """The backend that auto takes; on a GPU no other will do: a million rows would take it longer than there is time."""
        name, why = backends.automatic(self.device, self.n)
        if self.device == "cuda" and name != "cuvs":
            raise RuntimeError(f"auto takes {name} ({why})")
        return name

    def _graph(self, what: str, rows: FloatArray, config: GraphConfig) -> None:
        graph = knn(*_asked(rows), config)
        assert graph is not None
        self.ids, self.similarity = graph.ids, graph.similarity
        self._recall(f"{what}_recall", graph.ids)

    def _on_device(self, values: FloatArray, age: Array, ids: IntArray, similarity: FloatArray) -> tuple[Any, Any, Any]:
        found = _spread(*(to_device(x, self.device) for x in (values, age, ids, similarity)))
        return found.values, found.reached, found.disagreement

    def _recall(self, name: str, ids: IntArray) -> None:
        """Of the sampled rows' K nearest others among ``ids`` (n, k), the share that the oracle would have found."""
        found = ids[self.sample]
        there = (found >= 0) & (found != self.sample[:, None])
        similarity = np.einsum("nd,nkd->nk", self.X[self.sample], self.X[np.where(there, found, 0)])
        nearest = -np.sort(-np.where(there, similarity, -np.inf), axis=1)[:, :K]
        self._claim(name, float(np.mean(nearest >= self.bar - ROUNDING)), f"share of the true {K} nearest", RECALL, True)

    def _claim(self, name: str, value: float, unit: str, goal: float | None = None, higher: bool = False) -> None:
        self.record.claims.append(Claim(name, value, unit, goal, higher))


def collected(n: int) -> tuple[FloatArray, Array]:
    """(centred signals (n, 1) float32, NaN for half of the rows; ages (n, 1) float64 in refreshes, inf where NaN)."""
    draw = np.random.default_rng(1)
    values = np.where(draw.random((n, 1)) < 0.5, draw.standard_normal((n, 1)), np.nan).astype(np.float32)
    return values, np.where(np.isnan(values), np.inf, draw.integers(0, 4, (n, 1)))


def difference(a: Array, b: Array) -> float:
    """The largest difference where both are numbers; inf where only one is."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    if not np.array_equal(np.isnan(a), np.isnan(b)):
        return float("inf")
    return float(np.nanmax(np.abs(a - b), initial=0.0))


def _spread(values: Any, age: Any, ids: Any, similarity: Any) -> Propagated:
    # One process: the facts of the neighbours are those of its own rows.
    return propagate(values, age, ids, similarity, lambda facts: facts, hops=HOPS, shrink=1.0, decay=0.7)


def _asked(rows: FloatArray) -> tuple[LocalComm, IntArray, FloatArray, IntArray, FloatArray]:
    ids = np.arange(len(rows))
    return LocalComm(3600.0), ids, rows, ids, rows


def machine(device: str) -> dict[str, Any]:
    """The card, its driver and the versions that matter."""
    found: dict[str, Any] = {"device": device, "gpu": None, "gpu memory GiB": None, "driver": None}
    found["torch CUDA"] = torch.version.cuda
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {"gpu": properties.name, "gpu memory GiB": properties.total_memory / 2**30, "driver": _driver()}
    for wanted in DISTRIBUTIONS:
        names = (wanted,) if not wanted.endswith(("-cu", "-cuda")) else tuple(f"{wanted}{v}" for v in ("12", "13", "12x", "13x"))
        found[wanted.removesuffix("-cuda").removesuffix("-cu")] = next((v for v in map(_version, names) if v), None)
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return told[0] if told else None


@dataclass
class Peak:
    """The most memory in use on the card, GiB; None where it cannot be seen."""

    gib: float | None = None


@contextmanager
def gpu_peak(device: str) -> Iterator[Peak]:
    """Watches the card from a process of its own: cuVS holds the GIL while it works, so no thread here could."""
    peak = Peak()
    if device != "cuda" or shutil.which("nvidia-smi") is None:
        yield peak
        return
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    card = "0" if uuid is None else f"GPU-{uuid}"
    # One call a look: what its own loop prints may still be in a buffer when it is ended.
    once = f"nvidia-smi -i {card} --query-gpu=memory.used --format=csv,noheader,nounits"
    command = ["sh", "-c", f"while {once}; do sleep 0.1; done"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as watcher:
        seen: list[float] = []

        def read() -> None:
            assert watcher.stdout is not None
            seen.extend(float(line) for line in watcher.stdout if line.strip().isdigit())

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield peak
        finally:
            watcher.terminate()
            reader.join()
            peak.gib = max(seen) / 1024 if seen else None
