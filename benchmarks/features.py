"""Speed of the content features: tokens a second at one core and at several beside each other, and from the cache.

Rows are text of the standard library, drawn again under renamings of their tokens where it is too short.  Each turn runs in a
process of its own that may use as many cores as it has threads, and the numbers of cores take turns.  A turn computes all of
what recipe grace uses: scores with statistics, densities, vectors.  The first turns give both the wall's seconds and the
CPU's, which say what the machine's other work has left; the last ones read what a run before them has written.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.density import TOKENS, background, real_rows
from benchmarks.record import Claim, Record
from benchmarks.token_rows import TokenRows
from grace_ds.data.tokens import TokenReader
from grace_ds.features.content import content_features
from grace_ds.features.corpus_cache import CorpusCache
from grace_ds.features.quality import QualityModel
from grace_ds.records import IntArray

DIM, TRUSTED = 96, 400
CORE_GOAL, LINEAR_GOAL = 5e6, 0.95


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=20_000, metavar="N", help=f"of {TOKENS} tokens")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2], metavar="N", help="of a turn, and as many threads")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vocab", type=int, default=8192, metavar="N", help="of the tokeniser")
    parser.add_argument("--text", type=Path, default=None, metavar="DIR", help="Python source files; default: the library's")


def run(args: argparse.Namespace, console: Console) -> Record:
    text = real_rows(args.text or Path(sysconfig.get_paths()["stdlib"]), args.vocab)
    rng, trusted = np.random.default_rng(0), text[:TRUSTED]
    rows = np.concatenate(list(background(text[TRUSTED:], args.rows, rng))).astype(np.int32)
    record = Record("features", rows={"turns": []}, hidden=["turns"])
    with tempfile.TemporaryDirectory(prefix="features-") as folder:
        np.save(Path(folder) / "rows.npy", rows)
        np.save(Path(folder) / "trusted.npy", trusted)
        for turn in range(args.repeats):
            for cached in (False, True):
                for cores in args.cores:
                    row = {"turn": turn, "cores": cores, "cached": cached} | _in_child(folder, cores, cached)
                    record.rows["turns"].append(row)
                    console.print(row)
        size = sum(file.stat().st_size for file in Path(folder, "cache").rglob("*") if file.is_file())
    record.rows["speed"] = [_of(record.rows["turns"], cores, cached) for cached in (False, True) for cores in args.cores]
    record.claims = claims(record.rows["speed"])
    record.claims.append(Claim("features_cache_bytes", size / len(rows), f"bytes a sample of {TOKENS} tokens on disk", None))
    record.notes = [
        "tokens/s is by the wall's clock, of the median turn; spread: (slowest - fastest) / median; load: of the machine before "
        "the turn, other work included",
        "cpu tokens/s/core: tokens over CPU seconds of all threads: what a core does while it is given to the turn",
        "main thread: its share of the CPU seconds, in which it reads the dataset and takes the results, beside the others: from "
        "1 / share cores on, more are of no use",
    ]
    return record


def claims(speed: list[dict[str, Any]]) -> list[Claim]:
    """The speed of one core, and what several do of that many times one."""
    fresh = {row["cores"]: row for row in speed if not row["cached"]}
    few, many = min(fresh), max(fresh)
    made = [
        Claim("features_tokens_per_second_core", fresh[few]["cpu tokens/s/core"], "tokens / CPU second, 1 core", CORE_GOAL, True),
        Claim("features_tokens_per_second_wall", fresh[few]["tokens/s"], f"tokens / second, {few} core", None, True),
    ]
    if many > few:
        each = fresh[many]["tokens/s"] / fresh[few]["tokens/s"] * few / many
        cpu = fresh[many]["cpu tokens/s/core"] / fresh[few]["cpu tokens/s/core"]
        made.append(Claim("features_cores", 1 / fresh[many]["main thread"], "cores of a rank that can be of use", None, True))
        made.append(Claim("features_linear", each, f"speed at {many} cores / {many} x speed at {few}, wall", LINEAR_GOAL, True))
        made.append(Claim("features_linear_cpu", cpu, f"tokens a CPU second at {many} cores / at {few}", LINEAR_GOAL, True))
    return made


def _of(turns: list[dict[str, Any]], cores: int, cached: bool) -> dict[str, Any]:
    mine = [row for row in turns if row["cores"] == cores and row["cached"] == cached]
    wall = np.array([row["tokens/s"] for row in mine])
    return {
        "cores": cores,
        "cached": cached,
        "tokens/s": float(np.median(wall)),
        "slowest": float(wall.min()),
        "fastest": float(wall.max()),
        "spread": float((wall.max() - wall.min()) / np.median(wall)),
        "cpu tokens/s/core": float(np.median([row["tokens"] / row["cpu seconds"] for row in mine])),
        "main thread": float(np.median([row["main thread"] for row in mine])) if cores > 1 else None,
        "load": float(np.median([row["load"] for row in mine])),
    }


def _in_child(folder: str, cores: int, cached: bool) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1) as child:
        found: dict[str, Any] = child.apply(measure, (folder, cores, cached))
        return found


def measure(folder: str, cores: int, cached: bool) -> dict[str, Any]:
    """One turn in this process, on its first ``cores`` cores; a cached one writes first if nothing is written yet."""
    rows, trusted = np.load(Path(folder) / "rows.npy"), np.load(Path(folder) / "trusted.npy")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    model = QualityModel.fit(trusted.reshape(-1), np.arange(len(trusted) + 1) * trusted.shape[1])
    reader, load = TokenReader(TokenRows(rows)), os.getloadavg()[0]

    def compute(ids: IntArray, cache: CorpusCache | None) -> dict[str, float]:
        options: dict[str, Any] = {"dim": DIM, "seed": 1, "allreduce": lambda array: array, "want_statistics": True}
        return content_features(reader, ids, trusted=model, threads=cores, cache=cache, **options).seconds

    def cache() -> CorpusCache | None:
        return CorpusCache("benchmark", Path(folder) / "cache") if cached else None

    ids = np.arange(len(rows), dtype=np.int64)
    compute(ids[:64], None)  # imports, first touches
    if cached and not (Path(folder) / "cache").is_dir():
        compute(ids, cache())
    reader.seconds = 0.0
    began, cpu, main = time.perf_counter(), time.process_time(), time.thread_time()
    parts = compute(ids, cache())
    seconds, cpu, main = time.perf_counter() - began, time.process_time() - cpu, time.thread_time() - main
    found = {"tokens": rows.size, "seconds": seconds, "cpu seconds": cpu, "tokens/s": rows.size / seconds, "load": load}
    found["main thread"] = main / cpu
    return found | {name: parts[name] for name in ("quality", "density", "tfidf")} | {"read": reader.seconds}
