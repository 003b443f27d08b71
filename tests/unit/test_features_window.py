"""A window that moves on: what enters is as if all had been computed anew, what stays is left as it is."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
import pytest

from grace_ds.data import tokens
from grace_ds.features.content import COLUMNS, ContentFeatures, TokenReader, content_features, follow_window
from grace_ds.features.corpus_cache import CorpusCache
from grace_ds.features.tfidf import TfIdf
from tests.unit.test_duplicates import exact_density
from tests.unit.test_features_content import Counted, N, Ranks, by_id, corpus, quality_model, run, same_bits

# By version the ids of the window: it rolls, jumps to others altogether, comes back, and stands still.
ORDER = np.random.default_rng(4).permutation(N)
WINDOWS = [np.sort(ORDER[part]) for part in (slice(50), slice(10, 60), slice(60, N), slice(5, 55), slice(5, 55))]


def texts() -> list[list[int]]:
    """Few tokens, so that 6-grams come again, copies far apart, and samples without a 6-gram."""
    rng = np.random.default_rng(3)
    rows = [rng.integers(0, 3, rng.integers(0, 40)).tolist() for _ in range(N)]
    for i in range(0, N, 7):
        rows[i] = rows[i // 2]
    rows[12], rows[58], rows[70] = [], [1, 2], []
    return rows


def rolled(
    rows: Any, size: int = 1, trusted: Any = None, windows: list[np.ndarray] = WINDOWS, cache: Any = None, **options: Any
) -> list[list[ContentFeatures]]:
    """For each version what every rank holds; a sample stays on one rank."""
    ranks = Ranks(size)
    made: list[list[ContentFeatures]] = [[None] * size for _ in windows]  # type: ignore[list-item]
    failures: list[BaseException] = []

    def one(rank: int) -> None:
        common = {"dim": 32, "seed": 3, "allreduce": ranks.sum_of(rank), "trusted": trusted}
        common["cache"] = CorpusCache(*cache, leads=rank == 0) if cache is not None else None
        reader, kept = TokenReader(rows), None
        try:
            for version, window in enumerate(windows):
                own = window[window % 5 * size // 5 == rank]
                if kept is None:
                    kept = content_features(reader, own, **common, **options, keep_counts=True)
                else:
                    kept = follow_window(kept, reader, own, **common)
                made[version][rank] = kept
        except BaseException as error:
            failures.append(error)
            ranks.barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if failures:
        raise failures[0]
    return made


def entrants(version: int) -> np.ndarray:
    """Places in the window of ``version`` of the samples that were not in the one before."""
    return np.flatnonzero(~np.isin(WINDOWS[version], WINDOWS[version - 1]))


def test_the_counts_of_a_moved_window_are_those_of_all_its_samples() -> None:
    rows = texts()
    for version, (found,) in enumerate(rolled(rows)):
        anew = run(rows, [WINDOWS[version]], keep_counts=True)[0]
        assert found.ids.tolist() == WINDOWS[version].tolist()
        assert found.counts.grams.tobytes() == anew.counts.grams.tobytes()
        grams = sum(max(len(rows[i]) - 5, 0) for i in WINDOWS[version])
        assert found.counts.grams.sum() == grams and found.counts.grams.min() == 0


def test_what_enters_has_the_density_that_it_has_in_the_whole_new_window() -> None:
    rows = texts()
    made = rolled(rows)
    for version in range(1, len(WINDOWS)):
        (found,), new = made[version], entrants(version)
        anew = run(rows, [WINDOWS[version]])[0]
        assert found.density[new].tobytes() == anew.density[new].tobytes()
        exact = exact_density([rows[i] for i in WINDOWS[version]])  # counted with tuples, without hashing
        np.testing.assert_allclose(found.density[new], np.array(exact)[new], rtol=1e-6)
    assert made[1][0].density.any() and len(entrants(1)) == 10 and len(entrants(4)) == 0


def test_what_stays_keeps_its_features_bit_for_bit_and_what_enters_reads_as_it_would_anew() -> None:
    rows, trusted = texts(), quality_model()
    made = rolled(rows, trusted=trusted, want_statistics=True)
    moved = False
    for version in range(1, len(WINDOWS)):
        (before,), (after,) = made[version - 1], made[version]
        stays = np.intersect1d(before.ids, after.ids)
        a, b = (part.take(np.searchsorted(part.ids, stays)) for part in (before, after))
        anew = run(rows, [WINDOWS[version]], trusted, want_statistics=True)[0]
        for name in COLUMNS:
            assert getattr(a, name).tobytes() == getattr(b, name).tobytes(), name
            assert getattr(after, name).dtype == getattr(anew, name).dtype
            moved |= name == "density" and not np.array_equal(after.density, anew.density)
        for name in ("quality", "statistics"):  # of a sample alone, whatever the window
            assert getattr(after, name).tobytes() == getattr(anew, name).tobytes(), name
    assert moved  # of samples that have stayed the density in the new window would be another


def test_vectors_of_all_windows_are_in_the_space_of_the_first() -> None:
    rows = texts()
    made = rolled(rows)
    block = TokenReader(rows).all()
    first = TfIdf(32, 3)
    first.add(TokenReader([rows[i] for i in WINDOWS[0]]).all())
    first.reduce(lambda x: x)
    later = TfIdf.of(32, 3, first.totals)
    terms = later.add(block)
    later.reduce(lambda x: 1 / 0)  # its weights are fixed: there is nothing to sum up
    wanted = later.vectors(len(rows), terms)
    for version, (found,) in enumerate(made):
        assert found.vectors.tobytes() == wanted[WINDOWS[version]].tobytes()
        assert found.counts.terms.tobytes() == first.totals.tobytes()
    anew = run(rows, [WINDOWS[2]])[0]
    assert not np.array_equal(anew.vectors, made[2][0].vectors)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_any_split_over_ranks_gives_the_same(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, trusted = texts(), quality_model()
    options = {"trusted": trusted, "want_statistics": True}
    one = rolled(rows, **options)
    monkeypatch.setattr(tokens, "BLOCK_TOKENS", 100)
    for alone, parts in zip(one, rolled(rows, size, **options), strict=True):
        assert same_bits(by_id(alone), by_id(parts))
        assert np.sort(np.concatenate([p.ids for p in parts])).tolist() == alone[0].ids.tolist()
        for part in parts:
            assert (np.diff(part.ids) > 0).all()
            assert part.counts.grams.tobytes() == alone[0].counts.grams.tobytes()
            assert part.counts.terms.tobytes() == alone[0].counts.terms.tobytes()


def test_a_rank_whose_share_is_empty_takes_part() -> None:
    rows = texts()
    windows = [np.arange(0, 40, 5), np.arange(0, 60), np.arange(0, 40, 5)]  # at first and at last all on the first rank
    one, two = rolled(rows, 1, windows=windows), rolled(rows, 2, windows=windows)
    assert [len(parts[1].ids) for parts in two] == [0, 24, 0]
    for alone, parts in zip(one, two, strict=True):
        assert same_bits(by_id(alone), by_id(parts))


def test_of_a_moved_window_only_what_enters_and_what_leaves_is_read() -> None:
    data = Counted(texts())
    kept = content_features(TokenReader(data), WINDOWS[0], dim=32, seed=3, allreduce=lambda x: x, keep_counts=True)
    for version in (1, 3, 4):
        data.reads.clear()
        before, kept = kept, follow_window(kept, TokenReader(data), WINDOWS[version], dim=32, seed=3, allreduce=lambda x: x)
        assert dict(data.reads) == dict.fromkeys(np.setxor1d(before.ids, kept.ids).tolist(), 1)
    assert not data.reads and same_bits(by_id([before]), by_id([kept]))


@pytest.mark.parametrize(
    "without", [{"want_density": False}, {"want_tfidf": False}, {"want_density": False, "want_tfidf": False}]
)
def test_parts_that_are_left_out_stay_out(without: dict[str, bool]) -> None:
    rows, trusted = texts(), quality_model()
    for version, (found,) in enumerate(rolled(rows, trusted=trusted, **without)):
        anew = run(rows, [WINDOWS[version]], trusted, **without)[0]
        assert (found.vectors is None) == (anew.vectors is None) and found.statistics is None
        assert found.quality.tobytes() == anew.quality.tobytes()
        assert without.get("want_density", True) or not found.density.any()
        assert len(found.counts.grams) == (0 if "want_density" in without else 1 << 22)


def test_a_window_goes_on_from_the_cache_as_it_would_without(tmp_path: Any) -> None:
    data, fresh = Counted(corpus()), rolled(corpus())
    for size, expected in ((1, dict.fromkeys(range(N), 1)), (1, {}), (3, {})):  # computed, then from the cache
        data.reads.clear()
        for a, parts in zip(fresh, rolled(data, size, cache=("data", tmp_path)), strict=True):
            assert same_bits(by_id(a), by_id(parts)) and a[0].counts.grams.tobytes() == parts[0].counts.grams.tobytes()
        # A sample that leaves and comes back is read once in all, by the run that meets it first.
        assert data.reads == expected
    assert run(corpus(), [WINDOWS[0]], cache=("data", tmp_path))[0].counts is None


def test_rows_are_taken_with_all_their_columns() -> None:
    found = run(texts(), [np.arange(N)], quality_model(), want_statistics=True, keep_counts=True)[0]
    part = found.take(np.array([4, 2, 9]))
    assert part.ids.tolist() == [4, 2, 9] and part.counts is found.counts
    for name in COLUMNS:
        assert np.array_equal(getattr(part, name), getattr(found, name)[[4, 2, 9]])
    assert dataclasses.replace(found, vectors=None).take(found.ids < 3).vectors is None
