"""Which 6-grams are counted, in how many bins: densities stay right as the window outgrows its table."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grace_ds.comm.local import LocalComm
from grace_ds.config.schema import GraceConfig
from grace_ds.data.order import SeededOrder
from grace_ds.data.pool import Pool
from grace_ds.data.tokens import TokenBlock
from grace_ds.features import duplicates, ngrams
from grace_ds.features.content import TokenReader, content_features
from grace_ds.features.duplicates import NgramCounts, ngram_bins
from grace_ds.features.ngrams import FLOOR, SMALLEST, Sampling, agree_sampling, some
from grace_ds.integrations.setup import Components, Contents
from grace_ds.records import Array
from grace_ds.refresh.state import RefreshState
from tests.unit.test_features_content import Counted, Ranks, by_id, run, same_bits
from tests.unit.test_features_window import rolled

pytestmark = pytest.mark.timeout(120)


def block_of(rows: list[Array]) -> TokenBlock:
    return TokenBlock.of(np.arange(len(rows)), [np.asarray(row, np.int64) for row in rows])


def texts(n: int, length: int, seed: int) -> list[Array]:
    """Words of a few tokens, by Zipf's law, so that 6-grams come again within and between texts as they do in real ones."""
    rng = np.random.default_rng(seed)
    words = [rng.integers(0, 3000, rng.integers(1, 5)) for _ in range(4000)]
    rank = np.exp(rng.random((n, length)) * np.log(len(words))).astype(np.int64) - 1
    return [np.concatenate([words[i] for i in row])[:length] for row in rank]


def counted(rows: list[Array], how: Sampling) -> NgramCounts:
    counts = NgramCounts(how)
    counts.add(block_of(rows))
    counts.reduce(lambda x: x)
    return counts


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tables so small that a few texts fill them, and classes of 6-grams come in."""
    for name, value in {"BITS": 8, "PLENTY_BITS": 10, "MOST_BITS": 11, "PLENTY": 12}.items():
        monkeypatch.setattr(ngrams, name, value)
    monkeypatch.setattr(ngrams, "SMALLEST", Sampling(8))
    yield


def test_densities_of_windows_that_the_smallest_table_holds_are_what_they_were() -> None:
    word = np.arange(20_000 * 129, dtype=np.uint64) * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
    word = (word ^ (word >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    kind = (word >> np.uint64(40)) % np.uint64(7)  # of 7 vocabularies of 4 to 16384 tokens
    flat = ((word >> np.uint64(45)) % (np.uint64(2) << (kind * np.uint64(2) + np.uint64(1)))).astype(np.int64)
    rows = [row[: 129 - i * i % 129] if i % 3 else row for i, row in enumerate(flat.reshape(20_000, 129))]
    for i in range(0, 20_000, 5):
        rows[i] = rows[i // 2]
    found = counted(rows, Sampling.of(sum(max(len(row) - 5, 0) for row in rows), len(rows))).degree(block_of(rows))
    assert len(np.unique(found)) == 23
    digest = hashlib.blake2b(found.astype("<f8").tobytes(), digest_size=16).hexdigest()
    assert digest == "817075cdef9feba6b8e0b56b283ff68a"  # recorded when all windows had 2^22 bins


@pytest.mark.parametrize(
    ("rows", "tokens", "bits", "level"),
    [
        (20_000, 129, 22, 0),
        (80_000, 129, 24, 0),
        (1_000, 512, 22, 0),
        (10_000, 512, 23, 0),
        (100_000, 512, 24, 3),
        (1_000_000, 512, 26, 4),
        (10_000_000, 512, 26, 7),
    ],
)
def test_tables_of_common_windows(rows: int, tokens: int, bits: int, level: int) -> None:
    assert Sampling.of(rows * (tokens - 5), rows) == Sampling(bits, level)


@given(st.integers(0, 2**44), st.integers(1, 2**30))
def test_the_bins_outnumber_the_6_grams_by_half_in_at_most_256_mib(grams: int, samples: int) -> None:
    how = Sampling.of(grams, samples)
    assert 22 <= how.bits <= 26 and how.table_bytes <= 256 << 20
    assert 1.5 * (grams >> how.level) <= 1 << how.bits
    if 1.5 * grams <= 1 << 24:  # nothing is left out without need
        assert how.level == 0
    elif how.level and grams >> how.level < 48 * samples:
        assert 1.5 * (grams >> (how.level - 1)) > 1 << 26


# Plain and thinned, as full as tables are made: with 1.5 to 3 bins a 6-gram.
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**31), st.integers(2, 7), st.sampled_from([0, 1, 3, 5]))
def test_planted_copies_are_as_dense_as_there_are_copies(seed: int, copies: int, level: int) -> None:
    n, length = 900, 120
    rows = texts(n, length, seed)
    planted = texts(120, length, seed + 1)
    once, often = planted[:60], planted[60:]
    near = [row.copy() for row in often for _ in range(copies)]
    for i, row in enumerate(near):  # each with one token of its own
        row[(7 * i) % length] = 5000 + i
    everything = rows + once + near
    grams = (len(everything) * (length - 5)) >> level
    how = Sampling(int(np.ceil(np.log2(1.5 * grams))), level)
    counts = counted(everything, how)
    alone, dense = counts.degree(block_of(once)), counts.degree(block_of(near))
    assert np.median(dense) == copies - 1 or level == 5
    if level < 3:
        assert np.median(alone) == 0
    ratio = (1 / (1 + dense)).mean() / (1 / (1 + alone)).mean()
    assert abs(ratio - 1 / copies) < {0: 0.005, 1: 0.02, 3: 0.05, 5: 0.16}[level]  # of level 5 a text of 120 tokens keeps 4 or 5


def test_a_table_that_is_too_full_shows_in_what_new_texts_would_get() -> None:
    rows = texts(600, 100, 0)
    ratios = []
    for bits in (17, 13, 11):
        once, copied = counted(rows, Sampling(bits)).tried(block_of(rows[:100])).sum(0)
        ratios.append(copied / once)
    assert 0.19 < ratios[0] < 0.22 < ratios[1] < ratios[2] and ratios[2] > 0.6
    # It predicts what copies that are truly planted get.
    for bits, prediction_skill in zip((17, 13, 11), ratios, strict=True):
        new = texts(60, 100, 9)
        counts = counted(rows + new[:30] + new[30:] * 5, Sampling(bits))
        alone, dense = (1 / (1 + counts.degree(block_of(part))) for part in (new[:30], new[30:]))
        assert abs(dense.mean() / alone.mean() - prediction_skill) < 0.08


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.lists(st.integers(0, 60), min_size=1, max_size=20))
def test_of_every_sample_enough_is_counted(seed: int, level: int, lengths: list[int]) -> None:
    rows = [np.random.default_rng(seed + i).integers(0, 9, n) for i, n in enumerate(lengths)]
    found, everything = ngram_bins(block_of(rows), Sampling(20, level)), ngram_bins(block_of(rows), Sampling(20, 0))
    assert found.times is not None and len(found.bins) == found.lengths.sum() == len(found.times)
    ends, all_ends = np.cumsum(found.lengths), np.cumsum(everything.lengths)
    for i in range(len(rows)):
        mine = found.bins[ends[i] - found.lengths[i] : ends[i]]
        whole, times = np.unique(everything.bins[all_ends[i] - everything.lengths[i] : all_ends[i]], return_counts=True)
        assert len(np.unique(mine)) >= min(FLOOR, len(whole))
        at = np.searchsorted(whole, mine)
        assert np.array_equal(whole[at], mine)
        assert np.array_equal(times[at], found.times[ends[i] - found.lengths[i] : ends[i]])


def test_a_sample_is_counted_alike_whatever_stands_beside_it() -> None:
    rows, how = [row[: 6 + 11 * i] for i, row in enumerate(texts(12, 140, 3))], Sampling(20, 5)
    run_on_all_ranks = ngram_bins(block_of(rows), how)
    alone = [ngram_bins(block_of([row]), how) for row in rows]
    assert run_on_all_ranks.bins.tolist() == [b for one in alone for b in one.bins.tolist()]
    assert run_on_all_ranks.lengths.tolist() == [int(one.lengths[0]) for one in alone]


def test_padding_does_not_outweigh_a_text_where_6_grams_are_left_out() -> None:
    pads = np.array([np.r_[row[:60], np.zeros(40, np.int64)] for row in texts(400, 100, 5)])
    for token in range(64):  # one padding in 16 is of the class
        rows = [np.where(row == 0, 7000 + token, row) for row in pads]
        dense = counted(rows, Sampling(20, 4)).degree(block_of(rows[:50]))
        assert np.median(dense) < 5, token


def test_one_class_serves_all_tables() -> None:
    row = [np.random.default_rng(2).integers(0, 1 << 20, 60_000)]
    large = ngram_bins(block_of(row), Sampling(26, 3)).bins
    assert np.array_equal(large >> 4, ngram_bins(block_of(row), Sampling(22, 3)).bins)
    assert abs(len(large) / (60_000 / 8) - 1) < 0.03
    expected = (1 << 12) * (1 - np.exp(-len(large) / (1 << 12)))  # bins of a class are as spread as those of all
    assert abs(len(np.unique(large >> 14)) - expected) < 0.02 * expected


def test_all_ranks_agree_on_the_sampling_of_a_window_of_any_lengths(small: None) -> None:
    rng = np.random.default_rng(8)
    rows = [rng.integers(0, 99, n) for n in rng.integers(0, 400, 2000)]
    found = []
    for size in (1, 2, 3, 4):
        ranks, made = Ranks(size), {}

        def one(rank: int, ranks: Ranks = ranks, made: dict[int, Any] = made, size: int = size) -> None:
            made[rank] = agree_sampling(TokenReader(rows), np.arange(rank, 2000, size), ranks.sum_of(rank))

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        found += [made[rank] for rank in range(size)]
    assert len(found) == 10 and len(set(found)) == 1
    assert found[0] == Sampling.of(sum(max(len(row) - 5, 0) for row in rows), 2000)
    assert found[0].level > 3


def test_a_window_that_surely_fits_is_not_read_for_its_lengths() -> None:
    data = Counted([[1, 2, 3]] * 600)
    assert agree_sampling(TokenReader(data), np.arange(600), lambda x: x) == SMALLEST
    assert not data.reads
    data = Counted([[1, 2, 3]] * 6000)
    assert agree_sampling(TokenReader(data), np.arange(6000), lambda x: x) == SMALLEST
    assert 400 < len(data.reads) < 650


def test_samples_are_looked_at_by_their_ids_alone() -> None:
    ids = np.random.default_rng(0).permutation(50_000)
    chosen = ids[some(ids, 500, 50_000)]
    assert 420 < len(chosen) < 580
    halves = [part[some(part, 500, 50_000)] for part in (ids[:9000], ids[9000:])]
    assert set(chosen.tolist()) == set(np.concatenate(halves).tolist())
    assert some(ids[:500], 500, 500).all()


def test_counts_beyond_32_bits_are_kept_in_64(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = texts(30, 40, 1)
    plain = counted(rows, SMALLEST)
    assert plain.total.dtype == np.int32
    monkeypatch.setattr(duplicates, "_SAFE", 500)
    wide = NgramCounts()
    wide.add(block_of(rows))
    assert wide.counts.dtype == np.int64  # before the sum: one rank's counts alone can be that many
    wide.reduce(lambda x: x)
    assert wide.total.dtype == np.int64 and np.array_equal(wide.total, plain.total)
    assert np.array_equal(wide.degree(block_of(rows)), plain.degree(block_of(rows)))
    # A window of which nearly all leaves goes back to the smaller table once its counts surely fit.
    fewer = NgramCounts(known=wide.total)
    fewer.drop(block_of(rows[2:]))
    fewer.reduce(lambda x: x)
    assert fewer.total.dtype == np.int64
    again = NgramCounts(known=fewer.total)
    again.reduce(lambda x: x)
    assert again.total.dtype == np.int32 and np.array_equal(again.total, counted(rows[:2], SMALLEST).total)


def window_rows() -> list[Array]:
    rng = np.random.default_rng(6)
    rows = [row[: rng.integers(0, 120)] for row in texts(90, 120, 6)]
    for i in range(0, 90, 4):
        rows[i] = rows[i // 2]
    return rows


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_thinned_window_moves_on_alike_at_any_number_of_ranks(size: int, small: None, tmp_path: Path) -> None:
    rows = window_rows()
    one = rolled(rows, 1, want_tfidf=False)
    assert one[0][0].counts is not None and one[0][0].counts.level[0] >= 2
    for _ in range(2):  # computed, then from the cache
        for alone, parts in zip(one, rolled(rows, size, want_tfidf=False, cache=("x", tmp_path)), strict=True):
            assert same_bits(by_id(alone), by_id(parts))
            for part in parts:
                assert part.counts is not None and alone[0].counts is not None
                assert part.counts.grams.tobytes() == alone[0].counts.grams.tobytes()
                assert part.counts.sampling == one[0][0].counts.sampling
                assert part.density_ratio == alone[0].density_ratio or np.isnan(part.density_ratio)


def test_the_counts_of_a_thinned_window_that_has_moved_are_those_of_all_its_samples(small: None) -> None:
    rows = window_rows()
    for (found,) in rolled(rows, want_tfidf=False):
        assert found.counts is not None
        anew = counted([rows[i] for i in found.ids], found.counts.sampling)
        assert np.array_equal(anew.total, found.counts.grams) and anew.total.sum() > 100


def test_a_checkpoint_says_which_6_grams_were_counted(small: None, tmp_path: Path) -> None:
    rows = window_rows()
    (kept,) = run(rows, [np.arange(50)], want_tfidf=False, keep_counts=True)
    files, shared = RefreshState(content=kept).save(tmp_path, True, 0, 1)
    loaded = RefreshState.load(tmp_path, files, shared, 0, 1).content
    assert loaded is not None and loaded.counts is not None and kept.counts is not None
    assert loaded.counts.sampling == kept.counts.sampling != SMALLEST


def test_the_ratio_of_copies_is_told_and_where_it_is_off_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows, config = texts(600, 100, 0), GraceConfig(recipe="content")
    assert abs(run(rows, [np.arange(600)])[0].density_ratio - 0.2) < 0.02
    assert np.isnan(run(rows, [np.arange(600)], want_density=False)[0].density_ratio)
    parts = Components(
        Pool(600, 300, 0.2, 5, 8, 0), SeededOrder(600, 0), TokenReader(rows), None, None, np.arange(0), np.arange(0)
    )
    with caplog.at_level(logging.WARNING):
        found = Contents(LocalComm(5.0), config, parts)(None, np.arange(300))
        assert not caplog.records and abs(found.density_ratio - 0.2) < 0.02
        monkeypatch.setattr(ngrams, "_bits", lambda grams: 9)
        monkeypatch.setattr(ngrams, "BITS", 9)
        monkeypatch.setattr(ngrams, "SMALLEST", Sampling(9))
        contents = Contents(LocalComm(5.0), config, parts)
        kept = contents(None, np.arange(300))
        assert kept.density_ratio > 0.8
        contents(kept, np.arange(100, 400))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and f"{kept.density_ratio:.2f}" in said[0] and "set window" in said[0] and "300" in said[0]


def test_the_ratio_is_the_same_however_the_samples_are_shared_out() -> None:
    rows = texts(700, 60, 4)
    found = {part.density_ratio for size in (1, 3) for part in run(rows, [np.arange(r, 700, size) for r in range(size)])}
    assert len(found) == 1
    one = content_features(TokenReader(rows), np.arange(700), dim=8, seed=0, allreduce=lambda x: x)
    assert one.density_ratio in found
