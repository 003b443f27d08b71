"""The trusted bigram prior against a dictionary model that is fitted anew for every question."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_ds.data.tokens import TokenBlock
from grace_ds.errors import DataError
from grace_ds.features.limits import Limits
from grace_ds.features.pseudo_trusted import typical
from grace_ds.features.quality import QualityModel, held_out_statistics


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

    def facts(self, row):
        """The five statistics, each counted token by token."""
        pairs = list(itertools.pairwise(row))
        logs = [math.log(self.p(a, b)) for a, b in pairs]
        common = [math.log((self.tokens[b] + 0.5) / (self.n + 0.5 * self.vocab)) for _, b in pairs]
        seen = sum(pair in self.pairs for pair in pairs)
        return [np.mean(logs), np.std(logs), np.mean(common), seen / len(pairs), len(set(row[1:])) / len(pairs)]


def quarters(rows):
    """Each row's own contiguous quarter left out: the model of the rest for every row."""
    parts = min(4, len(rows))
    sizes = [len(rows) // parts + (i < len(rows) % parts) for i in range(parts)]
    for i, size in enumerate(sizes):
        start = sum(sizes[:i])
        for row in rows[start : start + size]:
            yield row, rows[:start] + rows[start + size :]


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
    quality_model, model = QualityModel.fit(*flat_of(TRUSTED), vocab=50), DictModel(TRUSTED, 50)
    asked = [*texts(20, 1), [49, 48, 3], [7, 7]]
    np.testing.assert_allclose(quality_model.raw_statistics(*flat_of(asked))[:, 0], [model.score(r) for r in asked], rtol=1e-9)
    assert sum(model.p(3, b) for b in range(50)) == pytest.approx(1)


def test_statistics_equal_the_dictionary_model():
    quality_model, model = QualityModel.fit(*flat_of(TRUSTED), vocab=50), DictModel(TRUSTED, 50)
    asked = [*texts(20, 1), [49, 48, 3], [7, 7], [3, 9, 3, 9, 9]]
    expected = np.array([model.facts(row) for row in asked])
    np.testing.assert_allclose(quality_model.raw_statistics(*flat_of(asked)), expected, rtol=1e-7, atol=1e-7)
    keep, standard = quality_model.examine(*flat_of(asked))
    assert keep.tobytes() == quality_model.quality(*flat_of(asked)).tobytes()
    limited = np.clip((expected - quality_model.centre) / quality_model.deviation, -6, 6)
    np.testing.assert_allclose(standard, limited, atol=1e-5)
    assert standard.dtype == np.float32


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=9), min_size=2, max_size=11))
def test_each_quarter_is_judged_by_the_model_of_the_others(rows):
    expected = [DictModel(rest, 7).facts(row) for row, rest in quarters(rows)]
    found = held_out_statistics([np.array(row) for row in rows], 7)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-7)


def test_held_out_scores_are_below_the_fitted_ones():
    quality_model = QualityModel.fit(*flat_of(TRUSTED))
    held_out = quality_model.held_out[:, 0] * quality_model.deviation[0] + quality_model.centre[0]
    assert (held_out < quality_model.raw_statistics(*flat_of(TRUSTED))[:, 0]).all()


def test_calibration_is_the_median_and_mad_of_held_out_quarters():
    quality_model = QualityModel.fit(*flat_of(TRUSTED), vocab=30)
    facts = np.array([DictModel(rest, 30).facts(row) for row, rest in quarters(TRUSTED)])
    median = np.median(facts, axis=0)
    np.testing.assert_allclose(quality_model.centre, median, rtol=1e-9)
    np.testing.assert_allclose(quality_model.deviation, 1.4826 * np.median(np.abs(facts - median), axis=0), rtol=1e-6)
    assert quality_model.held_out.shape == (80, 5)
    assert quality_model.held_out.dtype == np.float32
    np.testing.assert_allclose(np.median(quality_model.held_out, axis=0), 0, atol=1e-6)


def test_neighbours_from_one_document_do_not_set_the_standard():
    """Pieces of a document stand side by side; good text of other documents must meet the standard that they set."""

    def pieces(documents, seed):
        rng = np.random.default_rng(seed)
        rows = []
        for _ in range(documents):  # every document has a vocabulary of its own beside the common one
            own = rng.integers(40, 4000, 8)
            rows += [np.where(rng.random(60) < 0.5, rng.choice(own, 60), rng.integers(0, 40, 60)).tolist() for _ in range(4)]
        return rows

    quality_model = QualityModel.fit(*flat_of(pieces(60, 0)), vocab=4000)
    fresh = quality_model.raw_statistics(*flat_of(pieces(60, 1)))[:, 0]
    assert abs(np.median(fresh) - quality_model.centre[0]) < quality_model.deviation[0]
    assert quality_model.quality(*flat_of(pieces(60, 1))).mean() > 0.75


def test_keeps_good_text_and_drops_junk():
    quality_model = QualityModel.fit(*flat_of(texts(200, 0, low=40, high=41)))
    good = texts(200, 5, low=40, high=41)
    rng = np.random.default_rng(0)
    shuffled = [rng.permutation(row).tolist() for row in good]
    unknown = rng.integers(500, 900, (50, 40)).tolist()
    assert quality_model.quality(*flat_of(good)).mean() > 0.75
    assert quality_model.quality(*flat_of(shuffled)).mean() < 0.05
    assert quality_model.quality(*flat_of(unknown)).max() < 0.03


def test_columns_of_numbers_and_words_drawn_at_random_fail_though_their_bigrams_are_common():
    rng = np.random.default_rng(0)
    book = rng.permutation(300).reshape(60, 5)  # phrases; a text comes back to its own
    zipf = 1 / np.arange(1, 61)

    def text(phrases):
        return [0, *book[phrases].reshape(-1)]

    def good(n):
        return [text(rng.permutation(60)[rng.choice(60, 13, p=zipf / zipf.sum())]) for _ in range(n)]

    quality_model, fresh = QualityModel.fit(*flat_of(good(300))), good(200)
    columns = [text([rng.integers(60)] * 13) for _ in range(50)]
    wordy = [text(rng.permutation(60)[:13]) for _ in range(50)]
    usual = np.quantile(quality_model.raw_statistics(*flat_of(fresh))[:, 0], [0.12, 0.5])
    for junk in (columns, wordy):
        assert np.median(quality_model.raw_statistics(*flat_of(junk))[:, 0]) > usual[0]  # the model alone would not see it
        assert quality_model.quality(*flat_of(junk)).mean() < 0.15
    assert quality_model.quality(*flat_of(fresh)).mean() > 0.75


def test_distinct_tokens_are_counted_in_stretches_so_that_long_texts_are_not_held_to_repeat_themselves():
    rng = np.random.default_rng(0)
    quality_model = QualityModel.fit(*flat_of(rng.integers(0, 200, (80, 65)).tolist()))
    short, long = rng.integers(0, 200, (50, 65)).tolist(), rng.integers(0, 200, (50, 1025)).tolist()
    a, b = (quality_model.raw_statistics(*flat_of(rows))[:, 4] for rows in (short, long))
    assert np.median(a) == pytest.approx(np.median(b), abs=0.02)
    by_hand = np.mean([len(set(long[0][i : i + 64])) / 64 for i in range(1, 1025, 64)])
    assert b[0] == pytest.approx(by_hand)


def test_at_the_limit_half_of_the_open_range_is_kept_and_a_fifth_of_a_deviation_either_way_decides():
    quality_model = QualityModel.fit(*flat_of(TRUSTED))
    score = quality_model.raw_statistics(*flat_of([TRUSTED[0]]))[0, 0]

    def shifted(z):
        return dataclasses.replace(quality_model, limits=Limits(((0, -1),), (score - z,), (1.0,), -1.5))

    keeps = [shifted(z).quality(*flat_of([TRUSTED[0]]))[0] for z in (-1.5, -1.3, -1.7, 5, -9)]
    np.testing.assert_allclose(keeps, [0.51, 0.02 + 0.98 * 0.7310586, 0.02 + 0.98 * 0.2689414, 1.0, 0.02], atol=1e-6)


def test_tokens_outside_of_the_vocabulary_and_short_samples():
    quality_model = QualityModel.fit(*flat_of(TRUSTED))
    scores = quality_model.raw_statistics(*flat_of([[10**9, 10**9 + 1], [-1, -100], [3], [], TRUSTED[0]]))[:, 0]
    assert np.isfinite(scores[[0, 1, 4]]).all()
    assert np.isneginf(scores[[2, 3]]).all()
    assert quality_model.quality(*flat_of([[3], []])).tolist() == [0.02, 0.02]
    assert len(quality_model.quality(*flat_of([]))) == 0


def test_rows_do_not_depend_on_their_block():
    quality_model, rows = QualityModel.fit(*flat_of(TRUSTED)), texts(40, 2)
    whole = quality_model.quality(*flat_of(rows))
    single = np.concatenate([quality_model.quality(*flat_of([row])) for row in rows])
    uneven = np.concatenate([quality_model.quality(*flat_of(part)) for part in (rows[:7], rows[7:8], rows[8:])])
    assert whole.tobytes() == single.tobytes() == uneven.tobytes()


def test_few_trusted_sequences_warn_with_the_reason(caplog):
    with caplog.at_level(logging.WARNING):
        QualityModel.fit(*flat_of(TRUSTED[:63]))
        assert "only 63 trusted sequences (at least 64 are advised)" in caplog.text
        caplog.clear()
        QualityModel.fit(*flat_of(TRUSTED[:64]))
        assert not caplog.text


def test_identical_trusted_sequences_get_a_floor_and_a_warning(caplog):
    quality_model = QualityModel.fit(*flat_of([[1, 2, 3, 4]] * 70))
    assert "copies of one another" in caplog.text
    assert (quality_model.deviation > 0).all()
    assert np.isfinite(quality_model.quality(*flat_of([[1, 2, 3, 4], [4, 4, 4]]))).all()


@pytest.mark.parametrize(("rows", "says"), [([[1, 2]], "1 trusted"), ([[1], [2], []], "0 trusted"), ([], "0 trusted")])
def test_too_few_trusted_sequences_are_an_error(rows, says):
    with pytest.raises(DataError, match=says) as caught:
        QualityModel.fit(*flat_of(rows))
    assert "recipe: density" in str(caught.value)


def test_negative_trusted_tokens_are_an_error():
    with pytest.raises(DataError, match="-100 is negative"):
        QualityModel.fit(*flat_of([[1, 2], [3, -100]]))


def test_digest_names_the_model():
    base = QualityModel.fit(*flat_of(TRUSTED), vocab=40)
    assert base.digest() == QualityModel.fit(*flat_of(TRUSTED), vocab=40).digest()
    assert base.digest() != QualityModel.fit(*flat_of(TRUSTED), vocab=41).digest()
    assert base.digest() != QualityModel.fit(*flat_of(TRUSTED[1:]), vocab=40).digest()


def recorded() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Trusted sequences of 40 tokens each, and others with unknown and negative ids among them."""
    rng = np.random.default_rng(5)
    flat = np.minimum(rng.geometric(0.01, 200 * 40), 5000).astype(np.int64)
    odd, text = rng.random(3000) < 0.05, np.empty(3000, np.int64)
    text[odd], text[~odd] = rng.integers(-5, 9000, int(odd.sum())), rng.geometric(0.02, int((~odd).sum()))
    return flat, np.arange(201) * 40, text, np.array([0, 0, 1, 100, 700, 1500, 3000])


def print_of(*arrays: np.ndarray) -> str:
    h = hashlib.blake2b(digest_size=8)
    for a in arrays:
        h.update(np.ascontiguousarray(a).tobytes())
    return h.hexdigest()


def everything(quality_model: QualityModel, text: np.ndarray, offsets: np.ndarray) -> str:
    return print_of(
        quality_model.examine(text, offsets)[1],
        quality_model.quality(text, offsets),
        quality_model.raw_statistics(text, offsets)[:, 0],
        quality_model.held_out,
    )


def test_statistics_of_ordinary_ids_are_those_that_were_recorded() -> None:
    flat, offsets, text, at = recorded()
    quality_model = QualityModel.fit(flat, offsets, 6000)
    assert (quality_model.digest(), everything(quality_model, text, at)) == (
        "0e7f7d11d8f4091ec8dbcb86a10455fe",
        "be584e5d6310d897",
    )


def test_counts_of_the_ids_that_occur_say_the_same_as_counts_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    flat, offsets, text, at = recorded()
    flat = np.concatenate([np.arange(300), flat[300:] % 300])  # all of them occur
    dense = QualityModel.fit(flat, offsets)
    monkeypatch.setattr("grace_ds.features.quality.DENSE", 0)
    sparse = QualityModel.fit(flat, offsets)
    assert dense.tokens is None and sparse.tokens is not None
    assert everything(sparse, text, at) == everything(dense, text, at)
    assert sparse.digest() != dense.digest()


@pytest.mark.parametrize("stray", [10**8, 2**32 - 100, 2**62])
def test_a_stray_id_costs_no_memory_and_changes_hardly_anything(stray: int) -> None:
    rng = np.random.default_rng(0)
    flat, offsets = rng.integers(0, 1000, 200 * 32).astype(np.int64), np.arange(201) * 32
    text = rng.integers(0, 1200, 3200).astype(np.int64)
    plain = QualityModel.fit(flat, offsets)
    flat[5 * 32] = stray
    tracemalloc.start()
    try:
        quality_model = QualityModel.fit(flat, offsets)
        typical(flat, offsets)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60 << 20
    assert len(quality_model.unigrams) <= 1002
    scores = (model.raw_statistics(text, offsets[:101])[:, 0] for model in (quality_model, plain))
    np.testing.assert_allclose(*scores, atol=0.05)
