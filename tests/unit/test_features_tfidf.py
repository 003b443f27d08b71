"""TF-IDF vectors: against a dictionary oracle with an exact (unprojected) space, and their use for near-duplicates."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_ds.data.tokens import TokenBlock
from grace_ds.features import tfidf
from grace_ds.features.tfidf import BITS, Terms, TfIdf


def block_of(rows):
    return TokenBlock.of(np.arange(len(rows)), [np.asarray(r, np.int64) for r in rows])


def vectors_of(rows, dim=128, seed=0):
    model = TfIdf(dim, seed)
    terms = model.add(block_of(rows))
    model.reduce(lambda x: x)
    return model.vectors(len(rows), terms)


def term_counts(rows):
    """Row, term and count of every distinct term of every row."""
    terms = Terms.of(block_of(rows))
    keys = terms.keys.astype(np.int64)
    return keys >> BITS, keys % (1 << BITS), terms.counts.astype(np.int64)


def exact_cosines(rows, of=None):
    """Cosines of the unprojected vectors, with terms as tuples in dictionaries; weights by the documents ``of``."""
    terms, others = (
        [Counter([(t,) for t in row] + list(itertools.pairwise(row))) for row in some]
        for some in (rows, rows if of is None else of)
    )
    documents, n = Counter(t for counts in others for t in counts), len(others)
    weights = [{t: math.log(1 + c) * (math.log((1 + n) / (1 + documents[t])) + 1) for t, c in counts.items()} for counts in terms]
    norms = [math.sqrt(sum(w * w for w in row.values())) for row in weights]
    return np.array(
        [
            [sum(w * b.get(t, 0.0) for t, w in a.items()) / (na * nb) for b, nb in zip(weights, norms, strict=True)]
            for a, na in zip(weights, norms, strict=True)
        ]
    )


def test_cosines_equal_the_exact_ones_when_wide():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 12, rng.integers(4, 20)).tolist() for _ in range(12)]
    found = vectors_of(rows, dim=1 << 20)  # wide enough that hardly two terms share a place
    np.testing.assert_allclose(found @ found.T, exact_cosines(rows), atol=1e-4)


def test_fixed_weights_are_those_of_the_documents_that_they_were_counted_over():
    rng = np.random.default_rng(3)
    first, later = (rng.integers(low, low + 12, (9, 14)).tolist() for low in (0, 6))
    counted = TfIdf(1 << 20, 0)
    counted.add(block_of(first))
    counted.reduce(lambda x: x)
    fixed = TfIdf.of(1 << 20, 0, counted.totals)
    terms = fixed.add(block_of(later))
    found = fixed.vectors(9, terms)
    np.testing.assert_allclose(found @ found.T, exact_cosines(later, first), atol=1e-4)
    assert np.abs(exact_cosines(later, first) - exact_cosines(later)).max() > 0.01
    again = TfIdf.of(1 << 20, 0, counted.totals).vectors(9, terms)  # what was added has changed nothing
    assert again.tobytes() == found.tobytes() and fixed.totals.tobytes() == counted.totals.tobytes()


def test_near_duplicates_stand_out_from_random_pairs():
    rng = np.random.default_rng(1)
    zipf = np.minimum(rng.zipf(1.3, (200, 64)), 4000)  # common tokens are shared by all, as in text
    edited = zipf.copy()
    for row in edited:
        places = rng.choice(64, rng.integers(1, 5), replace=False)
        row[places] = rng.integers(0, 4000, len(places))
    both = vectors_of([*zipf.tolist(), *edited.tolist()])
    cosines = both[:200] @ both[200:].T
    own = np.diagonal(cosines)
    other = cosines[~np.eye(200, dtype=bool)]
    assert np.median(own) > 0.85
    assert np.median(other) < 0.4
    assert (own > np.quantile(other, 0.999)).mean() > 0.99
    assert (cosines.argmax(axis=1) == np.arange(200)).mean() > 0.99


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=8), max_size=6), st.integers(1, 20))
def test_term_counts_equal_a_counter_however_cut(rows, chunk):
    row, term, count = term_counts(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfidf, "CHUNK", chunk)
        assert all(map(np.array_equal, (row, term, count), term_counts(rows)))
    for i, tokens in enumerate(rows):
        terms = Counter([(t,) for t in tokens] + list(itertools.pairwise(tokens)))
        assert sorted(count[row == i].tolist()) == sorted(terms.values())
    assert (np.diff((row << BITS) + term) > 0).all()


def test_unit_norm_seed_and_empty_rows():
    rows = [[1, 2, 3], [], [4]]
    found = vectors_of(rows)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), [1, 0, 1], atol=1e-6)
    assert np.array_equal(found, vectors_of(rows))
    assert not np.array_equal(found, vectors_of(rows, seed=1))
    assert vectors_of([]).shape == (0, 128)


def test_more_rows_than_narrow_keys_hold_and_any_chunk_give_the_same_terms(monkeypatch):
    rows = np.random.default_rng(2).integers(0, 5, ((1 << 14) + 3, 3)).tolist()
    rows[7] = rows[8] = []
    whole = term_counts(rows)
    monkeypatch.setattr(tfidf, "CHUNK", 1000)
    narrow = [term_counts(rows[:9000]), term_counts(rows[9000:])]
    for i, joined in enumerate(zip(*narrow, strict=True)):
        assert np.array_equal(whole[i], np.concatenate([joined[0], joined[1] + (9000 if i == 0 else 0)]))
    own = [Counter([(t,) for t in row] + list(itertools.pairwise(row))) for row in rows]
    assert np.bincount(whole[0], minlength=len(rows)).tolist() == [len(terms) for terms in own]
