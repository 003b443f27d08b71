"""Keep what was computed of a corpus' samples between refreshes, resumes and runs, each part by what it depends on.

=========  ===================================================================================================
of         depends on
=========  ===================================================================================================
scores     the corpus and the trusted model
6-grams    the corpus and the sampling of the counts
vectors    the corpus, their width and seed, and the weights of the terms: counts of the first window
a window   the corpus and its samples: the sampling of its 6-grams, and its counts of terms
=========  ===================================================================================================

The corpus is known by :meth:`grace_ds.data.tokens.TokenReader.token_fingerprint`.  Densities are not kept: they depend on every
sample of the window, and follow from its 6-grams.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grace_ds.features import cache
from grace_ds.features.ngrams import BITS, MOST_BITS, Allreduce, Sampling, mixed
from grace_ds.features.row_files import RowFiles
from grace_ds.features.tfidf import TERMS
from grace_ds.records import Array, IntArray
from grace_ds.utils.files import digest

RECIPE = 6  # part of every key: raise it when a formula of the features changes


@dataclass(frozen=True)
class WindowFacts:
    """What the features of a first window start from; equal on all ranks.

    Attributes:
        sampling: of its 6-grams; None: not known.
        totals: (2^18 + 1,) int64, samples that hold each term, then all samples; empty: not known.
    """

    sampling: Sampling | None
    totals: IntArray

    def tells(self, density: bool, tfidf: bool) -> bool:
        """Return whether nothing is missing for what is wanted."""
        return (self.sampling is not None or not density) and (len(self.totals) > 0 or not tfidf)


class CorpusCache:
    """The cached features of one corpus.

    Args:
        corpus: :meth:`TokenReader.token_fingerprint` of the corpus.
        folder: read, and written to; None: nothing is written.
        precomputed: read first, never written to; None: none.
        leads: whether this rank writes what is equal on all ranks.
    """

    def __init__(self, corpus: str, folder: Path | None, precomputed: Path | None = None, leads: bool = True) -> None:
        self.corpus, self.folder, self.leads = corpus, folder, leads
        self.folders = [place for place in (precomputed, folder) if place is not None]
        self._files: dict[str, RowFiles] = {}

    def scores(self, model: str) -> RowFiles:
        """Return the scores by the trusted model with the digest ``model``."""
        return self._rows("scores", model)

    def grams(self, sampling: Sampling) -> RowFiles:
        """Return the 6-grams of ``sampling``."""
        return self._rows("grams", sampling.bits, sampling.level)

    def vectors(self, dim: int, seed: int, totals: IntArray) -> RowFiles:
        """Return the vectors of width ``dim`` with weights from ``totals`` (2^18 + 1,)."""
        return self._rows("vectors", dim, seed, digest(totals.astype("<i8").tobytes()))

    def window(self, window: Sequence[int]) -> WindowFacts | None:
        """Return what is known of a window, from :func:`window_sums`; None if that is nothing."""
        key = self._key("window", *window)
        for folder in self.folders:
            arrays = cache.load(folder, key)
            if arrays is not None and (facts := _facts(arrays)) is not None:
                return facts
        return None

    def keep_window(self, window: Sequence[int], facts: WindowFacts) -> None:
        """Write what is known of a window; on the rank that leads."""
        if self.folder is not None and self.leads:
            known = [] if facts.sampling is None else [facts.sampling.bits, facts.sampling.level]
            arrays = {"sampling": np.array(known, np.int64), "totals": facts.totals.astype(np.int64)}
            cache.store(self.folder, self._key("window", *window), arrays)

    def _key(self, kind: str, *facts: Any) -> str:
        return digest(json.dumps([RECIPE, self.corpus, kind, *facts]).encode())

    def _rows(self, kind: str, *facts: Any) -> RowFiles:
        key = self._key(kind, *facts)
        if key not in self._files:
            places = [folder / f"{kind}-{key}" for folder in self.folders]
            target = None if self.folder is None else self.folder / f"{kind}-{key}"
            self._files[key] = RowFiles(places, key, target)
        return self._files[key]


def _facts(arrays: dict[str, Array]) -> WindowFacts | None:
    """Return the facts that a file holds; None if they are none that can have been written."""
    sampling, totals = arrays.get("sampling"), arrays.get("totals")
    if sampling is None or totals is None or {sampling.dtype, totals.dtype} != {np.dtype(np.int64)}:
        return None
    if sampling.shape not in ((0,), (2,)) or totals.shape not in ((0,), (TERMS + 1,)):
        return None
    if len(totals) and (int(totals.min()) < 0 or int(totals[:-1].max()) > int(totals[-1])):
        return None
    if not len(sampling):
        return WindowFacts(None, totals)
    bits, level = sampling.tolist()
    return WindowFacts(Sampling(bits, level), totals) if BITS <= bits <= MOST_BITS and 0 <= level < 32 else None


def window_sums(blocks: Iterable[IntArray], allreduce: Allreduce) -> tuple[int, ...]:
    """Return numbers that identify a window, whatever the order of its samples and the number of ranks.  Collective.

    Args:
        blocks: this rank's ids.
        allreduce: sums an int64 array over the ranks.
    """
    sums = np.zeros(5, np.int64)
    for ids in blocks:
        code = mixed(ids)
        # Halves of two hashes: a sum of whole ones would lose what overflows.
        again = mixed(code.view(np.int64))
        halves = [half for word in (code, again) for half in (word & np.uint64(0xFFFFFFFF), word >> np.uint64(32))]
        sums += np.array([len(ids), *(half.sum() for half in halves)], np.uint64).view(np.int64)
    return tuple(map(int, allreduce(sums)))
