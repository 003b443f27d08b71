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
from grace_ds.features.content import TokenReader, content_features
from grace_ds.features.quality import QualityModel
from grace_ds.features.tfidf import Terms

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


def quality_model():
    block = TokenReader(corpus(seed=5)).all()
    return QualityModel.fit(block.flat, block.offsets, 120)


def run(rows, shares, trusted=None, **options):
    """Features of every rank's share, in threads; returns them in the order of the ranks."""
    ranks, out, failures = Ranks(len(shares)), {}, []

    def one(rank):
        try:
            out[rank] = content_features(
                TokenReader(rows),
                np.asarray(shares[rank], np.int64),
                dim=32,
                seed=3,
                allreduce=ranks.sum_of(rank),
                trusted=trusted,
                **options,
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
        kept = run(rows, shares, trusted, want_statistics=True, cache_dir=tmp_path, fingerprint="data")
        assert same_bits(by_id(parts), by_id(kept))
    assert run(rows, shares, trusted, cache_dir=tmp_path, fingerprint="data")[0].statistics is None
    assert run(rows, shares, None, want_statistics=True)[0].statistics is None


def test_density_looks_at_the_whole_pool():
    rows = [list(range(20)), list(range(20)), list(range(100, 120))]
    parts = run(rows, [[0], [1], [2]])
    assert [p.density.tolist() for p in parts] == [[1.0], [1.0], [0.0]]
    assert run(rows, [[0], [], [2]])[0].density.tolist() == [0.0]


def test_cache_hit_reads_no_items(tmp_path):
    data, shares = Counted(corpus()), [np.arange(0, N, 2), np.arange(1, N, 2)]
    options = {"trusted": quality_model(), "cache_dir": tmp_path, "fingerprint": "data"}
    fresh = by_id(run(data, shares, **options))
    data.reads.clear()
    assert same_bits(fresh, by_id(run(data, shares, **options)))
    assert not data.reads
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "change",
    [{"fingerprint": "other"}, {"trusted": None}, {"want_tfidf": False}, {"want_density": False}],
)
def test_cache_is_not_used_for_another_question(tmp_path, change):
    data = Counted(corpus())
    options = {"trusted": quality_model(), "cache_dir": tmp_path, "fingerprint": "data"}
    run(data, [np.arange(N)], **options)
    data.reads.clear()
    run(data, [np.arange(N)], **(options | change))
    assert len(data.reads) == N


def test_cache_is_not_used_for_the_same_share_of_another_pool(tmp_path):
    rows = [list(range(20))] * 3
    first = run(rows, [[0], [1]], cache_dir=tmp_path)
    second = run(rows, [[0], [1, 2]], cache_dir=tmp_path)
    alone = run(rows, [[0]], cache_dir=tmp_path)  # fewer ranks, each with a file of its share
    assert [part[0].density[0] for part in (first, second, alone)] == [1.0, 2.0, 0.0]


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "other"])
def test_a_damaged_cache_file_on_one_rank_is_computed_anew_on_all(tmp_path, damage, caplog):
    shares = [np.arange(0, N, 2), np.arange(1, N, 2)]
    fresh = by_id(run(corpus(), shares, trusted=quality_model(), cache_dir=tmp_path))
    file, other = sorted(tmp_path.iterdir())
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    damaged = {"torn": content[:-40], "flipped": content, "empty": b"", "other": other.read_bytes()}[damage]
    file.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        assert same_bits(fresh, by_id(run(corpus(), shares, trusted=quality_model(), cache_dir=tmp_path)))
    assert str(file) in caplog.text
    caplog.clear()
    assert same_bits(fresh, by_id(run(corpus(), shares, trusted=quality_model(), cache_dir=tmp_path)))
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
