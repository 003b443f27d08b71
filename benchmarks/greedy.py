"""What choosing costs: facility location beside apricot and submodlib, drawing ten million ids, content features a token.

Facility location runs on the content graph of the quickstart's crawl pool (real text, near-duplicates, junk), weighted by
the prior, 15 neighbours made symmetric, a fifth chosen.  Each library gets the same sparse matrix, every row scaled by its
weight, prepared beforehand and not timed, and its lazy greedy; apricot compiles anew in every fit, so a first fit on a tiny
graph does that and the result is kept.  Turns are interleaved.  A library is not run at a size where quadratic growth from
the last one would take it beyond the limit; a ratio is given only for sizes that were run.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from grace_ds_quickstart.corpus import CorpusSpec, prepare
from rich.console import Console

from benchmarks.record import Claim, Record
from benchmarks.token_rows import TokenRows
from grace_ds.comm.local import LocalComm
from grace_ds.errors import ConfigError
from grace_ds.features.content import TokenReader, content_features
from grace_ds.features.quality import QualityModel
from grace_ds.graph import backends
from grace_ds.graph.ring import nearest
from grace_ds.graph.rows import Request
from grace_ds.records import Array, IntArray, Neighbours
from grace_ds.selection.facility_location import Coverage, coverage, lazy_greedy, objective
from grace_ds.selection.gumbel import sample_without_replacement

SIZES = (1_000, 2_000, 4_000, 100_000)
SAMPLE_IDS = 10_000_000
NEIGHBOURS, CHOSEN, DIM = 15, 5, 128  # one in CHOSEN is chosen
SHARES = (0.01, 0.2, 0.5)
LENGTHS = (1024, 65)  # tokens a row: a pretraining window, and the quickstart's own
LIBRARIES = ("apricot", "submodlib")
PARTS: dict[str, tuple[bool, bool, bool, bool]] = {  # density, tfidf, prior, the prior's statistics
    "read": (False, False, False, False),
    "density": (True, False, False, False),
    "tfidf": (False, True, False, False),
    "prior": (False, False, True, False),
    "all": (True, True, True, False),
    "recipe prior": (True, False, True, False),
    "recipe grace": (True, False, True, True),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), metavar="N", help="rows")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="turns of each library")
    parser.add_argument(
        "--libraries", nargs="*", choices=LIBRARIES, default=list(LIBRARIES), help="to compare with; none: ours alone"
    )
    parser.add_argument("--limit", type=float, default=900.0, help="seconds that a library may take for one selection")
    parser.add_argument("--sample-ids", type=int, default=SAMPLE_IDS, metavar="N", help="ids to draw from")
    parser.add_argument("--data", type=Path, default=Path("runs/benchmarks/refresh-data"), help="where the pool is kept")


def run(args: argparse.Namespace, console: Console) -> Record:
    for name in args.libraries:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"{name} is not installed: pip install 'grace_ds[benchmark]', or leave it out of --libraries")
    for variable in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ.setdefault(variable, "1")  # for the children, and before they import anything
    corpus = prepare(CorpusSpec(pool_size=max(args.sizes)), args.data)
    console.print(f"pool: {corpus.manifest['kinds']}, {'reused' if corpus.reused else 'built'}")
    record = Record("greedy")
    _selections(args, record, console)
    _samples(args, record)
    _features(args, record)
    packages = {"apricot": "apricot-select", "submodlib": "submodlib-py"}
    record.notes += [f"{packages[name]} {importlib.metadata.version(packages[name])}" for name in args.libraries]
    record.notes.append("seconds of CPU time of the process, one thread, medians; spread is (max - min) / median")
    return record


def _selections(args: argparse.Namespace, record: Record, console: Console) -> None:
    """Runs ours and the libraries at every size, in turn."""
    rows: list[dict[str, Any]] = []
    last: dict[str, tuple[int, float]] = {}
    for n in sorted(args.sizes):
        graph, weights, seconds = _in_child(pool_graph, args.data, n)
        record.rows.setdefault("coverage", []).append({"n": n, "edges": len(graph.rows), "coverage s": seconds})
        able = [name for name in args.libraries if name not in last or _expected(last[name], n) <= args.limit]
        for name in set(args.libraries) - set(able):
            size, took = last[name]
            record.notes.append(f"{name} not run at n = {n}: {took:.0f} s at {size} would grow beyond {args.limit:.0f} s")
        for turn in range(args.repeats):
            for name in ("ours", *able):
                found = _in_child(measure, name, graph, weights, limit=args.limit)
                if found is None:
                    record.notes.append(f"{name} given up at n = {n}: over {args.limit:.0f} s")
                    able = [a for a in able if a != name]
                    last[name] = (n, args.limit)
                    continue
                chosen, took = found
                last[name] = (n, took)
                rows.append({"n": n, "turn": turn, "by": name, "seconds": took, "F": objective(graph, weights, chosen)})
                console.print(f"  {n:>7,} {name:<9} {took:9.3f} s  F = {rows[-1]['F']:.6f}")
    record.rows["selections"] = rows
    record.rows["by size"] = [
        _of(rows, n, name) for n in sorted(args.sizes) for name in ("ours", *args.libraries) if _of(rows, n, name)
    ]
    record.hidden.append("selections")
    record.claims += selection_claims(rows, args.libraries)


def selection_claims(rows: Sequence[dict[str, Any]], libraries: Sequence[str]) -> list[Claim]:
    """Speedups at the largest size of each library and of the fastest one, the worst objective ratio, exponents."""
    times = {(r["n"], r["turn"], r["by"]): r["seconds"] for r in rows}
    claims = []

    def speedup(n: int, names: Sequence[str]) -> float:
        turns = sorted({t for m, t, by in times if m == n and by in names})
        ratios = [min(times[n, t, b] for b in names if (n, t, b) in times) / times[n, t, "ours"] for t in turns]
        return float(np.median(ratios))

    measured = {name: sorted({r["n"] for r in rows if r["by"] == name}) for name in ("ours", *libraries)}
    compared = [name for name in libraries if measured[name]]
    if compared:
        n = max(measured[name][-1] for name in compared)
        here = [name for name in compared if measured[name][-1] == n]
        claims.append(Claim("greedy_speedup", speedup(n, here), f"fastest of {', '.join(here)} / ours, n = {n}", 20.0, True))
        value = {(r["n"], r["by"]): r["F"] for r in rows}
        ratios = [value[m, "ours"] / max(value[m, b] for b in compared if (m, b) in value) for m in measured[compared[0]]]
        claims.append(Claim("greedy_objective_ratio", min(ratios), "ours / best, worst of all sizes", 0.995, True))
    for name in compared:
        n = measured[name][-1]
        claims.append(Claim(f"greedy_speedup_{name}", speedup(n, [name]), f"{name} / ours, n = {n}", None, True))
    for name in ("ours", *compared):
        if len(measured[name]) > 1:
            median = [np.median([r["seconds"] for r in rows if r["by"] == name and r["n"] == n]) for n in measured[name]]
            slope = float(np.polyfit(np.log(measured[name]), np.log(median), 1)[0])
            claims.append(Claim(f"greedy_exponent_{name}", slope, "d log(seconds) / d log(n), measured sizes", None))
    return claims


def _expected(last: tuple[int, float], n: int) -> float:
    return last[1] * (n / last[0]) ** 2 if last[1] > 1 else 0.0  # below a second constants prevail


def _of(rows: Sequence[dict[str, Any]], n: int, name: str) -> dict[str, Any]:
    own = [r["seconds"] for r in rows if r["n"] == n and r["by"] == name]
    if not own:
        return {}
    value = next(r["F"] for r in rows if r["n"] == n and r["by"] == name)
    median = float(np.median(own))
    return {"n": n, "by": name, "seconds": median, "spread": (max(own) - min(own)) / median, "F": value}


def _in_child(function: Callable[..., Any], *given: Any, limit: float | None = None) -> Any:
    """What ``function`` returns in a process of its own; None when that takes longer than ``limit`` seconds of CPU or more."""
    with multiprocessing.get_context("spawn").Pool(1) as child:
        try:  # the clock here is the wall's: leave room for a busy machine and for the start
            return child.apply_async(function, given).get(None if limit is None else 3 * limit + 120)
        except multiprocessing.TimeoutError:
            return None


def pool_graph(data: Path, n: int) -> tuple[Coverage, Array, float]:
    """The symmetric content graph of the pool's first n rows, their weights, and the seconds that :func:`coverage` took."""
    neighbours, weights = pool_neighbours(data, n)
    began = time.process_time()
    graph = coverage(np.arange(n, dtype=np.int64), neighbours)
    return graph, weights, time.process_time() - began


def pool_neighbours(data: Path, n: int) -> tuple[Neighbours, Array]:
    """The k-NN graph over the content of the pool's first n rows, and their weights."""
    tokens, ids = np.load(data / "train.npy")[:n], np.arange(n, dtype=np.int64)
    found = content_features(
        TokenReader(TokenRows(tokens)), ids, dim=DIM, seed=1, allreduce=LocalComm(60.0).allreduce, trusted=_prior(data)
    )
    assert found.vectors is not None and found.quality is not None
    backend = backends.choose("auto", n, 0.99)
    neighbours = nearest(LocalComm(3600.0), Request.of(ids, found.vectors, NEIGHBOURS), backend)
    return neighbours, found.quality.astype(np.float64) / (1.0 + found.density)


def measure(name: str, graph: Coverage, weights: Array) -> tuple[IntArray, float]:
    """A fifth of the candidates as ``name`` chooses them, and its CPU seconds."""
    n = len(weights)
    if name == "ours":
        began = time.process_time()
        chosen = lazy_greedy(graph, weights, n // CHOSEN, np.ones(n, np.bool_), np.empty(0, np.int64))
        return chosen, time.process_time() - began
    sparse = importlib.import_module("scipy.sparse")
    value = graph.sim * weights[graph.rows]
    matrix = sparse.csr_matrix((value, graph.rows.astype(np.int32), graph.start.astype(np.int32)), (n, n))
    return {"apricot": _apricot, "submodlib": _submodlib}[name](matrix, n // CHOSEN)


def _apricot(matrix: Any, k: int) -> tuple[IntArray, float]:
    """Rows of ``matrix`` are candidates."""
    module = importlib.import_module("apricot.functions.facilityLocation")
    for compiled in ("calculate_gains_sparse", "calculate_gains_sieve"):
        setattr(module, compiled, functools.cache(getattr(module, compiled)))
    module.FacilityLocationSelection(2, metric="precomputed", optimizer="lazy").fit(matrix[:9, :9])
    selector = module.FacilityLocationSelection(k, metric="precomputed", optimizer="lazy")
    began = time.process_time()
    selector.fit(matrix)
    return np.asarray(selector.ranking, np.int64), time.process_time() - began


def _submodlib(matrix: Any, k: int) -> tuple[IntArray, float]:
    """Columns of what it gets are candidates; building its object is not timed."""
    module = importlib.import_module("submodlib")
    function = module.FacilityLocationFunction(n=matrix.shape[0], mode="sparse", sijs=matrix.T.tocsr(), num_neighbors=NEIGHBOURS)
    began = time.process_time()
    chosen = function.maximize(budget=k, optimizer="LazyGreedy", stopIfZeroGain=False, show_progress=False)
    took = time.process_time() - began
    return np.array([j for j, _ in chosen], np.int64), took


def _samples(args: argparse.Namespace, record: Record) -> None:
    """Seconds and memory of drawing from ``--sample-ids`` ids."""
    rows = _in_child(measure_samples, args.sample_ids, args.repeats)
    record.rows["samples"] = rows
    main = next(r for r in rows if r["share"] == 1 / CHOSEN)
    if args.sample_ids == SAMPLE_IDS:
        record.claims.append(Claim("sample_seconds_1e7", main["seconds"], "s of CPU, a fifth drawn, with weights", 5.0))
    most = max(r["bytes/id"] for r in rows)
    record.claims.append(Claim("sample_bytes_per_id", most, "peak beyond inputs and output, largest of all shares", 16.0))
    record.notes.append("bytes/id: tracemalloc's peak (it sees NumPy's arrays) less the result's arrays, in a call of its own")


def measure_samples(n: int, repeats: int) -> list[dict[str, Any]]:
    """A row of figures for each share drawn."""
    ids, log_p = np.arange(n, dtype=np.int64), np.random.default_rng(0).normal(size=n)
    out = []
    for share in SHARES:
        k, seconds = int(n * share), []
        for version in range(repeats):
            began = time.process_time()
            sample_without_replacement(ids, log_p, k, 1, version)
            seconds.append(time.process_time() - began)
        tracemalloc.start()
        drawn = sample_without_replacement(ids, log_p, k, 1, 0)
        peak = tracemalloc.get_traced_memory()[1] - drawn.ids.nbytes - drawn.weights.nbytes
        tracemalloc.stop()
        median = float(np.median(seconds))
        spread = (max(seconds) - min(seconds)) / median
        out.append({"ids": n, "share": share, "seconds": median, "spread": spread, "bytes/id": peak / n})
    return out


def _features(args: argparse.Namespace, record: Record) -> None:
    """Tokens a second of the content features, whole and by part."""
    rows = _in_child(measure_features, args.data, max(args.sizes), args.repeats)
    record.rows["features"] = rows
    for length in LENGTHS:
        whole = next(r for r in rows if r["row tokens"] == length and r["part"] == "all")
        name, goal = ("feature_tokens_per_second", 5e6) if length == LENGTHS[0] else (f"feature_tokens_per_second_{length}", None)
        claims = Claim(name, whole["tokens/s"], f"tokens/s of one core, rows of {length} tokens", goal, True)
        record.claims.append(claims)
    record.notes.append("features: a part alone includes reading the rows; read: the rows only, and none of the parts")


def measure_features(data: Path, n: int, repeats: int) -> list[dict[str, Any]]:
    """A row of figures for each part and length of row; the parts take turns."""
    tokens, quality_model = np.load(data / "train.npy")[:n].reshape(-1), _prior(data)
    allreduce = LocalComm(60.0).allreduce
    out = []
    for length in LENGTHS:
        table = tokens[: len(tokens) // length * length].reshape(-1, length)
        ids, seconds = np.arange(len(table), dtype=np.int64), {part: [0.0] * repeats for part in PARTS}
        reader = TokenReader(TokenRows(table))
        content_features(reader, ids[:64], dim=DIM, seed=1, allreduce=allreduce, trusted=quality_model)  # imports, first touches
        for turn in range(repeats):
            for part, (density, tfidf, scored, examined) in PARTS.items():
                began = time.process_time()
                content_features(
                    reader,
                    ids,
                    dim=DIM,
                    seed=1,
                    allreduce=allreduce,
                    trusted=quality_model if scored else None,
                    want_density=density,
                    want_tfidf=tfidf,
                    want_statistics=examined,
                )
                seconds[part][turn] = time.process_time() - began
        for part, own in seconds.items():
            median = float(np.median(own))
            row: dict[str, Any] = {"row tokens": length, "part": part, "tokens": table.size, "seconds": median}
            out.append(row | {"spread": (max(own) - min(own)) / median, "tokens/s": table.size / median})
    return out


def _prior(data: Path) -> QualityModel:
    trusted = np.load(data / "trusted.npy").astype(np.int64)
    return QualityModel.fit(trusted.reshape(-1), np.arange(len(trusted) + 1) * trusted.shape[1])
