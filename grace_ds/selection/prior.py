"""The prior: which samples look like the trusted set, by a bigram model of it, and how all parts join to one log p.

The model is fitted on trusted sequences only, with hashed bigram counts c(a, b):

    p(b | a) = (c(a, b) + 4 p(b)) / (c(a) + 4)        p(b) = (c(b) + .5) / (n + .5 V)

A sample's score is its mean log p(b | a).  What score is normal is learned from the trusted sequences themselves, each
scored by the model of all the others, never from the pool: quantiles of the pool turn round once junk prevails in it.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from grace_ds.errors import DataError
from grace_ds.records import Array, IntArray

log = logging.getLogger(__name__)

Float64Array = npt.NDArray[np.float64]

BITS = 18
BACKOFF = 4.0  # pseudo-counts of the unigram model behind a bigram
FLOOR = 0.02  # what a filter leaves of a rejected sample, so that none is excluded for good
CUT, SOFTNESS = -1.5, 0.2  # the trusted filter's threshold and width, in robust deviations
ALIGN_CUT, ALIGN_SOFTNESS = 0.5, 0.12  # the same for alignment, in trusted medians
MIN_TRUSTED = 64
MIN_SPREAD = 0.01  # nats per token, below which the trusted scores say nothing about their spread
MAD_TO_DEVIATION = 1.4826
LOSS_BASE = 0.3  # a sample of the lowest loss keeps 0.3 / 1.3 of the highest's chance
_LEFT = np.uint64(0x9E3779B97F4A7C15)
_RIGHT = np.uint64(0xC2B2AE3D27D4EB4F)
_FINISH = np.uint64(0xBF58476D1CE4E5B9)


@dataclass(frozen=True)
class BigramPrior:
    """A fitted trusted model with its calibration; equal on every rank that fits it to the same sequences.

    Attributes:
        bigrams: (2^18,) int64, hashed bigram counts.
        contexts: (V + 1,) int64, how often a token stands left in a bigram; the last entry is for unknown tokens.
        unigrams: (V + 1,) int64, token counts, likewise.
        vocab: V.
        median: of the leave-one-out scores of the trusted sequences, nats per token.
        deviation: their robust standard deviation, nats per token.
    """

    bigrams: IntArray
    contexts: IntArray
    unigrams: IntArray
    vocab: int
    median: float
    deviation: float

    @staticmethod
    def fit(flat: IntArray, offsets: IntArray, vocab: int = 0) -> BigramPrior:
        """Fits to the trusted sequences ``flat[offsets[i]:offsets[i + 1]]`` and calibrates by leaving each out in turn.

        Args:
            flat: (total,) int64, token ids.
            offsets: (n + 1,) int64.
            vocab: size of the vocabulary; raised to the largest trusted token + 1 where that is more.

        Raises:
            DataError: fewer than 2 sequences with at least 2 tokens, or negative token ids.
        """
        usable = int((np.diff(offsets) >= 2).sum())
        if usable < 2:
            raise DataError(
                f"{usable} trusted sequence(s) of at least 2 tokens: the threshold is learned by leaving one out, "
                f"which takes 2 at the least and {MIN_TRUSTED} to be steady; give more, or set selection.prior: false"
            )
        if int(flat.min()) < 0:
            raise DataError(f"trusted token id {int(flat.min())} is negative: give ids of the job's own tokenizer")
        if usable < MIN_TRUSTED:
            log.warning(
                "only %d trusted sequences (at least %d are advised): the filter's threshold rests on their spread, "
                "which so few do not show; expect good samples to be dropped or junk to pass",
                usable,
                MIN_TRUSTED,
            )
        vocab = max(vocab, int(flat.max()) + 1)
        left, _, code, _ = _bigrams(flat, offsets, vocab)
        counted = BigramPrior(
            bigrams=np.bincount(code, minlength=1 << BITS),
            contexts=np.bincount(left, minlength=vocab + 1),
            unigrams=np.bincount(flat, minlength=vocab + 1),
            vocab=vocab,
            median=0.0,
            deviation=1.0,
        )
        median, deviation = _location(counted.leave_one_out(flat, offsets))
        return replace(counted, median=median, deviation=deviation)

    @cached_property
    def _tables(self) -> tuple[Float64Array, Float64Array]:
        """4 p(b) and log(c(a) + 4), (V + 1,) each."""
        unigram = (self.unigrams + 0.5) / (self.unigrams.sum() + 0.5 * self.vocab)
        return BACKOFF * unigram, np.log(self.contexts + BACKOFF)

    def score(self, flat: IntArray, offsets: IntArray) -> Float64Array:
        """(n,) float64: mean log p(b | a) in nats per token; -inf for samples without a bigram."""
        left, right, code, row = _bigrams(flat, offsets, self.vocab)
        backing, norm = self._tables
        log_p = np.log(self.bigrams[code] + backing[right])
        log_p -= norm[left]
        return _row_mean(log_p, row, len(offsets) - 1)

    def leave_one_out(self, flat: IntArray, offsets: IntArray) -> Float64Array:
        """(n,) float64: each of the model's own sequences, scored as if the model had been fitted without it."""
        n = len(offsets) - 1
        left, right, code, row = _bigrams(flat, offsets, self.vocab)
        lengths = np.diff(offsets)
        tokens = np.minimum(flat.view(np.uint64), np.uint64(self.vocab)).astype(np.int64)
        token_row = np.repeat(np.arange(n), lengths)
        pairs = self.bigrams[code] - _own(code, row, code, row)
        contexts = self.contexts[left] - _own(left, row, left, row)
        unigrams = self.unigrams[right] - _own(tokens, token_row, right, row)
        total = self.unigrams.sum() - lengths[row]
        backing = BACKOFF * (unigrams + 0.5) / (total + 0.5 * self.vocab)
        return _row_mean(np.log((pairs + backing) / (contexts + BACKOFF)), row, n)

    def keep(self, flat: IntArray, offsets: IntArray) -> Float64Array:
        """(n,) float64 in [0.02, 1]: pass of the trusted filter; samples without a bigram get the floor."""
        z = (self.score(flat, offsets) - self.median) / self.deviation
        return FLOOR + (1 - FLOOR) * _sigmoid((z - CUT) / SOFTNESS)

    def digest(self) -> str:
        """32 hex digits over the counts and the calibration."""
        h = hashlib.blake2b(np.array([self.median, self.deviation, self.vocab], "<f8").tobytes(), digest_size=16)
        for counts in (self.bigrams, self.contexts, self.unigrams):
            h.update(counts.astype("<i8").tobytes())
        return h.hexdigest()


def _bigrams(flat: IntArray, offsets: IntArray, vocab: int) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Left token, right token, hash bin and sample of every bigram within a sample, each (m,) int64.

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
    return known[:-1][within], known[1:][within], code.view(np.int64)[within], row[1:][within]


def _own(value: IntArray, row: IntArray, asked: IntArray, asked_row: IntArray) -> IntArray:
    """How often ``asked[i]`` stands among the ``value`` of its own row ``asked_row[i]``."""
    span = int(max(value.max(initial=0), asked.max(initial=0))) + 1
    keys, counts = np.unique(row * span + value, return_counts=True)
    found: IntArray = counts[np.searchsorted(keys, asked_row * span + asked)]
    return found


def _row_mean(values: Float64Array, row: IntArray, n: int) -> Float64Array:
    """Mean of each row, added up in the order of ``values`` (bincount does), so that blocking cannot change a bit."""
    total = np.bincount(row, weights=values, minlength=n)
    size = np.bincount(row, minlength=n)
    mean: Float64Array = np.divide(total, size, out=np.full(n, -np.inf), where=size > 0)
    return mean


def robust_location(values: Array) -> tuple[float, float]:
    """Median and robust standard deviation (from the median absolute deviation) of finite ``values`` (n,), n at least 1."""
    median = float(np.median(values))
    return median, MAD_TO_DEVIATION * float(np.median(np.abs(values - median)))


def _location(scores: Float64Array) -> tuple[float, float]:
    """Median and robust standard deviation of the finite scores; the latter at least ``MIN_SPREAD``."""
    median, deviation = robust_location(scores[np.isfinite(scores)])
    if deviation < MIN_SPREAD:
        log.warning(
            "the trusted sequences score almost alike (robust deviation %.3g nats per token, taken as %g): are they "
            "copies of one another? The filter will be as narrow as that",
            deviation,
            MIN_SPREAD,
        )
    return median, max(deviation, MIN_SPREAD)


def _sigmoid(x: Array) -> Float64Array:
    """The logistic function; its argument is clipped where the result is 0 or 1 anyhow."""
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(x, -700.0, 700.0))), np.float64)


def align_keep(align: Array, median: float) -> Float64Array:
    """Pass of the gradient filter.

    Args:
        align: (n,) alignment with the trusted gradient; NaN (nothing known) passes.
        median: median leave-one-out alignment of the trusted samples.  If it is not above 0 the trusted gradients
            contradict one another and nothing can be judged by them: all pass, and the caller says so.

    Returns:
        (n,) float64 in [0.02, 1].
    """
    align = np.asarray(align, np.float64)
    if not median > 0:
        return np.ones(len(align))
    passed = FLOOR + (1 - FLOOR) * _sigmoid((align / median - ALIGN_CUT) / ALIGN_SOFTNESS)
    return np.where(np.isnan(align), 1.0, passed)


def rank01(values: Array) -> Float64Array:
    """(n,) float64: ranks scaled to [0, 1], equal values sharing their mean rank; NaN, and a value alone, get 0.5."""
    values = np.asarray(values, np.float64)
    out = np.full(len(values), 0.5)
    known = np.flatnonzero(~np.isnan(values))
    if len(known) > 1:
        _, inverse, counts = np.unique(values[known], return_inverse=True, return_counts=True)
        last = np.cumsum(counts)
        mean_rank = (last - counts + last - 1) / 2.0
        out[known] = mean_rank[inverse] / (len(known) - 1)
    return out


def combine(
    keep: Array | None,
    density: Array | None,
    loss_rank: Array | None,
    align_keep: Array | None,
    n: int | None = None,
) -> Float64Array:
    """The unnormalised log-probabilities that a coreset is drawn with.

    log p = log keep + log align_keep + log(.3 + loss_rank) - log(1 + density), a part that is None being left out.

    Args:
        keep: (n,) pass of the trusted filter, in (0, 1].
        density: (n,) copies in the pool beyond the sample itself, at least 0.
        loss_rank: (n,) in [0, 1], from :func:`rank01`.
        align_keep: (n,) pass of the gradient filter, in (0, 1].
        n: number of samples; needed only where all parts may be None, which gives zeros (all alike).

    Returns:
        (n,) float64, each row from its own numbers alone.

    Raises:
        ValueError: there is neither a part nor ``n``, or they differ in length.
    """
    parts: list[Float64Array] = []
    for passed in (keep, align_keep):
        if passed is not None:
            parts.append(np.log(np.asarray(passed, np.float64)))
    if loss_rank is not None:
        parts.append(np.log(LOSS_BASE + np.asarray(loss_rank, np.float64)))
    if density is not None:
        parts.append(-np.log(1.0 + np.asarray(density, np.float64)))
    sizes = [len(part) for part in parts] + ([] if n is None else [n])
    if len(set(sizes)) != 1:
        raise ValueError(f"combine needs parts of one length, or n; got lengths {sizes}")
    log_p = np.zeros(sizes[0])
    for part in parts:
        log_p = log_p + part
    return log_p
