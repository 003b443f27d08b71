"""Samples that pack several documents: content features do not run over a boundary inside a sample."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from grace_ds.data.tokens import BREAK, TokenBlock, TokenReader, document_starts
from grace_ds.features.content import content_features
from grace_ds.features.duplicates import NgramCounts, ngram_bins
from grace_ds.features.ngrams import SMALLEST, Sampling
from grace_ds.features.pseudo_trusted import typical
from grace_ds.features.quality import QualityModel
from grace_ds.features.tfidf import Terms
from grace_ds.records import IntArray

END = 99


def documents(seed: int, count: int, low: int = 3, high: int = 30) -> list[IntArray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 60, rng.integers(low, high)).astype(np.int64) for _ in range(count)]


def with_separator(parts: list[IntArray]) -> Any:
    return np.concatenate([np.append(part, END) for part in parts])


def with_lengths(parts: list[IntArray]) -> Any:
    return {"input_ids": np.concatenate(parts).tolist(), "seq_lengths": [len(part) for part in parts]}


def with_positions(parts: list[IntArray]) -> Any:
    return {"input_ids": np.concatenate(parts), "position_ids": np.concatenate([np.arange(len(part)) for part in parts])}


PACKINGS = {"separator": with_separator, "seq_lengths": with_lengths, "position_ids": with_positions}


def reader_of(rows: list[Any], packing: str) -> TokenReader:
    return TokenReader(rows, separator=END if packing == "separator" else -1)


def parts_of(row: IntArray) -> list[list[int]]:
    """The documents of a row as the reader divides it."""
    parts: list[list[int]] = [[]]
    for token in row.tolist():
        if token == BREAK:
            parts.append([])
        else:
            parts[-1].append(token)
    return [part for part in parts if part]


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_reader_divides_a_sample_into_its_documents(packing: str) -> None:
    parts = documents(0, 5)
    reader = reader_of([PACKINGS[packing](parts)], packing)
    assert parts_of(reader.row(0)) == [part.tolist() for part in parts]
    reader.max_tokens = 20
    expected = np.concatenate(parts)[:20] if packing != "separator" else with_separator(parts)[:20]
    assert [token for part in parts_of(reader.row(0)) for token in part] == [token for token in expected.tolist() if token != END]


def test_entries_that_do_not_fit_say_nothing() -> None:
    for item in (
        [1, 2, 3],
        {"input_ids": [1, 2, 3], "position_ids": [0, 1, 2]},
        {"input_ids": [1, 2, 3], "position_ids": [0, 0, 0]},
        {"input_ids": [1, 2, 3], "position_ids": [0, 0, 1]},  # padded on the left
        {"input_ids": [1, 2, 3], "position_ids": [0, 5, 0]},
        {"input_ids": [1, 2, 3], "position_ids": [0, 1]},
        {"input_ids": [1, 2, 3], "seq_lengths": [2, 2]},
        {"input_ids": [1, 2, 3], "seq_lengths": "two"},
    ):
        assert not len(document_starts(item, 3)), item
    assert document_starts({"position_ids": [3, 4, 0, 1]}, 4).tolist() == [2]  # the first goes on from a sample before


@pytest.mark.parametrize("packing", PACKINGS)
def test_n_grams_are_those_of_the_documents(packing: str) -> None:
    rows = [documents(seed, 4) for seed in range(6)] + [documents(9, 3, 2, 5)]
    block = reader_of([PACKINGS[packing](parts) for parts in rows], packing).all()
    grams, terms = ngram_bins(block, SMALLEST), Terms.of(block)
    at, end = np.cumsum([0, *grams.lengths]), np.cumsum(np.bincount((terms.keys >> 18).astype(int), minlength=len(rows)))
    for i, parts in enumerate(rows):
        alone = TokenBlock.of(np.arange(len(parts)), parts)
        expected = ngram_bins(alone, SMALLEST).bins
        assert Counter(grams.bins[at[i] : at[i + 1]].tolist()) == Counter(expected.tolist())
        single = Terms.of(alone)
        counted: Counter[int] = Counter()
        for key, times in zip(single.keys.tolist(), single.counts.tolist(), strict=True):
            counted[key & (2**18 - 1)] += times
        mine = slice(end[i - 1] if i else 0, end[i])
        pairs = zip(terms.keys[mine].tolist(), terms.counts[mine].tolist(), strict=True)
        found = {key & (2**18 - 1): times for key, times in pairs}
        assert found == dict(counted)


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_bigram_score_is_the_mean_over_the_documents_bigrams(packing: str) -> None:
    trusted = TokenBlock.of(np.arange(80), documents(1, 80))
    model = QualityModel.fit(trusted.flat, trusted.offsets)
    parts = documents(2, 5)
    packed = reader_of([PACKINGS[packing](parts)], packing).all()
    alone = TokenBlock.of(np.arange(5), parts)
    weights = [len(part) - 1 for part in parts]
    expected = np.average(model.raw_statistics(alone.flat, alone.offsets)[:, 0], weights=weights)
    assert model.raw_statistics(packed.flat, packed.offsets)[:, 0][0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("level", [0, 3])
def test_no_feature_depends_on_the_order_of_the_documents(packing: str, level: int) -> None:
    rng = np.random.default_rng(3)
    rows = [documents(seed, 5, 12, 40) for seed in range(30)]
    rows[7] = rows[8]
    shuffled = [[parts[i] for i in rng.permutation(len(parts))] for parts in rows]
    trusted = TokenBlock.of(np.arange(80), documents(1, 80))
    model = QualityModel.fit(trusted.flat, trusted.offsets)

    def features(packed: list[Any]) -> Any:
        reader = reader_of([PACKINGS[packing](parts) for parts in packed], packing)
        counts = NgramCounts(Sampling(SMALLEST.bits, level))
        block = reader.all()
        counts.add(block)
        counts.reduce(lambda array: array)
        found = content_features(reader, np.arange(len(rows)), dim=32, seed=1, allreduce=lambda a: a)
        # The fifth statistic, of distinct tokens in stretches of 64, is one of the whole sample.
        return found.vectors, model.raw_statistics(block.flat, block.offsets)[:, :4], found.density, counts.degree(block)

    for name, a, b in zip(("vectors", "statistics", "density", "degree"), features(rows), features(shuffled), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)
    assert features(rows)[2][7] > 0.9 and features(rows)[2][0] == 0


def test_a_separator_unknown_to_the_trusted_set_no_longer_lowers_the_score() -> None:
    trusted = TokenBlock.of(np.arange(80), documents(1, 80))
    model = QualityModel.fit(trusted.flat, trusted.offsets, vocab=END + 1)
    rows = [with_separator(documents(seed, 12, 4, 8)) for seed in range(20)]
    known, unknown = (TokenReader(rows, separator=separator).all() for separator in (END, -1))
    gain = model.raw_statistics(known.flat, known.offsets)[:, 0] - model.raw_statistics(unknown.flat, unknown.offsets)[:, 0]
    assert gain.min() > 0.3  # nats per token: a third of such short documents' bigrams hold the separator


def test_packed_samples_can_be_trusted_and_typical() -> None:
    rows = [with_separator(documents(seed, 5)) for seed in range(100)]
    block = TokenReader(rows, separator=END).all()
    assert len(typical(block.flat, block.offsets).positions) > 30
    packed = QualityModel.fit(block.flat, block.offsets)
    alone = TokenBlock.of(np.arange(500), [part for seed in range(100) for part in documents(seed, 5)])
    plain = QualityModel.fit(alone.flat, alone.offsets)
    assert (packed.bigrams == plain.bigrams).all() and (packed.unigrams == plain.unigrams).all()
