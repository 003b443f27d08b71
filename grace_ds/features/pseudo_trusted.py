"""A stand-in for a trusted set: the most typical samples of a draw from the pool.

Each sample is scored by a bigram model of the others; junk is unlike everything, itself included, and copies are too like
each other.  What lies between, above the median and below the top tenth, is taken.  This is a vote of the pool about
itself, a sample a vote, however long: it holds while good text is the majority, and knows nothing that the pool does not.

A vote between two kinds of text that are each like themselves (prose and tables, say) may be close.  So two models are
fitted, each to the samples that the other explains worse, and where two say clearly more than one the pool is known to
have two kinds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from grace_ds.features.quality import held_out_statistics, likelihoods
from grace_ds.records import IntArray

LOOKED_AT = 4096  # samples that are scored
TAKEN = 384  # at most
BAND = (0.5, 0.9)  # quantiles of the score between which samples are typical
LEAST = 64  # samples below which no vote is held
SEARCHED, BEGINNING = 1024, 128  # samples, and tokens of each, that two kinds are looked for in
ROUNDS = 6  # of fitting two models and dividing the samples between them
SETTLED = 0.995  # share of the samples that a round leaves where they are, from which on there is no further one
APART = 0.12  # nats per token by which two models must predict samples better than one
CLOSE = 0.25  # share of the samples from which on the smaller kind is worth a word

Kinds = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Typical:
    """What was found.

    Attributes:
        positions: (m,) int64, sorted, of at most 384 typical samples; empty where no vote was held.
        smaller: share of the samples that are of the smaller of two kinds; 0 where there is one kind, or hardly another.
        among: share of the typical samples that are of that kind.
    """

    positions: IntArray
    smaller: float = 0.0
    among: float = 0.0


def typical(flat: IntArray, offsets: IntArray) -> Typical:
    """Typical samples among ``flat[offsets[i]:offsets[i + 1]]``; none below 64.

    Samples without a bigram, or with a negative token id (no trusted sample may have one), are never among them.  Of two
    kinds the larger is taken from, where samples are of several lengths.
    """
    negative = np.concatenate([[0], np.cumsum(flat < 0)])
    usable = np.flatnonzero((np.diff(offsets) >= 2) & (negative[offsets[1:]] == negative[offsets[:-1]]))
    if len(usable) < LEAST:
        return Typical(np.empty(0, np.int64))
    rows = [flat[offsets[i] : offsets[i + 1]] for i in usable]
    vocab = int(flat.max()) + 1
    statistics = held_out_statistics(rows, vocab, even=True)
    small = _smaller_kind(rows, statistics, vocab)
    share = float(small.mean())
    # Samples of one length have as many votes as tokens, and what is taken of them has been measured to serve.
    votes = np.flatnonzero(~small) if share >= CLOSE and len(set(map(len, rows))) > 1 else np.arange(len(rows))
    order = votes[np.argsort(statistics[votes, 0], kind="stable")]
    band = order[int(BAND[0] * len(order)) : int(BAND[1] * len(order))]
    at = np.linspace(0, len(band) - 1, min(TAKEN, len(band))).astype(np.int64)
    chosen = np.sort(band[np.unique(at)])
    close = share >= CLOSE
    return Typical(usable[chosen], share if close else 0.0, float(small[chosen].mean()) if close else 0.0)


def _smaller_kind(rows: list[IntArray], statistics: npt.NDArray[np.float64], vocab: int) -> Kinds:
    """(n,) bool: the samples of the smaller of two kinds; none where two models say little more than one."""
    step = -(-len(rows) // SEARCHED)
    whole = [row[:BEGINNING] for row in rows]
    few, nobody = whole[::step], np.zeros(len(rows), np.bool_)
    half = np.arange(len(few)) % 2 == 0
    one = np.empty(len(few))
    for asked in (half, ~half):
        one[asked] = likelihoods(few, nobody[: len(few)], asked, vocab)[:, 0]
    best, kinds = APART, nobody[: len(few)]
    for start in (*statistics[::step, :3].T, np.array(list(map(len, rows[::step])))):
        found, said = _divided(few, start <= np.median(start), half, vocab)
        if (gain := float((said - one).mean())) > best:
            best, kinds = gain, found
    if not kinds.any():
        return nobody
    small = nobody.copy()
    small[::step] = kinds
    others = np.arange(len(rows)) % step != 0
    if others.any():
        scores = likelihoods(whole, small.copy(), others, vocab)
        small[others] = scores[:, 1] > scores[:, 0]
    smaller: Kinds = small if small.mean() <= 0.5 else ~small
    return smaller


def _divided(rows: list[IntArray], kinds: Kinds, half: Kinds, vocab: int) -> tuple[Kinds, npt.NDArray[np.float64]]:
    """(n,) bool division of ``rows`` between two models, and (n,) float64 likelihoods by the better one; -inf without two.

    Each half is divided by the models of the other, one after the other, so that both mean the same by the first kind.
    """
    kinds, said = kinds.copy(), np.full(len(rows), -np.inf)
    for _ in range(ROUNDS):
        before = kinds.copy()
        for asked in (half, ~half):
            if kinds[~asked].all() or not kinds[~asked].any():
                return kinds, np.full(len(rows), -np.inf)
            scores = likelihoods(rows, kinds, asked, vocab)
            kinds[asked], said[asked] = scores[:, 1] > scores[:, 0], scores.max(1)
        if (before == kinds).mean() > SETTLED:
            break
    return kinds, said
