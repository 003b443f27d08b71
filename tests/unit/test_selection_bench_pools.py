"""The pools hold what they say, in the shares that they say, and nothing that the model is judged on."""

from __future__ import annotations

import gettext
import io
import itertools
import json
import random
import re
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from grace_ds_quickstart.pollute import JUNK, JunkSource, Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.selection import texts
from benchmarks.selection.corpora import HELD, CorpusSpec, prepare_corpus, split_name
from benchmarks.selection.decontaminate import GRAM, decontaminate, shares_gram
from benchmarks.selection.junk import DEV_JUNK, junk_kind, markov, truncated_json
from benchmarks.selection.pools import GROUPS, SPECS, PoolSpec, offered, prepare_pool
from benchmarks.selection.store import digest_of
from benchmarks.selection.texts import MissingKind, Source
from grace_ds.errors import DataError
from grace_ds.records import Array
from tests.selection_pools import SIZES, tiny_pool, write_packages


def grams(rows: Array) -> set[tuple[int, ...]]:
    """Every 13-gram, as a tuple: slow and plain."""
    return {tuple(map(int, row[i : i + GRAM])) for row in rows for i in range(len(row) - GRAM + 1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pools")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_a_shared_gram_is_found_wherever_it_stands_and_nothing_else_is(seed: int, vocab: int) -> None:
    rng = np.random.default_rng(seed)  # few token ids: most 13-grams are almost alike
    others = rng.integers(0, vocab, (5, 20))
    rows = rng.integers(0, vocab, (12, 18))
    at, to = rng.integers(0, 20 - GRAM + 1), rng.integers(0, 18 - GRAM + 1)
    rows[3, to : to + GRAM] = others[2, at : at + GRAM]
    expected = [bool(grams(row[None]) & grams(others)) for row in rows]
    assert shares_gram(rows, others).tolist() == expected
    assert expected[3]


def test_rows_shorter_than_a_gram_share_none() -> None:
    rows = np.zeros((3, GRAM - 1), np.int32)
    assert not shares_gram(rows, rows).any()


def test_decontamination_leaves_no_shared_gram_and_drops_nothing_else() -> None:
    rng = np.random.default_rng(0)
    clean, trusted, dev, test = (rng.integers(0, 1000, (30, 40)) for _ in range(4))
    trusted[4, 5:18] = clean[7, 20:33]  # planted: trusted from train, dev from trusted, test from dev and train
    dev[0, :20] = trusted[9, 10:30]
    test[1, 27:] = dev[11, 2:15]
    test[2, 3:19] = clean[0, 3:19]
    dev[5, :12] = clean[1, :12]  # one token short of a gram
    kept, dropped = decontaminate({"train": clean, "trusted": trusted, "dev": dev, "test": test})
    assert dropped == {"train": 0, "trusted": 1, "dev": 1, "test": 2}
    names = list(kept)
    for i, name in enumerate(names):
        for other in names[:i]:
            assert not grams(kept[name]) & grams(kept[other])


def test_a_split_keeps_its_documents_and_dev_and_test_part_the_validation() -> None:
    names = [f"package{i}" for i in range(4000)]
    share = {split: sum(split_name(n) == split for n in names) / len(names) for split in ("train", *HELD)}
    assert share["train"] == pytest.approx(0.78, abs=0.03) and share["trusted"] == pytest.approx(0.10, abs=0.02)
    assert share["dev"] == pytest.approx(0.06, abs=0.02) and share["test"] == pytest.approx(0.06, abs=0.02)


def test_another_division_mixes_the_documents_anew_and_never_sees_the_final_test_ones() -> None:
    names = [f"package{i}" for i in range(4000)]
    first, final = [split_name(n) for n in names], {n for n in names if split_name(n) == "test"}
    for division in (1, 2):
        other = [split_name(n, division) for n in names]
        assert {n for n, split in zip(names, other, strict=True) if split == "unused"} == final
        held = [(a, b) for a, b in zip(first, other, strict=True) if a == "trusted" and b != "unused"]
        assert sum(b == "trusted" for _, b in held) / len(held) == pytest.approx(0.10, abs=0.06)
        assert other.count("dev") / len(names) == pytest.approx(0.06, abs=0.02)
    assert [split_name(n, 1) for n in names] != [split_name(n, 2) for n in names]


@pytest.mark.parametrize("spec", [SPECS["crawl"], SPECS["natural"], SPECS["dose-25"], SPECS["dev"]], ids=lambda s: s.name)
def test_a_pool_has_the_shares_of_its_spec(folder: Path, spec: PoolSpec) -> None:
    asked = PoolSpec(spec.name, spec.duplicates, spec.junk, tuple(k for k in spec.kinds if k != "prose"), size=500)
    pool = tiny_pool(folder, asked)
    rows, kinds = pool.array("train"), pool.array("kinds")
    junk, duplicates = round(500 * spec.junk), round(500 * spec.duplicates)
    assert rows.shape == (500, 65) and rows.dtype == np.int32
    assert [int((kinds == k).sum()) for k in (Kind.UNIQUE, Kind.DUPLICATE, Kind.JUNK)] == [
        500 - junk - duplicates,
        duplicates,
        junk,
    ]
    counted = {"unique": 500 - junk - duplicates, "duplicate": duplicates, "junk": junk}
    assert pool.manifest["kinds"] | counted == pool.manifest["kinds"] and sum(pool.manifest["kinds"].values()) == 500
    assert [len(pool.array(name)) for name in HELD] == [SIZES.trusted, SIZES.dev, SIZES.test]
    unique = grams(rows[kinds == Kind.UNIQUE])
    assert not any(unique & grams(pool.array(name)) for name in HELD)


def test_a_pool_is_a_pure_function_of_its_spec(tmp_path: Path) -> None:
    once, again = (tiny_pool(tmp_path / name) for name in "ab")
    assert once.manifest["digest"] == again.manifest["digest"] and not again.reused
    other = tiny_pool(tmp_path / "a", PoolSpec("crawl", size=500, seed=1))
    assert other.manifest["digest"] != once.manifest["digest"] and other.folder != once.folder
    assert tiny_pool(tmp_path / "a").reused
    np.save(once.folder / "train.npy", np.zeros((3, 65), np.int32))  # spoiled: it is built anew
    assert tiny_pool(tmp_path / "a").manifest["digest"] == digest_of(again.folder)


def test_too_little_text_makes_a_smaller_pool_and_says_so(folder: Path) -> None:
    pool = tiny_pool(folder, PoolSpec("natural", duplicates=0.0, junk=0.0, kinds=(), size=100_000))
    assert pool.manifest["rows_asked_for"] == 100_000 > pool.manifest["rows"]["train"] == len(pool.array("train"))


def test_every_pool_of_a_group_has_a_spec_and_its_junk_kinds_exist() -> None:
    assert {name for names in GROUPS.values() for name in names} == set(SPECS)
    for spec in SPECS.values():
        for name in spec.kinds:
            if name not in texts.SOURCES:
                assert callable(junk_kind(name, lambda rows: [], None))
    with pytest.raises(DataError, match=r"'nonsense' is not known.*csv"):
        junk_kind("nonsense", lambda rows: [], None)


def test_a_kind_that_is_missing_is_an_error_unless_it_may_be(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setitem(texts.SOURCES, "perl", Source(((folder / "nowhere", "*.pl"),), "Perl: apt-get install perl-modules"))
    spec = PoolSpec("off-domain", kinds=("perl", "csv"), size=200)
    with pytest.raises(MissingKind, match=r"off-domain: no text of kind 'perl'.*apt-get install.*--allow-missing-kinds"):
        tiny_pool(folder, spec)
    pool = prepare_pool(spec, folder / "pools", corpus=SIZES, root=write_packages(folder / "packages"), allow_missing=True)
    assert pool.manifest["junk_kinds"] == ["csv"] and pool.manifest["junk_kinds_missing"] == ["perl"]
    assert int((pool.array("kinds") == Kind.JUNK).sum()) == 40


def test_markov_text_has_only_bigrams_of_the_clean_rows() -> None:
    rng = np.random.default_rng(0)
    clean = rng.integers(0, 30, (50, 20)).astype(np.int32)
    rows = markov(JunkSource(clean, lambda d: np.empty(0, np.int32), 30), rng, 200)
    known = set(zip(clean[:, :-1].flat, clean[:, 1:].flat, strict=True))
    followed = {a for a, _ in known}
    assert {(a, b) for row in rows for a, b in itertools.pairwise(row) if a in followed} <= known
    assert len(np.unique(rows, axis=0)) == 200


def test_junk_kinds_are_deterministic_and_fill_their_rows(folder: Path) -> None:
    pool = tiny_pool(folder)
    tokenizer = pool.tokenizer()
    from grace_ds_quickstart.tokenizer import encode_stream

    from benchmarks.selection.pools import decode_rows

    source = JunkSource(pool.array("train"), lambda d: encode_stream(tokenizer, d), 300)
    for name in (*DEV_JUNK, "reversed", "json"):
        if name == "prose":
            continue  # what is installed may be too little for this tokenizer
        made = [
            junk_kind(name, lambda rows: decode_rows(tokenizer, rows), None)(source, np.random.default_rng(seed), 30)
            for seed in (0, 0, 1)
        ]
        assert made[0].shape == (30, 65) and np.array_equal(made[0], made[1]) and not np.array_equal(made[0], made[2])


def test_reversed_text_is_the_clean_text_backwards() -> None:
    rows = np.arange(12, dtype=np.int32).reshape(4, 3)
    said: list[str] = []

    def encode(documents: Sequence[str]) -> Array:
        said.extend(documents)
        return np.zeros(600, np.int32)

    junk_kind("reversed", lambda r: ["abc def"] * len(r), None)(JunkSource(rows, encode, 12), np.random.default_rng(0), 3)
    assert set(said) == {"fed cba"}


def test_truncated_json_is_cut_and_made_of_the_words() -> None:
    words = {f"word_{i}" for i in range(80)}
    pieces = [truncated_json([" ".join(sorted(words))], np.random.default_rng(i)) for i in range(20)]
    assert all(200 <= len(p) <= 1200 for p in pieces) and len(set(pieces)) == 20
    for piece in pieces:
        assert set(re.findall(r'"(\w+)"', piece)) <= words and "word_" in piece
        with pytest.raises(json.JSONDecodeError):
            json.loads(piece)


def test_offered_kinds_are_gone_afterwards_also_after_an_error() -> None:
    own = dict(JUNK)
    with pytest.raises(RuntimeError), offered({"mine": markov}):
        assert JUNK["mine"] is markov
        raise RuntimeError
    assert own == JUNK


def catalog(messages: dict[str, str], order: str) -> bytes:
    """A .mo file, by its published layout."""
    ids, strings = (b"\0".join([*(m.encode() for m in part), b""]) for part in (messages, messages.values()))
    n, head = len(messages), 28
    tables, data = [], [head + 16 * n, head + 16 * n + len(ids)]
    for part, start in ((messages.keys(), data[0]), (messages.values(), data[1])):
        at = start
        for message in part:
            tables.append(struct.pack(f"{order}2I", len(message.encode()), at))
            at += len(message.encode()) + 1
    return struct.pack(f"{order}7I", 0x950412DE, 0, n, head, head + 8 * n, 0, head + 16 * n) + b"".join(tables) + ids + strings


@pytest.mark.parametrize("order", ["<", ">"])
def test_translations_are_read_from_a_catalog(order: str) -> None:
    data = catalog({"": "Content-Type: text/plain; charset=UTF-8\n", "file": "Datei", "hour": "Stunde"}, order)
    assert gettext.GNUTranslations(io.BytesIO(data)).gettext("hour") == "Stunde"  # the test's own file is a catalog
    assert texts.translations(data) == ["Datei", "Stunde"]
    assert texts.translations(b"no catalog at all") == []


def test_a_man_page_keeps_its_words_only() -> None:
    page = '.\\" a comment\n.TH LS 1\n.SH NAME\nls \\- list \\fBdirectory\\fR contents\n'
    assert texts.without_roff(page) == "LS 1\nNAME\nls - list directory contents\n"


def test_draw_takes_pieces_of_many_files_until_there_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i:02}.h").write_text(chr(97 + i) * 10_000)
    monkeypatch.setitem(texts.SOURCES, "c", Source(((tmp_path, "*.h"),), ""))
    pieces = texts.draw("c", np.random.default_rng(0), 25_000)
    assert [len(p) for p in pieces] == [texts.PIECE] * 5 and len({p[0] for p in pieces}) == 5
    assert len(texts.draw("c", np.random.default_rng(0), 10**9)) == 20


def test_the_second_corpus_is_split_by_problem_and_says_what_is_missing(tmp_path: Path) -> None:
    spec = CorpusSpec(name="gsm8k", vocab=300, trusted=8, dev=4, test=4)
    with pytest.raises(DataError, match="--corpus"):
        prepare_corpus(spec, tmp_path / "out")
    with pytest.raises(DataError, match=r"gsm8k/train.jsonl does not exist"):
        prepare_corpus(spec, tmp_path / "out", tmp_path)
    (tmp_path / "gsm8k").mkdir()
    rng = random.Random(0)
    lines = [
        json.dumps(
            {"question": " ".join([*rng.choices("abcdefghij", k=60), f"{i}?"]), "answer": " ".join(rng.choices("0123", k=60))}
        )
        for i in range(400)
    ]
    (tmp_path / "gsm8k" / "train.jsonl").write_text("\n".join(lines))
    base = prepare_corpus(spec, tmp_path / "out", tmp_path)
    assert sum(base.manifest["documents"].values()) == 400
    assert not grams(base.array("clean")) & grams(base.array("test"))
    assert str(tmp_path) not in (base.folder / "manifest.json").read_text()
