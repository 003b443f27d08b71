"""Choose a substitute for a trusted set: the most typical samples of a draw from the pool.

Each sample is scored by a bigram model of the others.  Junk is unlike everything, including other junk, and copies are too
similar to each other.  The samples between, above the median and below the top tenth, are taken.  This is a vote of the pool
about itself, one vote per sample independent of length.  It works while good text is the majority, and knows nothing that the
pool does not contain.

A vote between two kinds of text that are each like themselves (prose and tables, say) may be close.  So two models are
fitted, each to the samples that the other explains worse.  If two predict clearly better than one, the pool has two kinds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from grace_ds.data.tokens import BREAK
from grace_ds.features.quality import held_out_statistics, likelihoods
from grace_ds.records import IntArray

LOOKED_AT = 4096  # samples scored
TAKEN = 384  # maximum samples taken
BAND = (0.5, 0.9)  # quantiles of the score between which samples are typical
LEAST = 64  # minimum samples for a vote
SEARCHED, BEGINNING = 1024, 128  # samples, and tokens of each, in which two kinds are searched for
ROUNDS = 6  # of fitting two models and dividing the samples between them
SETTLED = 0.995  # stop when more than this share of the samples did not change in a round
APART = 0.12  # nats per token by which two models must predict samples better than one
CLOSE = 0.25  # minimum share at which a smaller kind is left out and reported

Kinds = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Typical:
    """The typical samples found.

    Attributes:
        positions: (m,) int64, sorted, of at most 384 typical samples; empty if there was no vote.
        smaller: share of the samples that are of the smaller of two kinds; 0 if there is no second kind, or hardly any of it.
        among: share of the typical samples that are of that kind.
    """

    positions: IntArray
    smaller: float = 0.0
    among: float = 0.0


def typical(flat: IntArray, offsets: IntArray) -> Typical:
    """Return the typical samples among ``flat[offsets[i]:offsets[i + 1]]``; none below 64 samples.

    Samples without a bigram, or with a negative token id (no trusted sample may have one), are never taken.  If there are two
    kinds and samples have different lengths, only the larger kind is used.
    """
    negative = np.concatenate([[0], np.cumsum((flat < 0) & (flat != BREAK))])
    usable = np.flatnonzero((np.diff(offsets) >= 2) & (negative[offsets[1:]] == negative[offsets[:-1]]))
    if len(usable) < LEAST:
        return Typical(np.empty(0, np.int64))
    rows = [flat[offsets[i] : offsets[i + 1]] for i in usable]
    vocab = int(flat.max()) + 1
    statistics = held_out_statistics(rows, vocab, even=True)
    is_smaller = _smaller_kind(rows, statistics, vocab)
    share = float(is_smaller.mean())
    # If all samples have one length, votes are proportional to tokens, and measurements showed that the result is good.
    votes = np.flatnonzero(~is_smaller) if share >= CLOSE and len(set(map(len, rows))) > 1 else np.arange(len(rows))
    order = votes[np.argsort(statistics[votes, 0], kind="stable")]
    band = order[int(BAND[0] * len(order)) : int(BAND[1] * len(order))]
    positions = np.linspace(0, len(band) - 1, min(TAKEN, len(band))).astype(np.int64)
    chosen = np.sort(band[np.unique(positions)])
    close = share >= CLOSE
    return Typical(usable[chosen], share if close else 0.0, float(is_smaller[chosen].mean()) if close else 0.0)


def _smaller_kind(rows: list[IntArray], statistics: npt.NDArray[np.float64], vocab: int) -> Kinds:
    """Return which samples are of the smaller of two kinds, (n,) bool; none if two models are hardly better than one."""
    step = -(-len(rows) // SEARCHED)
    beginnings = [row[:BEGINNING] for row in rows]
    sampled, none = beginnings[::step], np.zeros(len(rows), np.bool_)
    half = np.arange(len(sampled)) % 2 == 0
    single = np.empty(len(sampled))
    for judged in (half, ~half):
        single[judged] = likelihoods(sampled, none[: len(sampled)], judged, vocab)[:, 0]
    best, kinds = APART, none[: len(sampled)]
    for start in (*statistics[::step, :3].T, np.array(list(map(len, rows[::step])))):
        division, likelihood = _divided(sampled, start <= np.median(start), half, vocab)
        if (gain := float((likelihood - single).mean())) > best:
            best, kinds = gain, division
    if not kinds.any():
        return none
    is_smaller = none.copy()
    is_smaller[::step] = kinds
    others = np.arange(len(rows)) % step != 0
    if others.any():
        scores = likelihoods(beginnings, is_smaller.copy(), others, vocab)
        is_smaller[others] = scores[:, 1] > scores[:, 0]
    smaller: Kinds = is_smaller if is_smaller.mean() <= 0.5 else ~is_smaller
    return smaller


def _divided(rows: list[IntArray], kinds: Kinds, half: Kinds, vocab: int) -> tuple[Kinds, npt.NDArray[np.float64]]:
    """Divide ``rows`` between two models.

    Each half is divided by the models of the other half, in turn, so that both halves number the kinds the same way.

    Returns:
        (n,) bool division, and (n,) float64 likelihoods by the better model; -inf if one kind is empty.
    """
    kinds, likelihood = kinds.copy(), np.full(len(rows), -np.inf)
    for _ in range(ROUNDS):
        before = kinds.copy()
        for judged in (half, ~half):
            if kinds[~judged].all() or not kinds[~judged].any():
                return kinds, np.full(len(rows), -np.inf)
            scores = likelihoods(rows, kinds, judged, vocab)
            kinds[judged], likelihood[judged] = scores[:, 1] > scores[:, 0], scores.max(1)
        if (before == kinds).mean() > SETTLED:
            break
    return kinds, likelihood
