"""Tiny pools for the tests of the selection benchmark, written as it writes its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.selection.corpora import CorpusSpec
from benchmarks.selection.pools import PoolSpec, prepare_pool
from benchmarks.selection.store import Stored

# Few enough rows that sixty packages hold them in every split.
SIZES = CorpusSpec(vocab=300, trusted=24, dev=16, test=16)


def write_packages(root: Path, packages: int = 60, lines: int = 25) -> Path:
    """Made-up Python packages, each with words of its own beside common ones; the same each time."""
    rng = np.random.default_rng(0)
    syllables = ["ka", "lo", "mi", "ter", "su", "ven", "dra", "po", "qui", "fe"]
    common = ["".join(rng.choice(syllables, 2)) for _ in range(60)]
    root.mkdir(parents=True, exist_ok=True)
    for i in range(packages):
        own = ["".join(rng.choice(syllables, 3)) for _ in range(40)]
        words = common + own
        body = [
            f"def {rng.choice(words)}({', '.join(rng.choice(words, 2))}):\n"
            f"    {rng.choice(words)} = {rng.choice(words)}.{rng.choice(words)}({rng.integers(0, 9999)})\n"
            f"    return {' + '.join(rng.choice(words, 3))}\n"
            for _ in range(lines)
        ]
        (root / f"package{i}.py").write_text("\n".join(body))
    return root


def tiny_pool(folder: Path, spec: PoolSpec | None = None) -> Stored:
    """A pool of 500 rows below ``folder``."""
    root = write_packages(folder / "packages")
    return prepare_pool(spec or PoolSpec("crawl", size=500), folder / "pools", corpus=SIZES, root=root)
