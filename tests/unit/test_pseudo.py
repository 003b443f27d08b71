"""Typical samples of a pool in which it is known what is junk and what is copied."""

from __future__ import annotations

import numpy as np
import pytest

from grace_ds.features.tokens import TokenBlock
from grace_ds.selection.prior import BigramPrior
from grace_ds.selection.pseudo import typical

VOCAB, N = 60, 1000
GOOD, COPY, JUNK = 0, 1, 2


def markov(n: int, seed: int, length: int = 64) -> list[np.ndarray]:
    """Sequences of one fixed Markov chain."""
    chain = np.cumsum(np.random.default_rng(99).dirichlet(np.full(VOCAB, 0.1), VOCAB), axis=1)
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
    return typical(block.flat, block.offsets)


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
    keep = BigramPrior.fit(block.flat, block.offsets).keep(everyone.flat, everyone.offsets)
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
