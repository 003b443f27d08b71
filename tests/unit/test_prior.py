"""The trusted bigram prior against a dictionary model that is fitted anew for every question."""

from __future__ import annotations

import itertools
import logging
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_ds.errors import DataError
from grace_ds.features.tokens import TokenBlock
from grace_ds.selection.prior import BigramPrior, align_keep, combine, rank01


def flat_of(rows):
    block = TokenBlock.of(np.arange(len(rows)), [np.asarray(r, np.int64) for r in rows])
    return block.flat, block.offsets


class DictModel:
    """p(b | a) from dictionaries, without hashing."""

    def __init__(self, rows, vocab):
        self.tokens = Counter(t for row in rows for t in row)
        self.pairs = Counter(p for row in rows for p in itertools.pairwise(row))
        self.lefts = Counter(t for row in rows for t in row[:-1])
        self.n, self.vocab = sum(self.tokens.values()), vocab

    def p(self, a, b):
        unigram = (self.tokens[b] + 0.5) / (self.n + 0.5 * self.vocab)
        return (self.pairs[a, b] + 4 * unigram) / (self.lefts[a] + 4)

    def score(self, row):
        return sum(math.log(self.p(a, b)) for a, b in itertools.pairwise(row)) / (len(row) - 1)


def texts(n, seed, vocab=30, low=5, high=40):
    """Sequences of a fixed random Markov chain: text with structure to learn."""
    table = np.random.default_rng(99).dirichlet(np.full(vocab, 0.1), vocab)
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        row = [int(rng.integers(vocab))]
        for _ in range(int(rng.integers(low, high))):
            row.append(int(rng.choice(vocab, p=table[row[-1]])))
        rows.append(row)
    return rows


TRUSTED = texts(80, 0)


def test_scores_equal_the_dictionary_model():
    prior, model = BigramPrior.fit(*flat_of(TRUSTED), vocab=50), DictModel(TRUSTED, 50)
    asked = [*texts(20, 1), [49, 48, 3], [7, 7]]
    np.testing.assert_allclose(prior.score(*flat_of(asked)), [model.score(r) for r in asked], rtol=1e-9)
    assert sum(model.p(3, b) for b in range(50)) == pytest.approx(1)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=9), min_size=2, max_size=8))
def test_leave_one_out_equals_fitting_without_it(rows):
    vocab = max(max(r) for r in rows) + 1
    prior = BigramPrior.fit(*flat_of(rows), vocab=7)
    expected = [DictModel(rows[:i] + rows[i + 1 :], max(vocab, 7)).score(row) for i, row in enumerate(rows)]
    np.testing.assert_allclose(prior.leave_one_out(*flat_of(rows)), expected, rtol=1e-9)


def test_leave_one_out_is_below_the_fitted_score():
    prior = BigramPrior.fit(*flat_of(TRUSTED))
    assert (prior.leave_one_out(*flat_of(TRUSTED)) < prior.score(*flat_of(TRUSTED))).all()


def test_calibration_is_the_trusted_median_and_mad():
    prior = BigramPrior.fit(*flat_of(TRUSTED), vocab=30)
    scores = [DictModel(TRUSTED[:i] + TRUSTED[i + 1 :], 30).score(row) for i, row in enumerate(TRUSTED)]
    median = np.median(scores)
    assert prior.median == pytest.approx(median)
    assert prior.deviation == pytest.approx(1.4826 * np.median(np.abs(np.array(scores) - median)))


def test_keeps_good_text_and_drops_junk():
    prior = BigramPrior.fit(*flat_of(texts(200, 0, low=40, high=41)))
    good = texts(200, 5, low=40, high=41)
    rng = np.random.default_rng(0)
    shuffled = [rng.permutation(row).tolist() for row in good]
    unknown = rng.integers(500, 900, (50, 40)).tolist()
    assert prior.keep(*flat_of(good)).mean() > 0.75
    assert prior.keep(*flat_of(shuffled)).mean() < 0.05
    assert prior.keep(*flat_of(unknown)).max() < 0.03


def test_threshold_lies_one_and_a_half_deviations_below():
    """At the threshold half of the open range is kept; a fifth of a deviation either way decides."""
    prior = BigramPrior.fit(*flat_of(TRUSTED))
    score = prior.score(*flat_of([TRUSTED[0]]))[0]

    def shifted(z):
        return BigramPrior(prior.bigrams, prior.contexts, prior.unigrams, prior.vocab, score - z, 1.0)

    keeps = [shifted(z).keep(*flat_of([TRUSTED[0]]))[0] for z in (-1.5, -1.3, -1.7, 5, -9)]
    np.testing.assert_allclose(keeps, [0.51, 0.02 + 0.98 * 0.7310586, 0.02 + 0.98 * 0.2689414, 1.0, 0.02], atol=1e-6)


def test_tokens_outside_of_the_vocabulary_and_short_samples():
    prior = BigramPrior.fit(*flat_of(TRUSTED))
    scores = prior.score(*flat_of([[10**9, 10**9 + 1], [-1, -100], [3], [], TRUSTED[0]]))
    assert np.isfinite(scores[[0, 1, 4]]).all()
    assert np.isneginf(scores[[2, 3]]).all()
    assert prior.keep(*flat_of([[3], []])).tolist() == [0.02, 0.02]
    assert len(prior.keep(*flat_of([]))) == 0


def test_rows_do_not_depend_on_their_block():
    prior, rows = BigramPrior.fit(*flat_of(TRUSTED)), texts(40, 2)
    whole = prior.keep(*flat_of(rows))
    single = np.concatenate([prior.keep(*flat_of([row])) for row in rows])
    uneven = np.concatenate([prior.keep(*flat_of(part)) for part in (rows[:7], rows[7:8], rows[8:])])
    assert whole.tobytes() == single.tobytes() == uneven.tobytes()


def test_few_trusted_sequences_warn_with_the_reason(caplog):
    with caplog.at_level(logging.WARNING):
        BigramPrior.fit(*flat_of(TRUSTED[:63]))
        assert "only 63 trusted sequences (at least 64 are advised)" in caplog.text
        caplog.clear()
        BigramPrior.fit(*flat_of(TRUSTED[:64]))
        assert not caplog.text


def test_identical_trusted_sequences_get_a_floor_and_a_warning(caplog):
    prior = BigramPrior.fit(*flat_of([[1, 2, 3, 4]] * 70))
    assert "copies of one another" in caplog.text
    assert prior.deviation > 0
    assert np.isfinite(prior.keep(*flat_of([[1, 2, 3, 4], [4, 4, 4]]))).all()


@pytest.mark.parametrize(("rows", "says"), [([[1, 2]], "1 trusted"), ([[1], [2], []], "0 trusted"), ([], "0 trusted")])
def test_too_few_trusted_sequences_are_an_error(rows, says):
    with pytest.raises(DataError, match=says) as caught:
        BigramPrior.fit(*flat_of(rows))
    assert "selection.prior: false" in str(caught.value)


def test_negative_trusted_tokens_are_an_error():
    with pytest.raises(DataError, match="-100 is negative"):
        BigramPrior.fit(*flat_of([[1, 2], [3, -100]]))


def test_digest_names_the_model():
    base = BigramPrior.fit(*flat_of(TRUSTED), vocab=40)
    assert base.digest() == BigramPrior.fit(*flat_of(TRUSTED), vocab=40).digest()
    assert base.digest() != BigramPrior.fit(*flat_of(TRUSTED), vocab=41).digest()
    assert base.digest() != BigramPrior.fit(*flat_of(TRUSTED[1:]), vocab=40).digest()


def test_align_keep_turns_at_half_the_trusted_median():
    found = align_keep(np.array([0.2, 0.4, 1.0, -1.0, np.nan], np.float32), 0.4)
    np.testing.assert_allclose(found, [0.51, 0.02 + 0.98 / (1 + math.exp(-0.5 / 0.12)), 1, 0.02, 1], atol=1e-4)
    assert (np.diff(align_keep(np.linspace(-1, 1, 50), 0.4)) >= 0).all()


@pytest.mark.parametrize("median", [0.0, -0.3, float("nan")])
def test_align_keep_passes_all_without_a_positive_median(median):
    assert align_keep(np.array([-1.0, 0.0, 1.0]), median).tolist() == [1.0, 1.0, 1.0]


def test_rank01_averages_ties_and_centres_the_unknown():
    found = rank01(np.array([3.0, np.nan, 1.0, 3.0, 9.0, -5.0]))
    assert found.tolist() == [0.625, 0.5, 0.25, 0.625, 1.0, 0.0]
    assert rank01(np.array([7.0])).tolist() == [0.5]
    assert rank01(np.array([np.nan, np.nan])).tolist() == [0.5, 0.5]
    assert rank01(np.array([])).tolist() == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([-2.0, 0.0, 1.5, 8.0, math.nan]), max_size=12), st.randoms())
def test_rank01_follows_a_permutation(values, rng):
    order = list(range(len(values)))
    rng.shuffle(order)
    assert rank01(np.array(values)[order] if order else np.array([])).tolist() == rank01(np.array(values))[order].tolist()


def test_combine_multiplies_what_is_there():
    keep, density = np.array([0.5, 1.0]), np.array([3.0, 0.0])
    rank, align = np.array([0.2, 0.7]), np.array([1.0, 0.02])
    np.testing.assert_allclose(np.exp(combine(keep, density, rank, align)), [0.5 * 0.5 / 4, 0.02])
    np.testing.assert_allclose(np.exp(combine(keep, density, None, None)), [0.125, 1.0])
    np.testing.assert_allclose(np.exp(combine(None, None, rank, None)), [0.5, 1.0])
    np.testing.assert_allclose(np.exp(combine(None, None, None, align)), [1.0, 0.02])
    assert combine(None, None, None, None, n=3).tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="one length"):
        combine(None, None, None, None)
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        combine(keep, np.zeros(3), None, None)
