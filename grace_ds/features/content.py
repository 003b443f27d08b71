"""Compute content features: what the token ids alone show about a sample, with no gradients and no model.

There are two sweeps over this rank's samples.  The first counts (6-grams, terms) and scores by the trusted model.  The counts
are summed over the ranks.  The second reads densities and TF-IDF vectors off the sums.  Tokens and terms of the first sweep
are kept in memory up to a limit, so most items are read once and none more than twice.

If the window rolls, only the features of the samples that enter it are computed (:func:`follow_window`).  The 6-gram counts
follow the window.  The weights of the terms stay those of the first window, so that the vectors of all samples compare.  The
choice of 6-grams to count also stays that of the first window (:mod:`grace_ds.features.ngrams`); it is passed on with the
counts: to the next window, into the cache and into checkpoints.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from grace_ds.data.tokens import TokenBlock, TokenReader, fingerprint, tokens_of
from grace_ds.features import cache
from grace_ds.features.duplicates import NgramCounts
from grace_ds.features.memory import Memory
from grace_ds.features.ngrams import Allreduce, Sampling, agree_sampling, mixed, some
from grace_ds.features.tfidf import Terms, TfIdf
from grace_ds.records import Array, FloatArray, IntArray
from grace_ds.utils.files import digest

__all__ = ["ContentFeatures", "TokenReader", "TokenScorer", "content_features", "fingerprint", "tokens_of"]

RECIPE = 5  # part of the cache key: raise it when a formula below changes
MEMORY_BYTES = 256 << 20  # limit of the tokens kept between the two sweeps, and the same limit for the terms
TRIED = 256  # samples used to test the 6-gram counts


class TokenScorer(Protocol):
    """A model of the trusted samples that scores others by their tokens."""

    def quality(self, flat: IntArray, offsets: IntArray) -> npt.NDArray[np.float64]:
        """Return how well sample i, ``flat[offsets[i]:offsets[i + 1]]``, passes the trusted filter, (n,) float64 in (0, 1]."""
        ...

    def examine(self, flat: IntArray, offsets: IntArray) -> tuple[npt.NDArray[np.float64], FloatArray]:
        """Return :meth:`quality`, and (n, s) float32 statistics that the samples' gradients may be predicted from."""
        ...

    def digest(self) -> str:
        """Return hex digits that identify the fitted model."""
        ...


@dataclass(frozen=True)
class ContentFeatures:
    """Content statistics of n samples on this rank.

    Attributes:
        ids: (n,) int64, as requested.
        density: (n,) float32, copies in the pool beyond the sample itself; all 0 if not wanted.
        quality: (n,) float32 in (0, 1], pass of the trusted filter; None without a trusted model.
        statistics: (n, s) float32, the trusted model's statistics of each sample, in robust deviations; None if not wanted.
        vectors: (n, dim) float32, unit norm; None if not wanted.
        seconds: by part: read, quality, density, tfidf; all zero if they came from the cache.
        counts: counts to compute the features of further samples from; None if not wanted.
        density_ratio: chance of a text that is in the window five times over that of one that is there once, as the 6-gram
            counts give them, over all ranks: 0.20 if the counts recognise copies, near 1 if the table is too full to.  NaN
            if nothing was counted, or no sample was tested.
    """

    ids: IntArray
    density: FloatArray
    quality: FloatArray | None
    statistics: FloatArray | None
    vectors: FloatArray | None
    seconds: dict[str, float] = field(default_factory=dict)
    counts: Counts | None = None
    density_ratio: float = math.nan

    def take(self, index: Array) -> ContentFeatures:
        """Return the samples at ``index`` (positions or a mask), in that order."""
        columns: dict[str, Any] = {name: getattr(self, name) for name in COLUMNS}
        taken: dict[str, Any] = {name: None if c is None else c[index] for name, c in columns.items()}
        return replace(self, **taken)


COLUMNS = ("ids", "density", "quality", "statistics", "vectors")
COUNTS = ("grams", "terms", "level")


@dataclass(frozen=True)
class Counts:
    """Counts of the window over all ranks, equal on every rank.

    Attributes:
        grams: (2^bits,) int32 or int64, 6-grams by bin; empty if no density is wanted.
        terms: (2^18 + 1,) int64, of the first window: samples that hold each term, then all samples; empty without vectors.
        level: (1,) int64: one in 2^level of all 6-grams is counted.
    """

    grams: IntArray
    terms: IntArray
    level: IntArray

    @property
    def sampling(self) -> Sampling:
        """Sampling of ``grams``, which must not be empty."""
        return Sampling(len(self.grams).bit_length() - 1, int(self.level[0]))


@dataclass
class _Sweeps:
    """The two sweeps over one rank's samples, with their clocks."""

    counts: NgramCounts | None
    terms: TfIdf | None
    scorer: TokenScorer | None
    examine: bool = False
    tried: IntArray = field(default_factory=lambda: np.zeros(2, np.int64))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("read", "quality", "density", "tfidf"), 0.0))

    def first(self, block: TokenBlock) -> tuple[npt.NDArray[np.float64], FloatArray | None, Terms | None]:
        """Count one block.

        Returns:
            Its pass of the trusted filter, (n,) float64 (empty without a filter), its statistics, and its terms.
        """
        began = time.perf_counter()
        if self.counts is not None:
            self.counts.add(block)
        counted = time.perf_counter()
        terms = None if self.terms is None else self.terms.add(block)
        indexed = time.perf_counter()
        quality, statistics = np.empty(0), None
        if self.scorer is not None and self.examine:
            quality, statistics = self.scorer.examine(block.flat, block.offsets)
        elif self.scorer is not None:
            quality = self.scorer.quality(block.flat, block.offsets)
        self._clock(density=counted - began, tfidf=indexed - counted, quality=time.perf_counter() - indexed)
        return quality, statistics, terms

    def second(self, block: TokenBlock, terms: Terms | None) -> tuple[npt.NDArray[np.float64], FloatArray]:
        """Return the densities and vectors of one block, after the counts are summed.

        Args:
            block: as in the first sweep.
            terms: of the block; None if they were not kept.
        """
        began = time.perf_counter()
        density = np.zeros(len(block)) if self.counts is None else self.counts.degree(block)
        between = time.perf_counter()
        vectors = np.empty((0, 1), np.float32)
        if self.terms is not None:
            vectors = self.terms.vectors(len(block), Terms.of(block) if terms is None else terms)
        self._clock(density=between - began, tfidf=time.perf_counter() - between)
        return density, vectors

    def try_counts(self, block: TokenBlock, selected: npt.NDArray[np.bool_]) -> None:
        """Test whether the summed counts distinguish copies from unique texts.

        Args:
            block: of the second sweep.
            selected: (n,) samples of the block whose like are tested.
        """
        if self.counts is not None and selected.any():
            began = time.perf_counter()
            rows = [block.flat[block.offsets[i] : block.offsets[i + 1]] for i in np.flatnonzero(selected)]
            chances = self.counts.tried(TokenBlock.of(block.ids[selected], rows))
            self.tried += (
                np.rint(chances * 2.0**32).astype(np.int64).sum(0)
            )  # integers, so that the order of adding does not matter
            self._clock(density=time.perf_counter() - began)

    def ratio(self, allreduce: Allreduce) -> float:
        """Return ``density_ratio`` over all ranks, bit-identical for any number of them (collective)."""
        once, copied = allreduce(self.tried).tolist()
        return copied / once if once else math.nan

    def _clock(self, **seconds: float) -> None:
        for name, value in seconds.items():
            self.seconds[name] += value


def content_features(
    reader: TokenReader,
    ids_here: IntArray,
    *,
    dim: int,
    seed: int,
    allreduce: Allreduce,
    trusted: TokenScorer | None = None,
    want_density: bool = True,
    want_tfidf: bool = True,
    want_statistics: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    fingerprint: str | None = None,
    memory_bytes: int = MEMORY_BYTES,
    keep_counts: bool = False,
) -> ContentFeatures:
    """Compute the content features of this rank's share of the pool (collective: all ranks call it, a share may be empty).

    Args:
        reader: of the job's dataset.
        ids_here: (n,) int64, this rank's samples; the pool is the union over the ranks.
        dim: width of the TF-IDF vectors.
        seed: of their projection.
        allreduce: sums an int64 array over the ranks, element by element.
        trusted: model of the trusted samples, the same on all ranks.
        want_density: False leaves the 6-gram counts out.
        want_tfidf: False leaves the vectors out.
        want_statistics: True adds the trusted model's statistics, if there is such a model.
        cache_dir: folder for results between runs, set on all ranks or on none.
        fingerprint: of the dataset, for the cache; computed if it is needed and not given.
        memory_bytes: limit of the tokens that this rank keeps between the two sweeps, and once more of their terms.
        keep_counts: whether :func:`follow_window` will be called for further samples.
    """
    ids = np.asarray(ids_here, np.int64)
    key = ""
    if cache_dir is not None:
        name = reader.fingerprint() if fingerprint is None else fingerprint
        model = "" if trusted is None else trusted.digest()
        facts = [RECIPE, name, dim, seed, want_density, want_tfidf, want_statistics, keep_counts, model]
        facts += _pool_digest(ids, allreduce)
        key = digest(json.dumps(facts).encode())
        arrays = cache.load(cache_dir, key)
        # A miss on one rank is a miss on all: a hit would skip the sums over ranks that a miss takes part in.
        if int(allreduce(np.array([arrays is None], np.int64))[0]) == 0 and arrays is not None:
            columns: dict[str, Any] = {name: arrays.get(name) for name in COLUMNS[1:]}
            counts = Counts(*(arrays[name] for name in COUNTS)) if keep_counts else None
            ratio = float(arrays["density_ratio"][0])
            return ContentFeatures(ids, **columns, seconds=_Sweeps(None, None, None).seconds, counts=counts, density_ratio=ratio)
    terms = TfIdf(dim, seed) if want_tfidf else None
    ngrams = NgramCounts(agree_sampling(reader, ids, allreduce)) if want_density else None
    sweeps = _Sweeps(ngrams, terms, trusted, want_statistics)
    features = _compute(sweeps, reader, ids, allreduce, dim, memory_bytes)
    if keep_counts:
        features = replace(features, counts=_counts(sweeps))
    if cache_dir is not None:
        stored = {name: getattr(features, name) for name in COLUMNS[1:]} | (
            vars(features.counts) if features.counts is not None else {}
        )
        stored["density_ratio"] = np.array([features.density_ratio])
        cache.store(cache_dir, key, {name: array for name, array in stored.items() if array is not None})
    return features


def follow_window(
    kept: ContentFeatures,
    reader: TokenReader,
    ids_here: IntArray,
    *,
    dim: int,
    seed: int,
    allreduce: Allreduce,
    trusted: TokenScorer | None = None,
    memory_bytes: int = MEMORY_BYTES,
) -> ContentFeatures:
    """Return the features of a window that has moved; samples that stay keep theirs (collective, as :func:`content_features`).

    The 6-gram counts are those of the new window; a sample's density is that of the window it entered.  Samples that leave are
    read once more to remove their 6-grams from the counts.

    Args:
        kept: of the previous window, with ``counts``.
        reader, dim, seed, allreduce, trusted, memory_bytes: as for :func:`content_features`.
        ids_here: (n,) int64, sorted, this rank's samples now.
    """
    ids = np.asarray(ids_here, np.int64)
    counts = kept.counts
    assert counts is not None, "features without counts cannot follow a window"
    entrants = np.setdiff1d(ids, kept.ids, assume_unique=True)
    ngrams = terms = None
    if len(counts.grams):
        ngrams = NgramCounts(counts.sampling, known=counts.grams)
        for block in reader.blocks(np.setdiff1d(kept.ids, ids, assume_unique=True)):
            ngrams.drop(block)
    if len(counts.terms):
        terms = TfIdf.of(dim, seed, counts.terms)
    sweeps = _Sweeps(ngrams, terms, trusted, kept.statistics is not None)
    new = _compute(sweeps, reader, entrants, allreduce, dim, memory_bytes)
    stay = kept.take(np.isin(kept.ids, ids))
    both: dict[str, Any] = {name: (getattr(stay, name), getattr(new, name)) for name in COLUMNS}
    columns: dict[str, Any] = {name: None if a is None else np.concatenate([a, b]) for name, (a, b) in both.items()}
    joined = replace(new, **columns, counts=_counts(sweeps))
    return joined.take(np.argsort(joined.ids, kind="stable"))


def _counts(sweeps: _Sweeps) -> Counts:
    nothing = np.empty(0, np.int64)
    terms = nothing if sweeps.terms is None else sweeps.terms.totals
    if sweeps.counts is None:
        return Counts(nothing, terms, np.zeros(1, np.int64))
    return Counts(sweeps.counts.total, terms, np.array([sweeps.counts.sampling.level]))


def _compute(
    sweeps: _Sweeps, reader: TokenReader, ids: IntArray, allreduce: Allreduce, dim: int, memory_bytes: int
) -> ContentFeatures:
    """Run both sweeps, with the sums over the ranks between them."""
    n = len(ids)
    quality = np.empty(n if sweeps.scorer is not None else 0, np.float32)
    density = np.zeros(n, np.float32)
    vectors = np.empty((n if sweeps.terms is not None else 0, dim), np.float32)
    read_before = reader.seconds
    memory = Memory(reader, ids, memory_bytes)
    statistics: list[FloatArray] = []
    start = 0
    for block in reader.blocks(ids):
        passed, block_statistics, terms = sweeps.first(block)
        memory.keep(block, terms)
        quality[start : start + len(block)] = passed
        statistics += [] if block_statistics is None else [block_statistics]
        start += len(block)
    if sweeps.counts is not None:
        sweeps.counts.reduce(allreduce)
    if sweeps.terms is not None:
        sweeps.terms.reduce(allreduce)
    tried = some(ids, TRIED, int(allreduce(np.array([n], np.int64))[0]))
    if sweeps.counts is not None or sweeps.terms is not None:
        start = 0
        for block, terms in memory.replay():
            density[start : start + len(block)], vectors[start : start + len(block)] = sweeps.second(block, terms)
            sweeps.try_counts(block, tried[start : start + len(block)])
            start += len(block)
    sweeps.seconds["read"] = reader.seconds - read_before
    return ContentFeatures(
        ids,
        density,
        quality if sweeps.scorer is not None else None,
        _stacked(statistics, sweeps),
        vectors if sweeps.terms is not None else None,
        sweeps.seconds,
        density_ratio=sweeps.ratio(allreduce),
    )


def _stacked(statistics: list[FloatArray], sweeps: _Sweeps) -> FloatArray | None:
    """Return all blocks' statistics, with no rows if this rank has no samples; None if they are not wanted."""
    if sweeps.scorer is None or not sweeps.examine:
        return None
    none = sweeps.scorer.examine(np.empty(0, np.int64), np.zeros(1, np.int64))[1]
    return np.concatenate([none, *statistics])


def _pool_digest(ids: IntArray, allreduce: Allreduce) -> list[str | int]:
    """Return a digest of this rank's samples, and order-independent sums over the pool."""
    code = mixed(ids)
    low, high = code & np.uint64(0xFFFFFFFF), code >> np.uint64(32)  # halves: their sums cannot overflow
    sums = allreduce(np.array([len(ids), low.sum(), high.sum()]).astype(np.int64))
    return [digest(ids.astype("<i8").tobytes()), *map(int, sums)]
