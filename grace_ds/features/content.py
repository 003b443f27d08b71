"""Compute content features: what the token ids alone show about a sample, with no gradients and no model.

The work is done by :mod:`grace_ds.features.sweeps`: counts are summed over the ranks, and densities and TF-IDF vectors are read
off the sums.  What is kept between runs: :mod:`grace_ds.features.corpus_cache`.

If the window rolls, only the features of the samples that enter it are computed (:func:`follow_window`).  The 6-gram counts
follow the window.  The weights of the terms stay those of the first window, so that the vectors of all samples compare.  The
choice of 6-grams to count also stays that of the first window (:mod:`grace_ds.features.ngrams`); it is passed on with the
counts: to the next window, and into checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from grace_ds.data.tokens import TokenReader, fingerprint, tokens_of
from grace_ds.features.corpus_cache import CorpusCache, WindowFacts, window_sums
from grace_ds.features.duplicates import NgramCounts
from grace_ds.features.ngrams import Allreduce, Sampling, agree_sampling
from grace_ds.features.sweeps import Sweeps, TokenScorer
from grace_ds.features.tfidf import TfIdf
from grace_ds.records import Array, FloatArray, IntArray

__all__ = ["ContentFeatures", "TokenReader", "TokenScorer", "content_features", "fingerprint", "tokens_of"]

MEMORY_BYTES = 256 << 20  # limit of the tokens kept between the two sweeps, and the same limit for 6-grams and for terms


@dataclass(frozen=True)
class ContentFeatures:
    """Content statistics of n samples on this rank.

    Attributes:
        ids: (n,) int64, as requested.
        density: (n,) float32, copies in the pool beyond the sample itself; all 0 if not wanted.
        quality: (n,) float32 in (0, 1], pass of the trusted filter; None without a trusted model.
        statistics: (n, s) float32, the trusted model's statistics of each sample, in robust deviations; None if not wanted.
        vectors: (n, dim) float32, unit norm; None if not wanted.
        seconds: by part: read, quality, density, tfidf; the sum over the threads.
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
    cache: CorpusCache | None = None,
    threads: int = 1,
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
        cache: what was computed before, on all ranks or on none; what is computed is added.
        threads: that compute on this rank; any number gives the same bits.
        memory_bytes: limit of the tokens that this rank keeps between the two sweeps, and the same of 6-grams and of terms.
        keep_counts: whether :func:`follow_window` will be called for further samples.
    """
    ids = np.asarray(ids_here, np.int64)
    window: tuple[int, ...] = ()
    facts = None
    if cache is not None:
        window = window_sums([ids], allreduce)
        facts = cache.window(window)
        lacks = facts is None or not facts.tells(want_density, want_tfidf)
        # A rank that lacks them takes part in sums that the others would skip.
        if int(allreduce(np.array([lacks], np.int64))[0]):
            facts = None
    terms = sampling = None
    if want_tfidf:
        terms = TfIdf(dim, seed) if facts is None else TfIdf.of(dim, seed, facts.totals)
    if want_density:
        sampling = facts.sampling if facts is not None else agree_sampling(reader, ids, allreduce)
    ngrams = NgramCounts(sampling) if sampling is not None else None
    sweeps = Sweeps(reader, ngrams, terms, trusted, want_statistics, cache, threads, memory_bytes)
    features = _features(sweeps, ids, dim, allreduce)
    if cache is not None and facts is None:
        cache.keep_window(window, WindowFacts(sampling, terms.totals if terms is not None else np.empty(0, np.int64)))
    return replace(features, counts=_counts(sweeps)) if keep_counts else features


def follow_window(
    kept: ContentFeatures,
    reader: TokenReader,
    ids_here: IntArray,
    *,
    dim: int,
    seed: int,
    allreduce: Allreduce,
    trusted: TokenScorer | None = None,
    cache: CorpusCache | None = None,
    threads: int = 1,
    memory_bytes: int = MEMORY_BYTES,
) -> ContentFeatures:
    """Return the features of a window that has moved; samples that stay keep theirs (collective, as :func:`content_features`).

    The 6-gram counts are those of the new window; a sample's density is that of the window it entered.  The 6-grams of samples
    that leave are removed from the counts: by the cache, or by reading the samples once more.

    Args:
        kept: of the previous window, with ``counts``.
        reader, dim, seed, allreduce, trusted, cache, threads, memory_bytes: as for :func:`content_features`.
        ids_here: (n,) int64, sorted, this rank's samples now.
    """
    ids = np.asarray(ids_here, np.int64)
    counts = kept.counts
    assert counts is not None, "features without counts cannot follow a window"
    entrants = np.setdiff1d(ids, kept.ids, assume_unique=True)
    ngrams = NgramCounts(counts.sampling, known=counts.grams) if len(counts.grams) else None
    terms = TfIdf.of(dim, seed, counts.terms) if len(counts.terms) else None
    sweeps = Sweeps(reader, ngrams, terms, trusted, kept.statistics is not None, cache, threads, memory_bytes)
    sweeps.drop(np.setdiff1d(kept.ids, ids, assume_unique=True))
    new = _features(sweeps, entrants, dim, allreduce)
    stay = kept.take(np.isin(kept.ids, ids))
    both: dict[str, Any] = {name: (getattr(stay, name), getattr(new, name)) for name in COLUMNS}
    columns: dict[str, Any] = {name: None if a is None else np.concatenate([a, b]) for name, (a, b) in both.items()}
    joined = replace(new, **columns, counts=_counts(sweeps))
    return joined.take(np.argsort(joined.ids, kind="stable"))


def _features(sweeps: Sweeps, ids: IntArray, dim: int, allreduce: Allreduce) -> ContentFeatures:
    result = sweeps.run(ids, dim, allreduce)
    scored, examined = sweeps.scorer is not None, sweeps.scorer is not None and sweeps.examine
    return ContentFeatures(
        ids,
        result.density,
        result.quality if scored else None,
        result.statistics if examined else None,
        result.vectors if sweeps.terms is not None else None,
        result.seconds,
        density_ratio=result.density_ratio,
    )


def _counts(sweeps: Sweeps) -> Counts:
    nothing = np.empty(0, np.int64)
    terms = nothing if sweeps.terms is None else sweeps.terms.totals
    if sweeps.counts is None:
        return Counts(nothing, terms, np.zeros(1, np.int64))
    return Counts(sweeps.counts.total, terms, np.array([sweeps.counts.sampling.level]))
