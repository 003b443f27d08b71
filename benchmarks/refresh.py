"""What a refresh costs against the size of the window, stage by stage, beside a bare faiss graph of the same rows.

One rank, all cores. The rows are the quickstart's crawl pool (real text, near-duplicates, junk); every row but the newest 5 %
has been collected before, so the graph has as many anchors as rows: the dearest case. Content is computed and the graph built,
as at the first refresh; then a later one is timed, which keeps both while 5 % of the rows have been collected again. Bare
faiss gets the content vectors and the same k: an exact flat index, and the structure that our backend chose with the parameters
that our backend had to find first; the ratio is to the faster of the two. Each size runs in a process of its own, refresh and
bare graph in turn; the size of --full has no bare graph beside it, whose search takes an hour and 12 GB there.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from grace_ds_quickstart.corpus import CorpusSpec, prepare
from rich.console import Console

from benchmarks.record import Claim, Record
from grace_ds.comm.local import LocalComm
from grace_ds.config.schema import GraceConfig
from grace_ds.data.order import SamplerOrder
from grace_ds.data.pool import Pool
from grace_ds.data.schedule import VisitCounts
from grace_ds.features.content import ContentFeatures, TokenReader, content_features
from grace_ds.features.quality import QualityModel
from grace_ds.graph.backends import FLAT_ROWS
from grace_ds.graph.backends.faiss_backend import FaissBackend
from grace_ds.records import HIDDEN, Array, IntArray, Losses, SampleRecords
from grace_ds.refresh.line import RefreshResult, refresh
from grace_ds.refresh.signals import RefreshContext, RefreshInputs
from grace_ds.refresh.table import Table

SIZES = (5_000, 10_000, 20_000, 40_000, 80_000)  # there is text for on a machine with Python alone
FULL = (1_000_000, 64)  # rows, width: --full
STAGES = ("gather", "table", "content", "embed", "graph", "propagate", "select", "broadcast")
BATCH = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), metavar="N", help="rows of a window")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="turns of each size")
    parser.add_argument("--objective", choices=("sample", "facility_location"), default="sample", help="selection.objective")
    parser.add_argument("--full", action="store_true", help=f"adds {FULL[0]:,} rows of width {FULL[1]}, once; about an hour")
    parser.add_argument("--data", type=Path, default=Path("runs/benchmarks/refresh-data"), help="where the pool is kept")


def run(args: argparse.Namespace, console: Console) -> Record:
    text = max(args.sizes + ([max(SIZES)] if args.full else []))  # windows that overlap are cut from that much
    corpus = prepare(CorpusSpec(pool_size=text), args.data)
    console.print(f"pool: {corpus.manifest['kinds']}, {'reused' if corpus.reused else 'built'}")
    rows: list[dict[str, Any]] = []
    jobs = [(n, GraceConfig().features.dim, args.repeats) for n in sorted(args.sizes)]
    for n, dim, repeats in jobs + ([(*FULL, 1)] if args.full else []):
        found = _in_child(args.data, n, dim, repeats, args.objective)
        rows += found
        bare = f", bare faiss {_medians(found, 'bare'):.2f} s" if "bare" in found[0] else ""
        console.print(f"  {n:>9,} x {dim}: {_medians(found, 'total'):.2f} s{bare}, {_medians(found, 'peak_extra_mib'):.0f} MiB")
    keys = dict.fromkeys((r["n"], r["dim"]) for r in rows)
    by_size = [_summary([r for r in rows if (r["n"], r["dim"]) == key]) for key in keys]
    record = Record("refresh", rows={"refreshes": rows, "by size": by_size})
    small = [s for s in by_size if (s["n"], s["dim"]) != FULL]
    sizes, totals, largest = [s["n"] for s in small], [s["total"] for s in small], small[-1]
    if largest["n"] == max(SIZES):
        record.claims.append(Claim("refresh_seconds_8e4", largest["total"], "s", None))
    if len(sizes) > 1:
        slope = float(np.polyfit(np.log(sizes), np.log(totals), 1)[0])
        record.claims.append(Claim("refresh_exponent", slope, "d log(seconds) / d log(rows)", None))
    again = float(np.median([r["later_graph"] / r["graph"] for r in rows if r["n"] == largest["n"]]))
    unit = f"graph of a later refresh, 5 % of {largest['n']} rows collected again / the first"
    record.claims.append(Claim("repair_share", again, unit, 0.2))
    for s in by_size:
        if (s["n"], s["dim"]) == FULL:
            unit = f"GB at the peak of the first refresh and the next, {FULL[0]:,} rows of width {FULL[1]}, beyond its inputs"
            record.claims.append(Claim("refresh_peak_1e6", s["peak MiB"] * 2**20 / 1e9, unit, 3.0))
    unit = f"whole refresh / bare faiss, {largest['n']} rows"
    record.claims.append(Claim("refresh_to_faiss_ratio", largest["total/bare"], unit, 1.5))
    record.notes.append("seconds of wall time, medians; spread is (max - min) / median of the whole refresh")
    record.hidden.append("refreshes")
    return record


def _in_child(data: Path, n: int, dim: int, repeats: int, objective: str) -> list[dict[str, Any]]:
    with multiprocessing.get_context("spawn").Pool(1) as child:
        return child.apply(measure, (data, n, dim, repeats, objective))


def measure(data: Path, n: int, dim: int, repeats: int, objective: str) -> list[dict[str, Any]]:
    """``repeats`` rows of figures for one size, in this process."""
    tokens = np.load(data / "train.npy")
    if n > len(tokens):  # more rows than there is text: windows that overlap
        stream = tokens[np.load(data / "kinds.npy") == 0].reshape(-1)
        tokens = np.lib.stride_tricks.sliding_window_view(stream, tokens.shape[1])[:: len(stream) // n][:n]
    tokens = tokens[:n]
    trusted = np.load(data / "trusted.npy").astype(np.int64)
    quality_model = QualityModel.fit(trusted.reshape(-1), np.arange(len(trusted) + 1) * trusted.shape[1])
    config = GraceConfig(recipe="grace")
    config.selection.objective = objective
    config.guard.enabled = False
    config.features.dim = dim
    interval = max(1, n // 20 // BATCH)
    config.start_step, config.refresh.interval_steps = 0, interval
    last: list[ContentFeatures] = []

    def contents(kept: ContentFeatures | None, ids: IntArray) -> ContentFeatures:
        if kept is not None:
            return kept
        reader = TokenReader(_Items(tokens), "auto", config.features.max_tokens)
        last[:] = [
            content_features(reader, ids, dim=dim, seed=1, allreduce=comm.allreduce, trusted=quality_model, want_statistics=True)
        ]
        return last[0]

    comm = LocalComm(3600.0)
    pool = Pool(n, n, config.budget, interval, BATCH, config.seed)
    nobody = np.empty(0, np.int64)
    context = RefreshContext(comm, config, pool, SamplerOrder(n), BATCH, contents, nobody, nobody, quality_model.held_out)
    out = []
    for _ in range(repeats):
        inputs = _inputs(n, config.collect.dim, interval)
        before = _reset_peak()
        started = time.perf_counter()
        outcome = refresh(context, inputs)
        total = time.perf_counter() - started
        row: dict[str, Any] = {"n": n, "dim": dim, "total": total, **{s: outcome.seconds.get(s, 0.0) for s in STAGES}}
        inputs = _next(inputs, outcome, interval)  # a job lets the old table go as well
        row |= _later(context, inputs)
        row |= {"peak_mib": status_mib("VmHWM"), "peak_extra_mib": status_mib("VmHWM") - before}
        compared = n <= max(SIZES)
        out.append(row | (bare_faiss(last[0].vectors, config.graph.k, config.graph.recall) if compared else {}))
    return out


def _inputs(n: int, dim: int, interval: int) -> RefreshInputs:
    """Of the first refresh that is timed."""
    old, new = _collect(n, dim, interval)
    tables = Table(SampleRecords.empty(dim)).merge(old), Table(Losses.empty()).merge(old.losses)
    return RefreshInputs(new, new.losses, *tables, VisitCounts(), 20 * interval, 1, 0, interval, {0: 0.4})


def _next(first: RefreshInputs, outcome: RefreshResult, interval: int) -> RefreshInputs:
    """Of the refresh after that, which keeps content and graph: rows of as many samples have been collected again."""
    rows = first.rows
    again = replace(rows, step=rows.step + interval, sketch=rows.sketch[::-1].copy(), hidden=rows.hidden[::-1].copy())
    return replace(
        first,
        rows=again,
        losses=again.losses,
        table=outcome.table,
        seen=outcome.seen,
        kept=outcome.kept,
        step=first.step + interval,
        version=first.version + 1,
    )


def _later(context: RefreshContext, x: RefreshInputs) -> dict[str, Any]:
    """Seconds of a later refresh."""
    started = time.perf_counter()
    found = refresh(context, x)
    graph = found.kept.graph
    assert graph is not None
    took = time.perf_counter() - started
    return {"later": took, "later_graph": found.seconds["graph"], "searched": graph.searched, "change": graph.change}


def bare_faiss(X: Array | None, k: int, recall: float) -> dict[str, Any]:
    """Seconds that faiss alone takes for the graph of ``X``: exact, and as our backend would build it (tuned beforehand)."""
    import faiss

    assert X is not None
    found: dict[str, Any] = {"bare_flat": None, "bare_tuned": None, "tuned": "exact"}
    tuned = FaissBackend(recall).tune(X, X, k + 1)[1] if len(X) >= FLAT_ROWS else None
    if tuned is not None:
        found["tuned"] = f"lists {tuned.nprobe}/{tuned.nlist}, x{tuned.candidates}"
        started = time.perf_counter()
        tuned.build(X).search(X, k + 1)
        found["bare_tuned"] = time.perf_counter() - started
    started = time.perf_counter()
    flat = faiss.IndexFlatIP(X.shape[1])
    flat.add(X)
    flat.search(X, k + 1)
    found["bare_flat"] = time.perf_counter() - started
    found["bare"] = min(s for s in (found["bare_flat"], found["bare_tuned"]) if s is not None)
    return found


class _Items:
    """A map-style dataset of token rows."""

    def __init__(self, tokens: Array) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, Array]:
        return {"input_ids": self.tokens[i]}


def _collect(n: int, dim: int, interval: int) -> tuple[SampleRecords, SampleRecords]:
    """Rows of all samples: those of earlier refreshes, and the newest 5 %, which replace older ones."""
    rng = np.random.default_rng(0)
    sketch = rng.standard_normal((n, dim), np.float32).astype(np.float16)

    def rows(ids: IntArray, steps: Array) -> SampleRecords:
        m = len(ids)
        draw = rng.standard_normal((3, m)).astype(np.float32)
        influence, basis = 0.4 + 0.2 * draw[2], np.zeros(m, np.int32)
        hidden = rng.standard_normal((m, HIDDEN)).astype(np.float16)
        return SampleRecords(ids, steps.astype(np.int64), sketch[ids], np.abs(draw[0]), draw[1], influence, basis, hidden)

    ids = np.arange(n, dtype=np.int64)
    newest = rng.permutation(n)[: interval * BATCH]
    return rows(ids, rng.integers(0, 19 * interval, n)), rows(newest, 19 * interval + np.arange(len(newest)) // BATCH)


def _reset_peak() -> float:
    """Starts a new high-water mark of this process's memory; returns what it holds now, MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_mib("VmRSS")


def status_mib(key: str) -> float:
    """A field of /proc/self/status in MiB, such as VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(key + ":"))) / 1024


def _medians(rows: list[dict[str, Any]], key: str) -> float:
    return float(np.median([r[key] for r in rows]))


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    totals = [r["total"] for r in rows]
    ratios = ("graph/bare", "graph"), ("total/bare", "total")
    return {
        "n": rows[0]["n"],
        "dim": rows[0]["dim"],
        **{s: _medians(rows, s) for s in STAGES},
        "total": _medians(rows, "total"),
        "later": _medians(rows, "later"),
        "later_graph": _medians(rows, "later_graph"),
        "spread": (max(totals) - min(totals)) / _medians(rows, "total"),
        "bare": _medians(rows, "bare") if "bare" in rows[0] else None,
        **{name: float(np.median([r[of] / r["bare"] for r in rows])) if "bare" in rows[0] else None for name, of in ratios},
        "peak MiB": _medians(rows, "peak_extra_mib"),
        "whole process MiB": _medians(rows, "peak_mib"),
        "tuned": rows[0].get("tuned"),
    }
