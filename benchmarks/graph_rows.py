"""Clustered rows for the graph benchmark, their true neighbours, and how much memory a block of code has taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from grace_ds.records import Array, FloatArray
from grace_ds.utils.grid import on_grid
from grace_ds.utils.heap import trim_heap

TOPICS, SUBTOPICS = 100, 2000
_BLOCK = 10_000


def clustered_rows(n: int, width: int, seed: int = 0, owner: int | None = None) -> FloatArray:
    """(n, width) float32 unit rows on the grid, as content features are: topics, subtopics of Zipf-like sizes, noise.

    Args:
        n: number of rows.
        width: of a row.
        seed: of the topics, and of the rows unless there are several owners.
        owner: number of a rank's own rows among the same topics.
    """
    draw = np.random.default_rng(seed)
    topics = draw.normal(size=(TOPICS, width))
    centres = topics[draw.integers(0, TOPICS, SUBTOPICS)] + 0.8 * draw.normal(size=(SUBTOPICS, width))
    if owner is not None:
        draw = np.random.default_rng([seed, owner])
    share = 1 / np.arange(1, SUBTOPICS + 1) ** 0.7
    which = draw.choice(SUBTOPICS, n, p=share / share.sum())
    rows = np.empty((n, width), np.float32)
    for lo in range(0, n, _BLOCK):
        part = centres[which[lo : lo + _BLOCK]]
        rows[lo : lo + _BLOCK] = _unit(part + 0.5 * draw.normal(size=part.shape))
    return on_grid(rows)


def moved_rows(X: FloatArray, share: float, seed: int = 1) -> tuple[FloatArray, Array]:
    """A copy of ``X`` in which a random share of the rows has gone elsewhere in the same clusters, and which (n,) bool."""
    draw = np.random.default_rng(seed)
    moved = draw.random(len(X)) < share
    out = X.copy()
    target = X[draw.integers(0, len(X), int(moved.sum()))]
    out[moved] = _unit(0.8 * target + 0.6 * draw.normal(size=target.shape) / np.sqrt(X.shape[1]))
    return on_grid(out), moved


def true_bar(X: FloatArray, k: int, queries: int) -> tuple[Array, Array]:
    """A sample of rows (queries,), and for each the similarity of its k-th nearest other row (queries, 1)."""
    sample = np.random.default_rng(7).choice(len(X), min(queries, len(X)), replace=False)
    bars = []
    for part in np.array_split(sample, -(-len(sample) * len(X) // (1 << 25))):
        similarity = X[part] @ X.T
        similarity[np.arange(len(part)), part] = -np.inf
        bars.append(np.partition(similarity, len(X) - k, axis=1)[:, len(X) - k])
    return sample, np.concatenate(bars)[:, None]


@dataclass
class Extra:
    """Bytes at the peak above what the process held before."""

    bytes: int = 0


@contextmanager
def peak_above() -> Iterator[Extra]:
    """Counts the memory that the block takes at its peak."""
    trim_heap()  # what was freed before must not hide what is taken now
    Path("/proc/self/clear_refs").write_text("5")
    before, extra = _status("VmRSS"), Extra()
    yield extra
    extra.bytes = _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key + ":"))) * 1024


def _unit(x: Array) -> FloatArray:
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)
