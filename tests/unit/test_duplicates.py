"""6-gram density against exact counts of tuples."""

from __future__ import annotations

import itertools
import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_ds.data.tokens import TokenBlock
from grace_ds.features import duplicates
from grace_ds.features.duplicates import NgramCounts, ngram_bins, row_quantile
from tests.unit.test_features_content import Ranks


def block_of(rows):
    return TokenBlock.of(np.arange(len(rows)), [np.asarray(r, np.int64) for r in rows])


def exact_density(rows):
    """The definition, with tuples in a Counter and NumPy's percentile, a sample at a time."""
    grams = [[tuple(row[i : i + 6]) for i in range(len(row) - 5)] for row in rows]
    counts = Counter(g for row in grams for g in row)
    return [float(np.percentile([counts[g] - 1 for g in row], 40)) if row else 0.0 for row in grams]


def measured(rows, cuts=()):
    """Density of ``rows`` processed in blocks that end at ``cuts``."""
    edges = [0, *sorted(cuts), len(rows)]
    blocks = [block_of(rows[a:b]) for a, b in itertools.pairwise(edges)]
    counts = NgramCounts()
    for block in blocks:
        counts.add(block)
    counts.reduce(lambda x: x)
    return np.concatenate([counts.degree(block) for block in blocks])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=16), max_size=12), st.data())
def test_equals_exact_counts(rows, data):
    cuts = data.draw(st.lists(st.integers(0, len(rows)), max_size=3))
    np.testing.assert_allclose(measured(rows, cuts), exact_density(rows), rtol=1e-12)


def test_equal_lengths_equal_exact_counts():
    rows = np.random.default_rng(0).integers(0, 2, (40, 20)).tolist()
    expected = exact_density(rows)
    assert max(expected) > 3
    np.testing.assert_allclose(measured(rows), expected, rtol=1e-12)


def test_copies_with_edits_are_dense_and_originals_are_not():
    rng = np.random.default_rng(1)
    unique = rng.integers(0, 5000, (50, 64))
    copies = np.repeat(rng.integers(0, 5000, (1, 64)), 20, axis=0)
    copies[np.arange(20), rng.integers(0, 64, 20)] = 4999
    dense = measured([*unique.tolist(), *copies.tolist()])
    assert dense[:50].max() == 0
    assert dense[50:].min() >= 10


def test_grams_do_not_cross_samples():
    assert ngram_bins(block_of([[1, 2, 3], [4, 5, 6]])).bins.tolist() == []
    found = ngram_bins(block_of([[1], list(range(7)), [2, 3], list(range(6))]))
    bins, sizes = found.bins, found.lengths
    assert sizes.tolist() == [0, 2, 0, 1]
    assert len(bins) == 3
    assert bins[0] == bins[2] != bins[1]


def test_bins_are_spread():
    bins = ngram_bins(block_of([np.arange(200_000)])).bins
    expected = (1 << 22) * (1 - np.exp(-len(bins) / (1 << 22)))  # of a uniformly random hash
    assert abs(len(np.unique(bins)) - expected) < 0.01 * expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 2**30), max_size=9), max_size=6))
def test_row_quantile_equals_percentile(rows):
    values = np.array([v for row in rows for v in row], np.int32)
    found = row_quantile(values, np.array([len(r) for r in rows], np.int64), 0.4, minus=1)
    np.testing.assert_allclose(found, [np.percentile(r, 40) - 1 if r else 0 for r in rows], rtol=1e-9)
    lower = row_quantile(values, np.array([len(r) for r in rows], np.int64), 0.4, minus=1, between=False)
    assert lower.tolist() == [np.percentile(r, 40, method="lower") - 1 if r else 0 for r in rows]


def test_counts_saturate_alike_on_one_and_three_ranks(monkeypatch):
    monkeypatch.setattr(duplicates, "SATURATION", 8)
    gram = block_of([[1, 2, 3, 4, 5, 6]])

    def total(share):
        ranks, made = Ranks(len(share)), [NgramCounts() for _ in share]
        threads = []
        for rank, (counts, copies) in enumerate(zip(made, share, strict=True)):
            for _ in range(copies):
                counts.add(gram)
            threads.append(threading.Thread(target=counts.reduce, args=(ranks.sum_of(rank),)))
            threads[-1].start()
        for thread in threads:
            thread.join(60)
        return made[0].degree(gram)[0]

    assert total([20]) == total([9, 1, 10]) == total([5, 5, 5]) == 7
    assert total([3]) == total([1, 1, 1]) == 2


TEXTS = st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=6)


@settings(max_examples=40, deadline=None)
@given(TEXTS, TEXTS, TEXTS)
def test_counts_follow_a_window_of_which_some_leave_and_some_enter(leave, stay, enter):
    before = NgramCounts()
    before.add(block_of(leave + stay))
    before.reduce(lambda x: x)
    now = NgramCounts(known=before.total)
    now.drop(block_of(leave))
    now.add(block_of(enter))
    now.reduce(lambda x: x)
    assert now.total.sum() == sum(max(len(row) - 5, 0) for row in stay + enter)
    np.testing.assert_allclose(now.degree(block_of(stay + enter)), exact_density(stay + enter), rtol=1e-12)


def test_counts_that_have_saturated_come_down_again(monkeypatch):
    monkeypatch.setattr(duplicates, "SATURATION", 8)
    gram, many = block_of([[1, 2, 3, 4, 5, 6]]), NgramCounts()
    for _ in range(20):
        many.add(gram)
    many.reduce(lambda x: x)
    assert many.degree(gram).tolist() == [7] and many.total.max() == 20
    fewer = NgramCounts(known=many.total)
    for _ in range(17):
        fewer.drop(gram)
    fewer.reduce(lambda x: x)
    assert fewer.degree(gram).tolist() == [2]


@pytest.mark.parametrize("rows", [[], [[]], [[1], []]])
def test_nothing_to_count(rows):
    assert measured(rows).tolist() == [0.0] * len(rows)
