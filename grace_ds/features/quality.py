"""Score how well samples resemble the trusted set, by a bigram model of it.

The model is fitted on trusted sequences only, with hashed bigram counts c(a, b):

    p(b | a) = (c(a, b) + 4 p(b)) / (c(a) + 4)        p(b) = (c(b) + .5) / (n + .5 V)

A sample's score is its mean log p(b | a).  It passes if neither the score is too low, nor its share of distinct tokens too
low (columns of numbers) or too high (words drawn at random): :mod:`grace_ds.features.limits`.  The limits are learned from
the trusted sequences themselves, each quarter of them scored by the model of the other three, never from the pool: quantiles
of the pool fail once junk is the majority in it.  Quarters are contiguous, because neighbours in a file often come from one
document.  Left out one by one, each would be scored by a model that has read the rest of its document, and half of the good
pool would fail that standard.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from grace_ds.data.tokens import BREAK
from grace_ds.errors import DataError
from grace_ds.features.limits import MIN_SPREAD, Limits
from grace_ds.records import Array, FloatArray, IntArray

log = logging.getLogger(__name__)

Float64Array = npt.NDArray[np.float64]

BITS = 18
BACKOFF = 4.0  # pseudo-counts of the unigram model behind a bigram
FOLDS = 4
MIN_TRUSTED = 64
MAD_TO_DEVIATION = 1.4826
STATISTICS = 5
SCORE, DISTINCT = 0, 4  # statistics that have limits
SIDES = ((SCORE, -1), (DISTINCT, -1), (DISTINCT, 1))
NOTHING = np.iinfo(np.int32).max  # padding of a stretch: tokens below it are sorted as int32
STRETCH = 64  # tokens over which distinct ones are counted: the share of new tokens falls with the length of a text
DENSE = 1 << 20  # largest vocabulary counted in arrays of its own length; beyond it only occurring tokens are counted
CLIP = 6.0  # robust deviations at which a statistic saturates
_LEFT = np.uint64(0x9E3779B97F4A7C15)
_RIGHT = np.uint64(0xC2B2AE3D27D4EB4F)
_FINISH = np.uint64(0xBF58476D1CE4E5B9)


@dataclass(frozen=True)
class QualityModel:
    """A fitted trusted model with its calibration; equal on every rank that fits it to the same sequences.

    A stray id (a hash, a sentinel) must not make arrays of its own size: beyond ``DENSE`` only occurring ids are counted.

    Attributes:
        bigrams: (2^18,) int64, hashed bigram counts; float64 if sequences have weights.
        contexts: (k + 1,) likewise, counts of a token as the left one of a bigram; the last entry is for all other tokens.
        unigrams: (k + 1,) likewise, token counts.
        vocab: V; all ids from V on are one unknown token.
        centre: (5,) float64, medians of the statistics of held-out trusted sequences; the first one's unit is nats per token.
        deviation: (5,) float64, their robust standard deviations.
        limits: of the statistics in ``SIDES``.
        held_out: (n, 5) float32, :meth:`statistics` of the trusted sequences, each while held out.
        tokens: (k,) int64, sorted, the counted ids; None: all k = V of them.
    """

    bigrams: Array
    contexts: Array
    unigrams: Array
    vocab: int
    centre: Float64Array
    deviation: Float64Array
    limits: Limits
    held_out: FloatArray
    tokens: IntArray | None = None

    @staticmethod
    def fit(flat: IntArray, offsets: IntArray, vocab: int = 0) -> QualityModel:
        """Fit to the trusted sequences ``flat[offsets[i]:offsets[i + 1]]`` and calibrate on held-out quarters of them.

        Args:
            flat: (total,) int64, token ids.
            offsets: (n + 1,) int64.
            vocab: size of the vocabulary; raised to the largest trusted token + 1 if that is more.

        Raises:
            DataError: fewer than 2 sequences with at least 2 tokens, or negative token ids.
        """
        rows = [row for row in (flat[a:b] for a, b in pairwise(offsets)) if _has_bigram(row)]
        usable = len(rows)
        if usable < 2:
            raise DataError(
                f"{usable} trusted sequence(s) of at least 2 tokens: the threshold is learned from held-out ones, which "
                f"takes 2 at the least and {MIN_TRUSTED} to be steady; give more, or set recipe: density"
            )
        if int(flat[flat != BREAK].min(initial=0)) < 0:
            raise DataError(f"trusted token id {int(flat[flat != BREAK].min())} is negative: give ids of the job's own tokenizer")
        if usable < MIN_TRUSTED:
            log.warning(
                "only %d trusted sequences (at least %d are advised): the filter's threshold rests on their spread, "
                "which so few do not show; expect good samples to be dropped or junk to pass",
                usable,
                MIN_TRUSTED,
            )
        vocab = max(vocab, int(flat.max()) + 1)
        raw = held_out_statistics(rows, vocab)
        centre, deviation = _location(raw)
        counted = _count(flat, offsets, vocab)
        fitted = replace(counted, centre=centre, deviation=deviation, limits=Limits.fit(raw, SIDES))
        return replace(fitted, held_out=fitted._standard(raw))

    @cached_property
    def _tables(self) -> tuple[Float64Array, Float64Array, Float64Array, Float64Array]:
        """Tables of c(a, b), (2^18,), and of 4 p(b), log p(b) and log(c(a) + 4), (k + 1,) each; float64."""
        kinds = len(self.unigrams) - 1
        unigram = (self.unigrams + 0.5) / (self.unigrams.sum() + 0.5 * kinds)
        return np.asarray(self.bigrams, np.float64), BACKOFF * unigram, np.log(unigram), np.log(self.contexts + BACKOFF)

    def likelihood(self, flat: IntArray, offsets: IntArray) -> Float64Array:
        """Return the mean log p(b | a) + log p(b) in nats per token, (n,) float64; -inf for samples without a bigram.

        The second term separates kinds of text that have few tokens in common: one bigram model could hold both without loss.
        """
        left, right, code, row = _bigrams(flat, offsets, self.vocab)
        entries = self._at(right)
        log_p, _ = self._log_p(left, entries, code)
        return _RowMean(row, len(offsets) - 1).of(log_p + self._tables[2][entries])

    def _at(self, token: IntArray) -> IntArray:
        """Return the table entries of ``token`` (m,), (m,) int64."""
        return token if self.tokens is None else _entries(token, self.tokens)

    def _log_p(self, left: IntArray, right_at: IntArray, code: IntArray) -> tuple[Float64Array, Float64Array]:
        """Return log p(b | a) and c(a, b) of every bigram, (m,) each."""
        bigrams, backoff, _, norm = self._tables
        count: Float64Array = bigrams[code]
        log_p = backoff[right_at]
        log_p += count
        np.log(log_p, out=log_p)
        log_p -= norm[self._at(left)]
        return log_p, count

    def raw_statistics(self, flat: IntArray, offsets: IntArray) -> Float64Array:
        """Return the model's statistics of each sample, (n, 5) float64; -inf for samples without a bigram.

        Mean log p(b | a) (the score), its standard deviation within the sample, mean log p(b), share of bigrams that
        the trusted set has, share of right-hand tokens that are the first of their kind in their stretch of 64.
        """
        n = len(offsets) - 1
        left, right, code, row = _bigrams(flat, offsets, self.vocab)
        entries, rows = self._at(right), _RowMean(row, n)
        log_p, count = self._log_p(left, entries, code)
        mean = rows.of(log_p)
        log_p -= np.repeat(mean, rows.sizes)
        square = rows.of(np.square(log_p, out=log_p))
        common, seen = rows.of(self._tables[2][entries]), rows.of(count > 0)
        return np.stack([mean, np.sqrt(np.maximum(square, 0.0)), common, seen, _distinct(right, rows.sizes)], 1)

    def quality(self, flat: IntArray, offsets: IntArray) -> Float64Array:
        """Return the pass of the trusted filter, (n,) float64 in [0.02, 1]; samples without a bigram get the minimum."""
        left, right, code, row = _bigrams(flat, offsets, self.vocab)
        raw = np.zeros((len(offsets) - 1, STATISTICS))
        rows = _RowMean(row, len(raw))
        raw[:, SCORE] = rows.of(self._log_p(left, self._at(right), code)[0])
        raw[:, DISTINCT] = _distinct(right, rows.sizes)
        return self.limits.quality(raw)

    def examine(self, flat: IntArray, offsets: IntArray) -> tuple[Float64Array, FloatArray]:
        """Return :meth:`quality`, and the raw statistics in robust deviations from held-out trusted sequences.

        Returns:
            (n,) float64 in [0.02, 1]; (n, 5) float32 in [-6, 6].
        """
        raw = self.raw_statistics(flat, offsets)
        return self.limits.quality(raw), self._standard(raw)

    def _standard(self, raw: Float64Array) -> FloatArray:
        return np.asarray(np.clip((raw - self.centre) / self.deviation, -CLIP, CLIP), np.float32)

    def digest(self) -> str:
        """Return 32 hex digits over the counts and the calibration."""
        calibration = [*self.centre, *self.deviation, *self.limits.middle, *self.limits.deviation, self.limits.cut]
        digest = hashlib.blake2b(np.array([self.vocab, *calibration], "<f8").tobytes(), digest_size=16)
        for counts in (self.bigrams, self.contexts, self.unigrams):
            digest.update(counts.astype("<i8").tobytes())
        if self.tokens is not None:
            digest.update(self.tokens.astype("<i8").tobytes())
        return digest.hexdigest()


def _count(flat: IntArray, offsets: IntArray, vocab: int, even: bool = False) -> QualityModel:
    """Return the model of these sequences, not calibrated.

    Args:
        flat, offsets: sequence i is ``flat[offsets[i]:offsets[i + 1]]``.
        vocab: size of the vocabulary.
        even: give all sequences the same weight, independent of length.
    """
    left, _, code, row = _bigrams(flat, offsets, vocab)
    sizes, real = np.diff(offsets), flat != BREAK
    of_row = np.repeat(np.arange(len(sizes)), sizes)
    if not real.all():
        flat, of_row = flat[real], of_row[real]
    tokens = None if vocab <= DENSE else np.unique(flat)
    size, of_token, of_bigram = vocab, None, None
    if tokens is not None:
        size, left, flat = len(tokens), _entries(left, tokens), _entries(flat, tokens)
    if even:
        weight = sizes.mean() / np.maximum(sizes, 1)  # 1 if all have one length: the counts are then the same as without weights
        of_token, of_bigram = weight[of_row], weight[row]
    return QualityModel(
        bigrams=np.bincount(code, of_bigram, 1 << BITS),
        contexts=np.bincount(left, of_bigram, size + 1),
        unigrams=np.bincount(flat, of_token, size + 1),
        vocab=vocab,
        centre=np.zeros(STATISTICS),
        deviation=np.ones(STATISTICS),
        limits=Limits((), (), (), 0.0),
        held_out=np.empty((0, STATISTICS), np.float32),
        tokens=tokens,
    )


def _has_bigram(row: IntArray) -> bool:
    real = row != BREAK
    return bool((real[1:] & real[:-1]).any())


def _entries(token: IntArray, tokens: IntArray) -> IntArray:
    """Return the position in the sorted ``tokens`` (k,) of each of ``token`` (m,), (m,) int64; k if it is not there."""
    position = np.searchsorted(tokens, token)
    known: IntArray = np.where(tokens[np.minimum(position, len(tokens) - 1)] == token, position, len(tokens))
    return known


def held_out_statistics(rows: list[IntArray], vocab: int, even: bool = False) -> Float64Array:
    """Return the raw statistics of ``rows`` (at least 2), every quarter scored by the model of the rest, (n, 5) float64.

    Args:
        rows: token sequences.
        vocab: size of the vocabulary.
        even: whether all other rows have the same weight in the model, independent of length.
    """
    statistics = []
    for part in np.array_split(np.arange(len(rows)), min(FOLDS, len(rows))):
        held_out, rest = _join(rows[part[0] : part[-1] + 1]), _join(rows[: part[0]] + rows[part[-1] + 1 :])
        statistics.append(_count(*rest, vocab, even).raw_statistics(*held_out))
    return np.concatenate(statistics)


def likelihoods(
    rows: list[IntArray], kinds: npt.NDArray[np.bool_], judged_rows: npt.NDArray[np.bool_], vocab: int
) -> Float64Array:
    """Score the selected rows by two models of all other rows; return :meth:`QualityModel.likelihood` of each, (m, 2) float64.

    The first model is of the other rows that are not of ``kinds``, the second of those that are; all rows of a model have the
    same weight.

    Args:
        rows: (n) sequences of at least 2 tokens.
        kinds: (n,) bool.
        judged_rows: (n,) bool, the selected rows.
        vocab: size of the vocabulary.
    """
    judged = _join([rows[i] for i in np.flatnonzero(judged_rows)])
    scores = np.full((int(judged_rows.sum()), 2), -np.inf)
    for column, kind in enumerate((~kinds, kinds)):
        rest = np.flatnonzero(kind & ~judged_rows)
        if len(rest):
            scores[:, column] = _count(*_join([rows[i] for i in rest]), vocab, even=True).likelihood(*judged)
    return scores


def _location(raw: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Return (5,) medians and robust deviations of (n, 5) statistics; the deviations are at least ``MIN_SPREAD``."""
    location = [robust_location(column) for column in raw.T]
    centre, deviation = (np.array(side) for side in zip(*location, strict=True))
    if deviation[0] < MIN_SPREAD:
        log.warning(
            "the trusted sequences score almost alike (robust deviation %.3g nats per token, taken as %g): are they "
            "copies of one another? The filter will be as narrow as that",
            deviation[0],
            MIN_SPREAD,
        )
    return centre, np.maximum(deviation, MIN_SPREAD)


def _join(rows: list[IntArray]) -> tuple[IntArray, IntArray]:
    return np.concatenate(rows), np.cumsum([0, *map(len, rows)]).astype(np.int64)


def _bigrams(flat: IntArray, offsets: IntArray, vocab: int) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Return left token, right token, hash bin and sample of every bigram within a document, each (m,) int64.

    Tokens outside of the vocabulary (negative ones too) are returned as ``vocab``, but hashed as they are.
    """
    row = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    token = np.ascontiguousarray(flat, np.int64).view(np.uint64)
    code = token[:-1] * _LEFT
    code += token[1:] * _RIGHT
    code ^= code >> np.uint64(32)
    code *= _FINISH
    code >>= np.uint64(64 - BITS)
    known = np.minimum(token, np.uint64(vocab)).view(np.int64)
    within = row[1:] == row[:-1]
    breaks = flat == BREAK
    if breaks.any():
        within &= ~(breaks[1:] | breaks[:-1])
    return known[:-1][within], known[1:][within], code.view(np.int64)[within], row[1:][within]


def _distinct(token: IntArray, sizes: IntArray) -> Float64Array:
    """Return the share of each sample's tokens that are the first of their kind in a stretch of 64, (n,) float64.

    -inf without tokens.

    Args:
        token: (m,) tokens, sample after sample.
        sizes: (n,) int64, tokens of each sample.
    """
    stretches = -(-sizes // STRETCH)
    starts = (np.cumsum(stretches) - stretches) * STRETCH
    cell = np.arange(len(token)) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
    dtype = np.int32 if int(token.max(initial=0)) < NOTHING else np.int64
    grid = np.full(
        (int(stretches.sum()), STRETCH), np.iinfo(dtype).max, dtype
    )  # one stretch per row, the last one of a sample padded
    grid.reshape(-1)[cell] = token
    grid.sort(axis=1)
    distinct = (grid[:, 1:] != grid[:, :-1]).sum(1) + (grid[:, -1] != np.iinfo(dtype).max)
    total = np.bincount(np.repeat(np.arange(len(sizes)), stretches), weights=distinct, minlength=len(sizes))
    share: Float64Array = np.divide(total, sizes, out=np.full(len(sizes), -np.inf), where=sizes > 0)
    return share


class _RowMean:
    """Means of rows, summed in the order of the values (as bincount does), so that blocking cannot change a bit.

    Args:
        row: (m,) int64, ascending, the row of each value.
        n: number of rows.

    Attributes:
        sizes: (n,) int64, values of each row.
    """

    def __init__(self, row: IntArray, n: int) -> None:
        self._row, self._n = row, n
        self.sizes = np.bincount(row, minlength=n)

    def of(self, values: Array) -> Float64Array:
        """Return the mean of each row of ``values`` (m,), (n,) float64; -inf for rows without values."""
        total = np.bincount(self._row, weights=values, minlength=self._n)
        mean: Float64Array = np.divide(total, self.sizes, out=np.full(self._n, -np.inf), where=self.sizes > 0)
        return mean


def robust_location(values: Array) -> tuple[float, float]:
    """Return the median and the robust standard deviation of finite ``values`` (n,), n at least 1.

    The deviation comes from the median absolute deviation.
    """
    median = float(np.median(values))
    return median, MAD_TO_DEVIATION * float(np.median(np.abs(values - median)))
