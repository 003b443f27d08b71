"""Compute the content features of samples in two sweeps, by several threads, and from the cache as far as it goes.

The first sweep takes from the cache what is there, reads the tokens of the other samples and computes what is missing: scores,
6-grams, terms.  6-grams and terms are counted.  After the counts are summed over the ranks, the second sweep reads densities
off the 6-grams and vectors off the terms.  What the first sweep found is kept in memory up to a limit; beyond it 6-grams come
from the cache again, and terms and the rest from the tokens.  Each number depends on its sample and on the counts alone, so
neither threads nor blocks nor the cache change a bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from grace_ds.data.tokens import TokenBlock, TokenReader
from grace_ds.features.columns import (
    Scores,
    read_grams,
    read_scores,
    read_vectors,
    write_grams,
    write_scores,
    write_vectors,
)
from grace_ds.features.corpus_cache import CorpusCache
from grace_ds.features.duplicates import NgramCounts
from grace_ds.features.memory import Kept, Memory
from grace_ds.features.ngrams import Allreduce, some
from grace_ds.features.quality import STATISTICS
from grace_ds.features.row_files import RowFiles
from grace_ds.features.tfidf import Terms, TfIdf
from grace_ds.records import Array, FloatArray, IntArray
from grace_ds.utils.threads import in_order

KNOWN = 4096  # samples that are looked up in the cache at a time
TRIED = 256  # samples used to test the 6-gram counts
PARTS = ("read", "quality", "density", "tfidf")

Bools = npt.NDArray[np.bool_]


class TokenScorer(Protocol):
    """A model of the trusted samples that scores others by their tokens; several threads may call it at a time."""

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
class Files:
    """Where rows of a corpus are kept; None for what is not kept, or not known yet."""

    scores: RowFiles | None = None
    grams: RowFiles | None = None
    vectors: RowFiles | None = None

    def flush(self) -> None:
        """Write all rows that wait."""
        for files in (self.scores, self.grams, self.vectors):
            if files is not None:
                files.flush()


@dataclass
class Result:
    """Features of n samples.

    Attributes:
        density, quality: (n,) float32.
        statistics: (n, 5) float32.
        vectors: (n, dim) float32.
        density_ratio: see :class:`grace_ds.features.content.ContentFeatures`.
        seconds: by part; the sum over the threads.
    """

    density: FloatArray
    quality: FloatArray
    statistics: FloatArray
    vectors: FloatArray
    density_ratio: float = math.nan
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))


@dataclass
class _Lacking:
    """Which of the samples still lack scores, 6-grams, vectors: (n,) bool each."""

    scores: Bools
    grams: Bools
    vectors: Bools

    @property
    def any(self) -> Bools:
        return np.asarray(self.scores | self.grams | self.vectors, np.bool_)


@dataclass
class _Found:
    """What the first sweep found of some samples; ``scores`` and ``vectors`` belong to the positions before them."""

    kept: Kept
    scored: IntArray
    scores: Scores
    placed: IntArray
    vectors: FloatArray
    seconds: dict[str, float]


class Sweeps:
    """The two sweeps over one rank's samples.

    Args:
        reader: of the job's dataset.
        counts: of 6-grams; None: no densities.
        terms: the TF-IDF model; None: no vectors.  If its weights are fixed, vectors may come from the cache.
        scorer: the trusted model; None: no scores.
        examine: whether its statistics are wanted too.
        cache: what was computed before; None: nothing.
        threads: that compute.
        memory_bytes: limit of the tokens that are kept between the two sweeps, and the same limit for 6-grams and for terms.
    """

    def __init__(
        self,
        reader: TokenReader,
        counts: NgramCounts | None,
        terms: TfIdf | None,
        scorer: TokenScorer | None,
        examine: bool,
        cache: CorpusCache | None,
        threads: int,
        memory_bytes: int,
    ) -> None:
        self.reader, self.counts, self.terms, self.scorer, self.examine = reader, counts, terms, scorer, examine
        self.cache, self.threads, self.memory_bytes = cache, threads, memory_bytes
        self.files = self._files()

    def drop(self, ids: IntArray) -> None:
        """Subtract the 6-grams of the samples ``ids`` from the counts."""
        counts = self.counts
        if counts is None:
            return

        def known(part: IntArray) -> IntArray:
            found, grams = read_grams(self.files.grams, part, counts.sampling)
            counts.drop(grams)
            return part[~found]

        parts = [ids[start : start + KNOWN] for start in range(0, len(ids), KNOWN)]
        unknown = list(in_order(known, parts, self.threads)) if self.files.grams is not None else parts
        rest = np.concatenate([np.empty(0, np.int64), *unknown])
        for _ in in_order(lambda part: counts.drop(TokenBlock.of(*part)), self.reader.rows(rest), self.threads):
            pass

    def run(self, ids: IntArray, dim: int, allreduce: Allreduce) -> Result:
        """Compute the features of the samples ``ids`` (n,).  Collective: the counts are summed over the ranks.

        Args:
            dim: width of the vectors.
        """
        n, read_before = len(ids), self.reader.seconds
        wide = n if self.scorer is not None and self.examine else 0
        result = Result(
            np.zeros(n, np.float32),
            np.empty(n if self.scorer is not None else 0, np.float32),
            np.empty((wide, STATISTICS), np.float32),
            np.empty((n if self.terms is not None else 0, dim), np.float32),
        )
        memory = Memory(self.memory_bytes)
        lacking = self._recall(ids, result, memory)
        self._compute(ids, lacking, result, memory)
        if self.counts is not None:
            self.counts.reduce(allreduce)
        if self.terms is not None:
            self.terms.reduce(allreduce)
        self.files = self._files()  # those of the vectors are known by the weights of the terms
        tried = some(ids, TRIED, int(allreduce(np.array([n], np.int64))[0]))
        chances = self._second(ids, tried, result, memory)
        once, copied = allreduce(chances).tolist()
        result.density_ratio = copied / once if once else math.nan
        result.seconds["read"] += self.reader.seconds - read_before
        return result

    def _files(self) -> Files:
        if self.cache is None:
            return Files()
        return Files(
            self.cache.scores(self.scorer.digest()) if self.scorer is not None else None,
            self.cache.grams(self.counts.sampling) if self.counts is not None else None,
            self.cache.vectors(self.terms.dim, self.terms.seed, self.terms.totals)
            if self.terms is not None and len(self.terms.totals)
            else None,
        )

    def _recall(self, ids: IntArray, result: Result, memory: Memory) -> _Lacking:
        """Take what the cache holds; return what is still lacking."""
        n, sampling = len(ids), self.counts.sampling if self.counts is not None else None
        wants = [self.scorer is not None, self.counts is not None, self.terms is not None]
        lacking = _Lacking(*(np.full(n, wanted) for wanted in wants))
        if self.files == Files():
            return lacking

        def known(positions: IntArray) -> _Found:
            began, part = time.perf_counter(), ids[positions]
            has_scores, scores = read_scores(self.files.scores if wants[0] else None, part, self.examine)
            has_grams, grams = np.zeros(len(part), np.bool_), None
            if sampling is not None:
                has_grams, grams = read_grams(self.files.grams, part, sampling)
                assert self.counts is not None
                self.counts.add(grams)
                grams = grams.narrow()
            has_vectors, vectors = read_vectors(self.files.vectors if wants[2] else None, part, result.vectors.shape[1])
            kept = Kept(positions[has_grams], grams, np.empty(0, np.int64), None)
            memory.keep(kept, None)
            seconds = {"read": time.perf_counter() - began}
            return _Found(kept, positions[has_scores], scores, positions[has_vectors], vectors, seconds)

        for found in in_order(known, (np.arange(a, min(a + KNOWN, n)) for a in range(0, n, KNOWN)), self.threads):
            self._take(found, result)
            lacking.scores[found.scored] = False
            lacking.grams[found.kept.counted] = False
            lacking.vectors[found.placed] = False
        return lacking

    def _compute(self, ids: IntArray, lacking: _Lacking, result: Result, memory: Memory) -> None:
        """Compute what is lacking from the tokens."""
        places = np.flatnonzero(lacking.any)

        def work(part: tuple[IntArray, list[IntArray]]) -> _Found:
            positions, rows = part
            block = TokenBlock.of(positions, rows)
            found = self._first(positions, block, lacking, result.vectors.shape[1])
            memory.keep(found.kept, block)
            return found

        def parts() -> Iterator[tuple[IntArray, list[IntArray]]]:
            start = 0
            for part, rows in self.reader.rows(ids[places]):
                yield places[start : start + len(part)], rows
                start += len(part)

        for found in in_order(work, parts(), self.threads):
            write_scores(self.files.scores, ids[found.scored], found.scores)
            if found.kept.grams is not None:
                write_grams(self.files.grams, ids[found.kept.counted], found.kept.grams)
            self._take(found, result)
        self.files.flush()

    def _first(self, positions: IntArray, block: TokenBlock, lacking: _Lacking, dim: int) -> _Found:
        """Compute scores, 6-grams and terms of a block, and count the latter two."""
        began = time.perf_counter()
        grams = None
        counted = positions[lacking.grams[positions]]
        if self.counts is not None and len(counted):
            grams = self.counts.grams(_lacking_of(block, lacking.grams[positions]))
            self.counts.add(grams)
            grams = grams.narrow()  # here, not by the thread that keeps it: that one must read for all
        at_grams = time.perf_counter()
        terms = None
        placed = positions[lacking.vectors[positions]]
        if self.terms is not None and len(placed):
            part = _lacking_of(block, lacking.vectors[positions])
            terms = Terms.of(part) if len(self.terms.totals) else self.terms.add(part)
        at_terms = time.perf_counter()
        scored = positions[lacking.scores[positions]]
        scores = Scores(np.empty(0, np.float32), None)
        if self.scorer is not None and len(scored):
            part = _lacking_of(block, lacking.scores[positions])
            if self.examine:
                scores = Scores(*self.scorer.examine(part.flat, part.offsets))  # type: ignore[arg-type]
            else:
                scores = Scores(self.scorer.quality(part.flat, part.offsets), None)  # type: ignore[arg-type]
        seconds = {"density": at_grams - began, "tfidf": at_terms - at_grams, "quality": time.perf_counter() - at_terms}
        none = np.empty(0, np.int64)
        return _Found(Kept(counted, grams, placed, terms), scored, scores, none, np.empty((0, dim), np.float32), seconds)

    def _take(self, found: _Found, result: Result) -> None:
        """Put what was found into the result."""
        if self.scorer is not None:
            result.quality[found.scored] = found.scores.quality
            if found.scores.statistics is not None:
                result.statistics[found.scored] = found.scores.statistics
        if len(found.placed):
            result.vectors[found.placed] = found.vectors
        _add(result.seconds, found.seconds)

    def _second(self, ids: IntArray, tried: Bools, result: Result, memory: Memory) -> IntArray:
        """Fill in densities and vectors; return the summed chances of this rank's tried samples, (2,) int64."""
        chances = np.zeros(2, np.int64)

        def parts() -> Iterator[tuple[Kept, TokenBlock | None]]:
            for kept in memory.kept:
                yield kept, self._tokens_for(kept, ids)

        for kept, density, vectors, tests, seconds in in_order(lambda part: self._read_off(*part, tried), parts(), self.threads):
            if density is not None:
                result.density[kept.counted] = density
            if vectors is not None:
                result.vectors[kept.placed] = vectors
                write_vectors(self.files.vectors, ids[kept.placed], vectors)
            chances += tests
            _add(result.seconds, seconds)
        self.files.flush()
        return chances

    def _tokens_for(self, kept: Kept, ids: IntArray) -> TokenBlock | None:
        """Return the tokens of what was not kept in memory, in the order of ``kept.needed``; None if nothing must be read.

        6-grams that the cache still holds are put into ``kept``.
        """
        if self.counts is not None and kept.grams is None and len(kept.counted) and self.files.grams is not None:
            found, grams = read_grams(self.files.grams, ids[kept.counted], self.counts.sampling)
            if found.all():
                kept.grams = grams
        needed = kept.needed
        if not len(needed) or kept.tokens is not None:  # kept tokens are widened by the thread that needs them
            return None
        return self.reader.all(ids[needed])

    def _read_off(self, kept: Kept, block: TokenBlock | None, tried: Bools) -> Any:
        """Return ``kept``, densities and vectors of its samples (None: it has none), tests of the counts, and seconds."""
        began = time.perf_counter()
        density, vectors, chances = None, None, np.zeros(2, np.int64)
        needed = kept.needed
        if kept.tokens is not None:
            block = kept.block()
        if self.counts is not None and len(kept.counted):
            grams = kept.grams
            if grams is None:
                assert block is not None
                grams = self.counts.grams(_lacking_of(block, np.isin(needed, kept.counted, assume_unique=True)))
            density = self.counts.degree(grams)
            selected = tried[kept.counted]
            if selected.any():
                # Integers, so that the order of adding does not matter.
                chances = np.rint(self.counts.tried(grams.take(selected)) * 2.0**32).astype(np.int64).sum(0)
        between = time.perf_counter()
        if self.terms is not None and len(kept.placed):
            terms = kept.terms
            if terms is None:
                assert block is not None
                terms = Terms.of(_lacking_of(block, np.isin(needed, kept.placed, assume_unique=True)))
            vectors = self.terms.vectors(len(kept.placed), terms)
        kept.forget()
        return kept, density, vectors, chances, {"density": between - began, "tfidf": time.perf_counter() - between}


def _lacking_of(block: TokenBlock, selected: Array) -> TokenBlock:
    return block if selected.all() else block.take(selected)


def _add(seconds: dict[str, float], more: dict[str, float]) -> None:
    for name, value in more.items():
        seconds[name] += value
