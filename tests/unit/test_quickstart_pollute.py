"""The polluted pool: shares as stated, duplicates that are near, junk of every kind, the same for the same generator."""

from __future__ import annotations

import base64
import hashlib

import numpy as np
import pytest
from grace_ds_quickstart.pollute import JUNK, JunkSource, Kind, Pool, mix, near_duplicates
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_ds.errors import DataError

VOCAB, LENGTH = 300, 33


def encode(texts):
    return np.frombuffer("".join(texts).encode("utf-8"), np.uint8).astype(np.int32)


def source(n=400, seed=7):
    rows = np.random.default_rng(seed).integers(0, VOCAB, (n, LENGTH)).astype(np.int32)
    return JunkSource(rows, encode, VOCAB)


def numbered(_, rng, count):
    """Rows that no other kind has: the same token all along, from the last ten of the vocabulary."""
    return np.repeat(rng.integers(VOCAB - 10, VOCAB, (count, 1)), LENGTH, axis=1).astype(np.int32)


def build(seed=3, **options) -> Pool:
    return mix(source(), np.random.default_rng(seed), 500, **options)


def test_default_shares_are_half_unique_thirty_percent_copies_twenty_percent_junk():
    pool = build()
    assert pool.counts() == {"unique": 250, "duplicate": 150, "junk": 100, "generated": 0}
    assert pool.rows.shape == (500, LENGTH) and pool.rows.dtype == np.int32


@settings(max_examples=25, deadline=2000)
@given(st.floats(0, 0.5), st.floats(0, 0.25), st.floats(0, 0.2), st.integers(20, 300))
def test_any_shares_are_met_to_half_a_row(duplicates, junk, generated, size):
    shares = {"duplicates": duplicates, "junk": junk, "generated": generated}
    counts = mix(source(), np.random.default_rng(0), size, **shares, generate=numbered).counts()
    assert sum(counts.values()) == size
    assert abs(counts["generated"] - size * generated) <= 0.5
    assert abs(counts["duplicate"] - size * duplicates) <= 0.5
    assert abs(counts["junk"] - size * junk) <= 0.5


def test_same_generator_same_pool_other_generator_another():
    a, b, c = build(3), build(3), build(4)
    assert np.array_equal(a.rows, b.rows) and np.array_equal(a.kinds, b.kinds)
    assert not np.array_equal(a.rows, c.rows)


def test_a_pool_without_generated_rows_is_as_it_was_before_there_were_any():
    # Of record: the benchmark's pools are compared over versions of this code.
    pool = build()
    content = pool.rows.tobytes() + pool.kinds.tobytes() + pool.sources.tobytes()
    assert hashlib.blake2b(content, digest_size=8).hexdigest() == "8a92ebe2ff71770a"


def test_generated_rows_are_labelled_and_leave_the_others_as_they_are():
    pool, without = build(duplicates=0.2, junk=0.1, generated=0.25, generate=numbered), build(duplicates=0.2, junk=0.1)
    made = pool.kinds == Kind.GENERATED
    assert made.sum() == 125 and (pool.sources[made] == -1).all()
    assert (pool.rows[made] == pool.rows[made][:, :1]).all() and (pool.rows[made] >= VOCAB - 10).all()
    first = np.sort(pool.sources[pool.kinds == Kind.UNIQUE])
    assert set(first) <= set(without.sources[without.kinds == Kind.UNIQUE])


def test_unique_rows_are_the_sources_they_claim_and_do_not_repeat():
    clean, pool = source(), build()
    unique = pool.kinds == Kind.UNIQUE
    assert np.array_equal(pool.rows[unique], clean.rows[pool.sources[unique]])
    assert len(set(pool.sources[unique])) == unique.sum()


def test_duplicates_differ_from_a_row_of_the_same_pool_in_one_to_four_tokens():
    clean, pool = source(), build()
    copies = pool.kinds == Kind.DUPLICATE
    edits = (pool.rows[copies] != clean.rows[pool.sources[copies]]).sum(1)
    assert set(edits) == {1, 2, 3, 4}
    assert set(pool.sources[copies]) <= set(pool.sources[pool.kinds == Kind.UNIQUE])
    assert pool.rows.max() < VOCAB and pool.rows.min() >= 0


def test_a_few_sources_are_copied_most():
    _, origin = near_duplicates(source().rows, np.random.default_rng(1), 4000, VOCAB)
    copies = np.sort(np.bincount(origin, minlength=400))[::-1]
    # 400 Zipf ranks: the first holds 1/H(400) = 15.2 %, the first ten 44.6 %.
    assert 0.13 < copies[0] / 4000 < 0.175
    assert 0.41 < copies[:10].sum() / 4000 < 0.48


def test_kinds_of_junk_look_as_their_names_say():
    clean, rng = source(), np.random.default_rng(5)
    text = bytes(JUNK["base64"](clean, rng, 6).astype(np.uint8).reshape(-1)[:76])
    assert len(base64.b64decode(text, validate=True)) == 57
    raw = JUNK["bytes"](clean, rng, 50)
    assert len(np.unique(raw)) > 100
    shuffled = JUNK["shuffled"](clean, rng, 20)
    known = {tuple(row) for row in clean.rows.tolist()}
    bags = {tuple(sorted(row)) for row in clean.rows.tolist()}
    assert not known & {tuple(row) for row in shuffled.tolist()}
    assert {tuple(sorted(row)) for row in shuffled.tolist()} <= bags


def test_only_the_kinds_asked_for():
    pool = build(kinds=("base64",))
    junk = pool.rows[pool.kinds == Kind.JUNK]
    alphabet = set(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\n")
    assert set(np.unique(junk).tolist()) <= alphabet


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"duplicates": 0.7, "junk": 0.3}, "below 1"),
        ({"duplicates": -0.1}, ">= 0"),
        ({"kinds": ("bytes", "spam")}, "spam"),
        ({"kinds": ()}, "none given"),
        ({"generated": 0.5, "generate": numbered}, "below 1"),
        ({"generated": 0.1}, "give generate"),
        ({"duplicates": 0.0, "junk": 0.0}, "500 clean rows, there are 400"),
    ],
)
def test_impossible_mixes_are_refused(options, words):
    with pytest.raises(DataError, match=words):
        build(**options)
