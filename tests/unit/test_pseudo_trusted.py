"""Typical samples of a pool in which it is known what is junk and what is copied."""

from __future__ import annotations

import hashlib
import logging

import numpy as np
import pytest

from grace_ds.data.tokens import TokenBlock, TokenReader
from grace_ds.features.pseudo_trusted import typical
from grace_ds.features.quality import QualityModel
from grace_ds.integrations.trusted_set import _typical_of

VOCAB, N = 60, 1000
GOOD, COPY, JUNK = 0, 1, 2


def markov(n: int, seed: int, length: int = 64, which: int = 99, spread: float = 0.1) -> list[np.ndarray]:
    """Sequences of the Markov chain number ``which``."""
    chain = np.cumsum(np.random.default_rng(which).dirichlet(np.full(VOCAB, spread), VOCAB), axis=1)
    rng = np.random.default_rng(seed)
    rows = np.empty((n, length), np.int64)
    rows[:, 0] = rng.integers(0, VOCAB, n)
    for t in range(1, length):
        rows[:, t] = np.minimum((rng.random(n)[:, None] > chain[rows[:, t - 1]]).sum(1), VOCAB - 1)
    return list(rows)


def pool(seed: int = 0, n: int = N) -> tuple[list[np.ndarray], np.ndarray]:
    """Half of it good, 30 % near copies of a few good ones, 20 % junk: shuffled text, random tokens, one token repeated."""
    rng = np.random.default_rng(seed)
    kind = rng.permutation(np.repeat([GOOD, COPY, JUNK], [n // 2, 3 * n // 10, n - n // 2 - 3 * n // 10]))
    good, models = markov(n, seed + 1), markov(12, seed + 2)
    rows = []
    for i, k in enumerate(kind):
        row = (models[i % 12] if k == COPY else good[i]).copy()
        if k == COPY:
            row[rng.integers(0, 64, 3)] = rng.integers(0, VOCAB, 3)
        elif k == JUNK:
            row = (rng.permutation(row), rng.integers(0, VOCAB, 64), rng.integers(VOCAB, 400, 64))[i % 3]
        rows.append(row)
    return rows, kind


def chosen(rows: list[np.ndarray]) -> np.ndarray:
    block = TokenBlock.of(np.arange(len(rows)), rows)
    return typical(block.flat, block.offsets).positions


def shuffled(*kinds: list[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """The rows of all kinds in a random order, and the kind of each."""
    order = np.random.default_rng(0).permutation(sum(map(len, kinds)))
    rows, kind = [row for rows in kinds for row in rows], np.repeat(np.arange(len(kinds)), list(map(len, kinds)))
    return [rows[i] for i in order], kind[order]


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_junk_is_not_typical(seed: int) -> None:
    rows, kind = pool(seed)
    found = chosen(rows)
    assert 300 < len(found) <= 384
    assert (kind[found] == JUNK).mean() < 0.01
    assert (kind[found] == GOOD).sum() >= 100


def test_a_trusted_model_of_the_typical_tells_good_from_junk() -> None:
    rows, kind = pool()
    typical_rows = [rows[i] for i in chosen(rows)]
    block = TokenBlock.of(np.arange(len(typical_rows)), typical_rows)
    everyone = TokenBlock.of(np.arange(N), rows)
    keep = QualityModel.fit(block.flat, block.offsets).quality(everyone.flat, everyone.offsets)
    assert keep[kind == JUNK].mean() < 0.1
    assert keep[kind == GOOD].mean() > 0.6


def test_positions_are_sorted_unique_and_repeatable() -> None:
    rows, _ = pool(n=200)
    found = chosen(rows)
    assert found.dtype == np.int64
    assert (np.diff(found) > 0).all()
    assert len(found) == 80  # two fifths of the pool lie in the band
    assert np.array_equal(found, chosen([row.copy() for row in rows]))


def test_a_small_pool_holds_no_vote() -> None:
    rows, _ = pool(n=100)
    assert len(chosen(rows[:63])) == 0
    assert len(chosen(rows[:64])) > 20
    assert len(chosen(rows[:63] + [np.array([5]), np.array([], np.int64)] * 40)) == 0
    assert len(chosen([])) == 0


def test_samples_that_no_model_can_be_fitted_to_are_passed_over() -> None:
    """Positions stay those of the pool where some of it is empty, of one token, or padded with negative ids."""
    rows, _ = pool(n=300)
    odd = [np.array([], np.int64), np.array([3]), np.concatenate([rows[0], [-100, -100]])]
    mixed = [row for i, good in enumerate(rows) for row in (odd[i % 3], good)]
    found = chosen(mixed)
    assert (found % 2 == 1).all()
    assert np.array_equal(found // 2, chosen(rows))


@pytest.mark.parametrize(("seed", "digest"), [(0, "111cf2f80904d79b"), (10, "855f07e77b09ab84")])
def test_of_samples_of_one_length_the_same_are_taken_as_ever(seed: int, digest: str) -> None:
    """Recorded when all tokens counted alike."""
    assert hashlib.blake2b(chosen(pool(seed)[0]).tobytes(), digest_size=8).hexdigest() == digest


JUNK_KINDS = {
    "another chain": markov(420, 2, 100, which=5),
    "one with fewer ways to go on": markov(420, 2, 100, which=5, spread=0.03),
    "of other tokens": [row + VOCAB for row in markov(420, 2, 100, which=5)],
    "random": list(np.random.default_rng(3).integers(0, VOCAB, (420, 100))),
}


@pytest.mark.parametrize("kind", list(JUNK_KINDS))
def test_junk_of_most_tokens_and_fewer_rows_is_not_what_is_good(kind: str) -> None:
    """42 % of the rows with 53 % of the tokens."""
    rows, of = shuffled(markov(580, 1), JUNK_KINDS[kind])
    block = TokenBlock.of(np.arange(len(rows)), rows)
    found = typical(block.flat, block.offsets)
    assert len(found.positions) > 200
    assert of[found.positions].mean() < 0.01
    assert found.smaller == pytest.approx(0.42, abs=0.02) and found.among < 0.01


@pytest.mark.parametrize("ragged", [False, True])
def test_one_kind_of_text_is_not_two(ragged: bool) -> None:
    lengths = np.random.default_rng(0).integers(10, 64, 1000) if ragged else np.full(1000, 64)
    rows = [row[:n] for row, n in zip(markov(1000, 1), lengths, strict=True)]
    block = TokenBlock.of(np.arange(len(rows)), rows)
    found = typical(block.flat, block.offsets)
    assert (found.smaller, found.among) == (0.0, 0.0) and len(found.positions) == 384


def test_more_samples_than_are_searched_are_told_apart_too() -> None:
    rows, of = shuffled(markov(1500, 1, 40), markov(1000, 2, 50, which=5))
    block = TokenBlock.of(np.arange(len(rows)), rows)
    found = typical(block.flat, block.offsets)
    assert found.smaller == pytest.approx(0.4, abs=0.02) and of[found.positions].mean() < 0.01


def test_two_kinds_are_warned_of_with_their_shares(caplog: pytest.LogCaptureFixture) -> None:
    both, one = shuffled(markov(180, 1), markov(120, 2, which=5))[0], markov(300, 1)
    for rows, says in ((both, True), (one, False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="grace_ds"):
            _typical_of([row.tolist() for row in rows], TokenReader([row.tolist() for row in rows]), 0)
        assert ("two kinds of text, shares 0.60 and 0.40 of its samples" in caplog.text) is says
        assert ("give a trusted set" in caplog.text) is says
