"""The two sweeps together: sharding, blocking, memory limit, cache."""

from __future__ import annotations

import logging
import threading
from collections import Counter

import numpy as np
import pytest

from grace_ds.data import tokens
from grace_ds.errors import DataError
from grace_ds.features import cache as feature_cache
from grace_ds.features.columns import read_grams, write_grams
from grace_ds.features.content import TokenReader, content_features
from grace_ds.features.corpus_cache import CorpusCache, WindowFacts
from grace_ds.features.duplicates import ngram_bins
from grace_ds.features.ngrams import Sampling
from grace_ds.features.quality import QualityModel
from grace_ds.features.row_files import Ragged, write_rows
from grace_ds.features.tfidf import TERMS, Terms

N = 90


def corpus(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 40, rng.integers(0, 70)).tolist() for _ in range(N)]


class Counted:
    """A dataset that counts how often each item is read."""

    def __init__(self, rows):
        self.rows, self.reads = rows, Counter()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.reads[index] += 1
        return np.array(self.rows[index], np.int64)


class Ranks:
    """A sum over threads that stand for ranks; every wait has a limit."""

    def __init__(self, size):
        self.barrier, self.parts = threading.Barrier(size, timeout=30), {}

    def sum_of(self, rank):
        def allreduce(x):
            self.parts[rank] = x
            self.barrier.wait()
            total = sum(self.parts.values())
            self.barrier.wait()
            return total

        return allreduce


def flat_of(rows):
    block = TokenReader(rows).all()
    return block.flat, block.offsets


def quality_model():
    return QualityModel.fit(*flat_of(corpus(seed=5)), 120)


def run(rows, shares, trusted=None, **options):
    """Features of every rank's share, in threads; returns them in the order of the ranks."""
    ranks, out, failures, cached = Ranks(len(shares)), {}, [], options.pop("cache", None)

    def one(rank):
        try:
            cache = CorpusCache(*cached, leads=rank == 0) if cached is not None else None
            out[rank] = content_features(
                TokenReader(rows),
                np.asarray(shares[rank], np.int64),
                **{"dim": 32, "seed": 3, **options},
                allreduce=ranks.sum_of(rank),
                trusted=trusted,
                cache=cache,
            )
        except BaseException as error:
            failures.append(error)
            ranks.barrier.abort()

    threads = [threading.Thread(target=one, args=(r,)) for r in range(len(shares))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if failures:
        raise failures[0]
    return [out[r] for r in range(len(shares))]


def by_id(parts):
    order = np.argsort(np.concatenate([p.ids for p in parts]))
    names = [name for name in ("density", "quality", "vectors", "statistics") if getattr(parts[0], name) is not None]
    return [np.concatenate([getattr(p, name) for p in parts])[order] for name in names]


def same_bits(a, b):
    return all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


def test_bit_identical_however_sharded_and_blocked(monkeypatch):
    rows, trusted = corpus(), quality_model()
    whole = by_id(run(rows, [np.arange(N)], trusted))
    assert whole[0].dtype == whole[1].dtype == whole[2].dtype == np.float32
    assert len(np.unique(whole[1])) > 10
    uneven = [np.arange(0, N, 3), np.array([], np.int64), np.setdiff1d(np.arange(N), np.arange(0, N, 3))]
    assert same_bits(whole, by_id(run(rows, uneven, trusted)))
    for tokens_a_block in (1, 100, 1000):
        monkeypatch.setattr(tokens, "BLOCK_TOKENS", tokens_a_block)
        assert same_bits(whole, by_id(run(rows, [np.arange(N)], trusted)))
        assert same_bits(whole, by_id(run(rows, uneven, trusted, memory_bytes=1500)))


def test_kept_terms_give_the_same_vectors_as_terms_made_again(monkeypatch):
    monkeypatch.setattr(tokens, "BLOCK_TOKENS", 200)
    rows = [*corpus(), [], [], [5]]  # ragged, some without tokens, in several blocks
    rows[3:5] = [[], [7] * 300]
    ids, made, of = np.arange(len(rows)), [], Terms.of
    monkeypatch.setattr(Terms, "of", staticmethod(lambda block: made.append(len(block)) or of(block)))
    found, blocks = [], []
    for memory_bytes in (0, 10_000, 1 << 20):  # no terms are kept, those of some blocks (with all tokens), all of them
        made.clear()
        found.append(run(rows, [ids], memory_bytes=memory_bytes)[0].vectors)
        blocks.append(len(made))
    assert blocks[0] > blocks[1] > blocks[2] > 5
    assert same_bits(found[:1] * 2, found[1:])


def test_items_are_read_once_or_where_memory_is_short_twice(monkeypatch):
    monkeypatch.setattr(tokens, "BLOCK_TOKENS", 200)
    data = Counted(corpus())
    run(data, [np.arange(N)])
    assert set(data.reads.values()) == {1}
    data.reads.clear()
    run(data, [np.arange(N)], memory_bytes=2000)
    assert set(data.reads.values()) == {1, 2}
    data.reads.clear()
    run(data, [np.arange(N)], trusted=quality_model(), want_density=False, want_tfidf=False, memory_bytes=0)
    assert set(data.reads.values()) == {1}


def test_large_and_negative_token_ids_survive_the_memory(monkeypatch):
    monkeypatch.setattr(tokens, "BLOCK_TOKENS", 50)
    rows = [(np.array(r, np.int64) * 10_007 - 90_000).tolist() for r in corpus()] + [[2**40] * 9]
    rows[:20] = [(np.array(r, np.int64) - 9).tolist() for r in corpus()[:20]]
    once = by_id(run(rows, [np.arange(N + 1)], quality_model()))
    assert same_bits(once, by_id(run(rows, [np.arange(N + 1)], quality_model(), memory_bytes=0)))


def test_parts_can_be_left_out():
    part = run(corpus(), [np.arange(N)], want_density=False, want_tfidf=False)[0]
    assert part.quality is None
    assert part.vectors is None
    assert part.density.tolist() == [0.0] * N
    part = run(corpus(), [np.arange(N)], want_density=False)[0]
    assert part.vectors is not None


def test_statistics_are_the_trusted_models_however_sharded(tmp_path, monkeypatch):
    rows, trusted, shares = corpus(), quality_model(), [np.arange(0, N, 2), np.array([], np.int64), np.arange(1, N, 2)]
    block = TokenReader(rows).all()
    monkeypatch.setattr(tokens, "BLOCK_TOKENS", 200)  # several blocks a rank
    parts = run(rows, shares, trusted, want_statistics=True)
    assert parts[1].statistics.shape == (0, 5)
    assert same_bits(by_id(parts)[3:], [trusted.examine(block.flat, block.offsets)[1]])
    assert same_bits(by_id(parts)[:3], by_id(run(rows, shares, trusted)))
    for _ in range(2):  # computed, then from the cache
        kept = run(rows, shares, trusted, want_statistics=True, cache=("data", tmp_path))
        assert same_bits(by_id(parts), by_id(kept))
    assert run(rows, shares, trusted, cache=("data", tmp_path))[0].statistics is None
    assert run(rows, shares, None, want_statistics=True)[0].statistics is None


def test_density_looks_at_the_whole_pool():
    rows = [list(range(20)), list(range(20)), list(range(100, 120))]
    parts = run(rows, [[0], [1], [2]])
    assert [p.density.tolist() for p in parts] == [[1.0], [1.0], [0.0]]
    assert run(rows, [[0], [], [2]])[0].density.tolist() == [0.0]


def test_cache_hit_reads_no_items(tmp_path):
    data, shares = Counted(corpus()), [np.arange(0, N, 2), np.arange(1, N, 2)]
    options = {"trusted": quality_model(), "cache": ("data", tmp_path)}
    fresh = by_id(run(data, shares, **options))
    data.reads.clear()
    assert same_bits(fresh, by_id(run(data, shares, **options)))
    assert not data.reads
    # Other ranks, threads and limits read what those have written.
    assert same_bits(fresh, by_id(run(data, [np.arange(N)], threads=3, memory_bytes=0, **options)))
    assert not data.reads


@pytest.mark.parametrize(
    "change",
    [{"cache": ("other",)}, {"trusted": "other"}, {"dim": 16}, {"seed": 4}, {"want_statistics": True}, {"fewer": True}],
)
def test_cache_is_not_used_for_another_question(tmp_path, change):
    data, options = Counted(corpus()), {"trusted": quality_model(), "cache": ("data", tmp_path)}
    run(data, [np.arange(N)], **options)
    data.reads.clear()
    shares = [np.arange(N - 1 if change.pop("fewer", False) else N)]
    if "cache" in change:
        change["cache"] += (tmp_path,)
    if "trusted" in change:
        change["trusted"] = QualityModel.fit(*flat_of(corpus(seed=6)), 120)
    asked = by_id(run(data, shares, **(options | change)))
    assert set(data.reads) == set(shares[0].tolist())
    assert same_bits(
        asked, by_id(run(corpus(), shares, **{name: value for name, value in (options | change).items() if name != "cache"}))
    )


def test_vectors_of_two_windows_are_kept_apart(tmp_path):
    windows, data = [[np.arange(N)], [np.arange(N // 2)]], Counted(corpus())
    fresh = [by_id(run(corpus(), window)) for window in windows]
    assert fresh[0][1][: N // 2].tobytes() != fresh[1][1].tobytes()  # the weights of their terms differ
    for _ in range(2):
        data.reads.clear()
        for window, expected in zip(windows, fresh, strict=True):
            assert same_bits(expected, by_id(run(data, window, cache=("data", tmp_path))))
    assert not data.reads


@pytest.mark.parametrize("change", [{"trusted": None}, {"want_tfidf": False}, {"want_density": False}])
def test_what_asks_for_less_reads_nothing(tmp_path, change):
    data, options = Counted(corpus()), {"trusted": quality_model(), "cache": ("data", tmp_path)}
    run(data, [np.arange(N)], **options)
    data.reads.clear()
    found = by_id(run(data, [np.arange(N)], **(options | change)))
    assert not data.reads
    assert same_bits(found, by_id(run(corpus(), [np.arange(N)], **({"trusted": options["trusted"]} | change))))


def test_of_a_cache_without_statistics_the_rest_is_read(tmp_path):
    """Scores are computed anew; 6-grams and vectors are not: each item is read once, in the first sweep."""
    data, options = Counted(corpus()), {"trusted": quality_model(), "cache": ("data", tmp_path)}
    run(data, [np.arange(N)], **options)
    data.reads.clear()
    run(data, [np.arange(N)], want_statistics=True, memory_bytes=0, **options)
    assert data.reads == dict.fromkeys(range(N), 1)


@pytest.mark.parametrize("threads", [2, 5])
def test_any_number_of_threads_gives_the_same_bits(monkeypatch, threads):
    rows, trusted = corpus(), quality_model()
    whole = by_id(run(rows, [np.arange(N)], trusted, want_statistics=True))
    monkeypatch.setattr(tokens, "BLOCK_TOKENS", 100)
    for limit in (0, 3000, 1 << 28):
        found = run(rows, [np.arange(N)], trusted, want_statistics=True, threads=threads, memory_bytes=limit, keep_counts=True)
        assert same_bits(whole, by_id(found))
        assert found[0].counts.grams.sum() == sum(max(len(row) - 5, 0) for row in rows)
        assert found[0].counts.terms[-1] == N


def test_an_error_in_a_thread_ends_it(monkeypatch):
    monkeypatch.setattr(tokens, "BLOCK_TOKENS", 100)

    class Broken:
        def quality(self, flat, offsets):
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        run(corpus(), [np.arange(N)], Broken(), threads=3)
    assert threading.active_count() < 10


def test_cache_is_not_used_for_the_same_share_of_another_pool(tmp_path):
    rows = [list(range(20))] * 3
    first = run(rows, [[0], [1]], cache=("data", tmp_path))
    second = run(rows, [[0], [1, 2]], cache=("data", tmp_path))
    alone = run(rows, [[0]], cache=("data", tmp_path))  # fewer ranks, each with a file of its share
    assert [part[0].density[0] for part in (first, second, alone)] == [1.0, 2.0, 0.0]


@pytest.mark.parametrize("kind", ["scores", "grams", "vectors", "features"])
@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "other"])
def test_a_damaged_cache_file_is_computed_anew_and_mended(tmp_path, damage, kind, caplog):
    shares = [np.arange(0, N, 2), np.arange(1, N, 2)]
    fresh = by_id(run(corpus(), shares, trusted=quality_model(), cache=("data", tmp_path)))
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    file = next(path for path in files if kind in str(path.relative_to(tmp_path)))
    other = next(path for path in files if kind not in str(path.relative_to(tmp_path)))
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    damaged = {"torn": content[:-40], "flipped": content, "empty": b"", "other": other.read_bytes()}[damage]
    file.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        assert same_bits(fresh, by_id(run(corpus(), shares, trusted=quality_model(), cache=("data", tmp_path))))
    assert str(file) in caplog.text
    caplog.clear()
    assert same_bits(fresh, by_id(run(corpus(), shares, trusted=quality_model(), cache=("data", tmp_path))))
    assert not caplog.text  # it was repaired


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore")
def test_whatever_byte_of_a_cache_file_is_flipped_it_is_not_read_as_something_else(tmp_path):
    arrays = {"density": np.arange(7, dtype=np.float32), "quality": np.ones(3, np.float32)}
    feature_cache.store(tmp_path, "ab", arrays)
    path, read = feature_cache.path_of(tmp_path, "ab"), 0
    whole = path.read_bytes()
    for at in range(len(whole)):
        for flip in (1, 0xFF):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
            found = feature_cache.load(tmp_path, "ab")
            if found is not None:  # dates and the like are not looked at
                assert found.keys() == arrays.keys() and all(np.array_equal(found[n], a) for n, a in arrays.items())
                read += 1
    assert 0 < read < len(whole)


def test_a_cache_folder_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    feature_cache.store(tmp_path / "file" / "below", "ab", {"x": np.zeros(2)})
    assert "features.cache_dir" in caplog.text


def test_an_item_without_tokens_stops_it():
    with pytest.raises(DataError, match="sample 1: no token ids"):
        run([[1, 2], "text"], [[0, 1]])


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("grams", [2**31, 1, 2]),  # beyond the table
        ("scores", [0] * 6),  # a quality of 0
        ("scores", np.array([np.nan, 0, 0, 0, 0, 0], np.float32).view(np.uint32).tolist()),
        ("scores", np.array([0.5, 0, np.inf, 0, 0, 0], np.float32).view(np.uint32).tolist()),
        ("scores", [1, 2, 3]),
        ("vectors", np.full(32, np.nan, np.float32).view(np.uint32).tolist()),
        ("vectors", np.full(32, 2.0, np.float32).view(np.uint32).tolist()),
        ("vectors", [0] * 31),
    ],
)
def test_rows_that_cannot_have_been_computed_are_computed_anew(tmp_path, caplog, kind, row):
    """A hostile file may have any words, with the checks that belong to them."""
    options = {"trusted": quality_model(), "want_statistics": True}
    fresh = by_id(run(corpus(), [np.arange(N)], **options, cache=("data", tmp_path)))
    folder = next(tmp_path.glob(f"{kind}-*"))
    for file in folder.iterdir():
        file.unlink()
    forged = Ragged(np.full(N, len(row), np.int64), np.array(row * N, np.uint32))
    write_rows(folder, folder.name.removeprefix(f"{kind}-"), np.arange(N), forged)
    with caplog.at_level(logging.WARNING):
        assert same_bits(fresh, by_id(run(corpus(), [np.arange(N)], **options, cache=("data", tmp_path))))
    assert "not of the form that is computed" in caplog.text


@pytest.mark.parametrize("row", [[1, 2, 0, 1], [1, 2, 1, 2**31], [1, 2, 3], [2**31, 1]])
def test_sampled_6_grams_that_cannot_have_been_counted_are_not_read(tmp_path, row):
    """At a level above 0 a row is its bins, then how often each occurs."""
    sampling = Sampling(24, 2)
    files = CorpusCache("data", tmp_path).grams(sampling)
    good = ngram_bins(TokenReader([list(range(40)), [], list(range(7, 90))]).all(), sampling)
    write_grams(files, np.array([3, 5, 8]), good)
    files.add(np.array([6]), Ragged(np.array([len(row)]), np.array(row, np.uint32)))
    files.flush()
    found, grams = read_grams(files, np.arange(10), sampling)
    assert np.flatnonzero(found).tolist() == [3, 5, 8]
    for name in ("bins", "lengths", "times"):
        assert getattr(grams, name).tolist() == getattr(good, name).tolist()


def test_facts_of_a_window_that_cannot_have_been_written_are_refused(tmp_path):
    totals = np.zeros(TERMS + 1, np.int64)
    totals[[3, -1]] = 5, 9
    good = {"sampling": np.array([22, 1]), "totals": totals}
    wrong = [
        {"sampling": np.array([60, 1])},
        {"sampling": np.array([22, -1])},
        {"sampling": np.array([22.0, 1])},
        {"totals": totals[1:]},
    ]
    wrong += [{"totals": -totals}, {"totals": totals[::-1]}, {"sampling": np.zeros((2, 2), np.int64)}]
    cache = CorpusCache("data", tmp_path)
    cache.keep_window((1, 2), WindowFacts(Sampling(22, 1), totals))
    (file,) = tmp_path.iterdir()
    assert cache.window((1, 2)).sampling == Sampling(22, 1) and cache.window((1, 3)) is None
    key = file.stem.removeprefix("features-")
    for change in wrong:
        feature_cache.store(tmp_path, key, good | change)
        assert cache.window((1, 2)) is None, change
    assert not CorpusCache("data", tmp_path / "other", leads=False).keep_window((1, 2), WindowFacts(None, totals))
    assert not (tmp_path / "other").exists()


def test_a_compressed_archive_is_not_unpacked(tmp_path, caplog):
    np.savez_compressed(feature_cache.path_of(tmp_path, "ab"), x=np.zeros(1 << 24, np.uint8))
    assert feature_cache.path_of(tmp_path, "ab").stat().st_size < 1 << 17
    assert feature_cache.load(tmp_path, "ab") is None
    assert "compressed" in caplog.text
