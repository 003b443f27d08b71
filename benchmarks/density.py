"""Whether 6-gram counts still tell copies from unique text as the window grows: planted rows, five sizes, one process.

Rows are 512 tokens of the standard library's text.  A window of more rows than that has is filled with rows drawn from it
again, each under a renaming of the tokens of its own, so that the repetitions within a text stay real and its 6-grams are new.
Planted are rows of real text that share no more than a tenth of their 6-grams with the rest of it: some once, as many others
five times, each copy with one token changed.  The ratio is the mean chance, 1 / (1 + density), of a planted copy over that of a
planted unique row: 0.20 is right.  Everything is streamed; memory is the table's.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from grace_ds_quickstart.corpus import chunk, read_packages, split_of
from grace_ds_quickstart.tokenizer import encode_stream, train_tokenizer
from rich.console import Console

from benchmarks.record import Claim, Record
from grace_ds.data.tokens import TokenBlock
from grace_ds.features.duplicates import COPIES, NgramCounts
from grace_ds.features.ngrams import GRAM, Sampling
from grace_ds.records import Array, IntArray

SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
TOKENS = 512
PLANTED = 200  # rows once, and as many COPIES times
BLOCK = 512  # rows
NAMES = 1 << 16  # tokens are renamed within: more than the tokeniser's
GOAL, WITHIN = 1 / COPIES, 0.05
SHARED = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), metavar="N", help="rows of the windows")
    parser.add_argument("--vocab", type=int, default=8192, metavar="N", help="of the tokeniser")
    parser.add_argument("--text", type=Path, default=None, metavar="DIR", help="Python source files; default: the library's")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace, console: Console) -> Record:
    rows = real_rows(args.text or Path(sysconfig.get_paths()["stdlib"]), args.vocab)
    planted = unlike_others(rows)
    console.print(f"real text: {len(rows)} rows of {TOKENS} tokens, {len(planted)} of them with hardly a 6-gram of another")
    record = Record("density", rows={"by size": []})
    for size in args.sizes:
        row = measured(rows, planted, size, args.seed)
        record.rows["by size"].append(row)
        console.print(row)
        name = f"{size:.0e}".replace("e+0", "e").replace("e+", "e")
        record.claims += [
            Claim(f"density_ratio_{name}", row["ratio"], f"of a unique row's chance, 0.20 ± {WITHIN}", GOAL + WITHIN),
            Claim(f"density_table_{name}", row["table MiB"], "MiB a rank", None),
        ]
    record.notes += [
        f"a ratio below {GOAL - WITHIN:.2f} would miss the goal too",
        f"real text: {len(rows)} rows; background beyond it: those again, under renamings of their tokens",
    ]
    return record


def real_rows(root: Path, vocab: int) -> IntArray:
    """(n, TOKENS) int64, the text below ``root`` that pools are made of."""
    packages = read_packages(root)
    texts = [text for name, found in packages.items() if split_of(name) == "train" for text in found]
    return chunk(encode_stream(train_tokenizer(texts, vocab), texts), TOKENS).astype(np.int64)


def unlike_others(rows: IntArray) -> IntArray:
    """Places of the rows that share at most ``SHARED`` of their 6-grams with other rows, by exact counts."""
    grams = np.lib.stride_tricks.sliding_window_view(rows, GRAM, axis=1)
    n, each = grams.shape[:2]
    whole = np.ascontiguousarray(grams.astype(np.uint16)).reshape(n * each, GRAM).view(f"V{2 * GRAM}").reshape(-1)
    _, code = np.unique(whole, return_inverse=True)
    row = np.repeat(np.arange(n), each)
    pairs = np.unique(code.astype(np.int64) * n + row)  # each 6-gram once a row
    holders = np.bincount(pairs // n)
    shared = np.bincount(row, holders[code] > 1, n) / each
    return np.flatnonzero(shared <= SHARED)


def measured(rows: IntArray, planted: IntArray, size: int, seed: int) -> dict[str, Any]:
    """One window of ``size`` rows: the ratio, what new texts would get by the table's own trial, memory and seconds."""
    rng = np.random.default_rng(seed)
    count = min(PLANTED, len(planted) // 2, size // (2 * COPIES + 2))
    chosen = rng.permutation(planted)[: 2 * count]
    once, copies = rows[chosen[:count]], np.repeat(rows[chosen[count:]], COPIES, axis=0)
    copies[np.arange(len(copies)), rng.integers(0, TOKENS, len(copies))] = NAMES + np.arange(len(copies))
    rest = np.setdiff1d(np.arange(len(rows)), chosen)
    how = Sampling.of(size * (TOKENS - GRAM + 1), size)
    began = time.process_time()
    counts = NgramCounts(how)
    for part in (once, copies):
        counts.add(block_of(part))
    for part in background(rows[rest], size - len(once) - len(copies), rng):
        counts.add(block_of(part))
    counts.reduce(lambda x: x)
    spent = time.process_time() - began
    alone, dense = counts.degree(block_of(once)), counts.degree(block_of(copies))
    told = counts.tried(block_of(rows[rest][:256])).sum(0)
    return {
        "rows": size,
        "ratio": float((1 / (1 + dense)).mean() / (1 / (1 + alone)).mean()),
        "as new text": float(told[1] / told[0]),
        "median density of a copy": float(np.median(dense)),
        "median density of a unique row": float(np.median(alone)),
        "bins": f"2^{how.bits}",
        "counted": f"1 in {1 << how.level}",
        "table MiB": how.table_bytes / 2**20,
        "planted": count,
        "cpu seconds": spent,
        "ns a token": 1e9 * spent / (size * TOKENS),
    }


def background(rows: IntArray, size: int, rng: np.random.Generator) -> Iterator[IntArray]:
    """``size`` rows in blocks: the real ones first, as far as they go, then such rows under renamings of their tokens."""
    order = rng.permutation(len(rows))[:size]
    for lo in range(0, len(order), BLOCK):
        yield rows[order[lo : lo + BLOCK]]
    left = size - len(order)
    while left > 0:
        n = min(BLOCK, left)
        scale, shift = rng.integers(0, NAMES, (2, n, 1))
        yield (rows[rng.integers(0, len(rows), n)] * (2 * scale + 1) + shift) % NAMES  # odd: a permutation of the names
        left -= n


def block_of(rows: Array) -> TokenBlock:
    return TokenBlock(np.arange(len(rows)), rows.reshape(-1), np.arange(len(rows) + 1) * rows.shape[1])
