"""Machine-written code passes for code, copies nothing, and is a pure function of the generator; wrong answers are wrong."""

from __future__ import annotations

import json
import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from grace_ds_quickstart.corpus import chunk, split_of
from grace_ds_quickstart.generated import TEMPLATES, VOCABULARY, Template, generated_code, templated
from grace_ds_quickstart.pollute import JunkSource, Kind
from grace_ds_quickstart.tokenizer import encode_stream, train_tokenizer

from benchmarks.selection import matrix, texts
from benchmarks.selection.answers import matched_rows, permuted_answers, question_tokens
from benchmarks.selection.arms import ARMS
from benchmarks.selection.corpora import ANSWERS, HELD, CorpusSpec, split_name
from benchmarks.selection.decontaminate import shares_gram
from benchmarks.selection.generated import HELD_OUT, WORDS
from benchmarks.selection.junk import apart_from, blended
from benchmarks.selection.pools import ADDED, GROUPS, HELDOUT, SPECS, PoolSpec, prepare_pool
from benchmarks.selection.store import Stored
from benchmarks.selection.texts import MACHINE_WRITTEN, Source
from grace_ds.data.tokens import TokenBlock
from grace_ds.errors import DataError
from grace_ds.features.duplicates import NgramCounts
from grace_ds.features.quality import QualityModel
from grace_ds.records import Array, IntArray
from tests.selection_pools import tiny_pool

LENGTH = 65
ROWS = 40  # of each template
ALL = {**TEMPLATES, **HELD_OUT}
# Some packages of the two splits, to be quick.
TRAIN = ("argparse", "ast", "dataclasses", "logging", "pathlib", "shutil", "typing")
TRUSTED = ("asyncio", "getopt", "ipaddress", "poplib", "pstats", "tracemalloc", "unittest")


def flat(rows: Array) -> tuple[IntArray, IntArray]:
    """The tokens one after another, and the offsets of the rows."""
    return rows.reshape(-1).astype(np.int64), np.arange(len(rows) + 1) * rows.shape[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pools")


@pytest.fixture(scope="module")
def library() -> tuple[JunkSource, Array]:
    """Clean rows of a part of the standard library, and trusted rows of packages that are in the trusted split."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, list[str]] = {"train": [], "trusted": []}
    for name in (*TRAIN, *TRUSTED):
        paths = sorted((root / name).rglob("*.py")) if (root / name).is_dir() else [root / f"{name}.py"]
        found[split_of(name)] += [path.read_text("utf-8") for path in paths]
    tokenizer = train_tokenizer(found["train"], 1024)
    clean, trusted = (chunk(encode_stream(tokenizer, found[split]), LENGTH) for split in ("train", "trusted"))
    return JunkSource(clean, lambda documents: encode_stream(tokenizer, documents), 1024), trusted[:: max(1, len(trusted) // 384)]


@pytest.fixture(scope="module")
def rows(library: tuple[JunkSource, Array]) -> dict[str, Array]:
    """Rows of every template, each from a generator of its own."""
    source, _ = library
    return {name: templated({name: ALL[name]})(source, np.random.default_rng(seed), ROWS) for seed, name in enumerate(ALL)}


@pytest.mark.parametrize("name", ALL)
def test_a_template_writes_a_different_document_each_time_and_the_same_one_from_the_same_generator(name: str) -> None:
    template: Template = ALL[name]
    rng = np.random.default_rng(0)
    made = [template(rng) for _ in range(30)]
    assert made == [template(rng) for rng in [np.random.default_rng(0)] for _ in range(30)]
    assert len({line for text in made for line in text.splitlines()}) > 0.4 * sum(len(text.splitlines()) for text in made)
    assert len(set(made)) == 30 and all(700 <= len(text) <= 4500 and text.endswith("\n") for text in made)


def test_generated_rows_have_the_shape_asked_for_and_mix_the_templates_in_equal_parts() -> None:
    asked: list[str] = []

    def encode(documents: list[str]) -> Array:
        asked.extend(documents)
        return np.concatenate([np.full(len(text) // 4, int(text[0])) for text in documents])

    source = JunkSource(np.zeros((3, 10), np.int32), encode, 9)  # type: ignore[arg-type]
    kinds = {str(i): lambda rng, i=i: str(i) * int(rng.integers(40, 90)) for i in range(3)}
    made = templated(kinds)(source, np.random.default_rng(0), 10)
    assert made.shape == (10, 10) and made.dtype == np.int32
    assert made[:, 0].tolist() == [0] * 4 + [1] * 3 + [2] * 3
    assert templated(kinds)(source, np.random.default_rng(0), 0).shape == (0, 10)


def test_generated_code_is_deterministic_in_the_generator_and_repeats_no_row(library: tuple[JunkSource, Array]) -> None:
    source, _ = library
    once, again, other = (generated_code(source, np.random.default_rng(seed), 160) for seed in (0, 0, 1))
    assert once.shape == (160, LENGTH) and np.array_equal(once, again)
    assert len(np.unique(np.concatenate([once, other]), axis=0)) == 320


def test_held_out_templates_share_no_text_with_the_development_ones(rows: dict[str, Array]) -> None:
    assert not set(TEMPLATES) & set(HELD_OUT)
    development = np.concatenate([rows[name] for name in TEMPLATES])
    held_out = np.concatenate([rows[name] for name in HELD_OUT])
    assert shares_gram(held_out, development).mean() < 0.01  # three words drawn alike by chance
    assert shares_gram(rows["codec_table"], rows["codec_table"]).all()


def test_held_out_templates_have_words_of_their_own() -> None:
    for held_out, development in zip(WORDS, VOCABULARY, strict=True):
        assert len(held_out) > 40 and not set(held_out) & set(development)


@pytest.mark.parametrize("templates", [TEMPLATES, HELD_OUT], ids=["development", "held-out"])
def test_generated_rows_pass_a_bigram_filter_and_are_no_copies(
    templates: dict[str, Template], rows: dict[str, Array], library: tuple[JunkSource, Array]
) -> None:
    source, trusted = library
    made = np.concatenate([rows[name] for name in templates])
    prior = QualityModel.fit(*flat(trusted), 1024)
    passed = {name: (prior.quality(*flat(part)) > 0.5).mean() for name, part in (("made", made), ("clean", source.rows))}
    assert passed["made"] > 0.5 and passed["made"] > 0.9 * passed["clean"]
    everything = np.concatenate([made, source.rows[: len(made)]])
    counts, block = NgramCounts(), TokenBlock(np.arange(len(everything)), *flat(everything))
    counts.add(block)
    counts.reduce(lambda bins: bins)
    assert (counts.degree(block)[: len(made)] < 1).mean() > 0.8


def test_a_blend_takes_from_each_kind_by_weight() -> None:
    def of(value: int) -> object:
        return lambda source, rng, count: np.full((count, 2), value)

    source = JunkSource(np.zeros((1, 2), np.int32), lambda d: np.empty(0, np.int32), 1)
    for count in (0, 1, 7, 700):
        made = blended([of(0), of(1), of(2)], [5, 1, 1])(source, np.random.default_rng(0), count)  # type: ignore[list-item]
        assert len(made) == count
    assert np.bincount(made[:, 0]).tolist() == [500, 100, 100]


def test_rows_with_text_that_a_model_is_judged_on_are_left_out() -> None:
    rng = np.random.default_rng(0)
    held = rng.integers(0, 1000, (4, 30))
    text = rng.integers(0, 1000, (200, 30))
    text[3, 5:20] = held[1, 10:25]
    kind = apart_from(lambda source, rng, count: text[:count], "mine", held)
    source = JunkSource(text, lambda d: np.empty(0, np.int32), 1000)
    assert np.array_equal(kind(source, rng, 20), np.delete(text, 3, axis=0)[:20])
    everything = apart_from(lambda source, rng, count: np.repeat(held[:1], count, 0), "mine", held)
    with pytest.raises(DataError, match="'mine'"):
        everything(source, rng, 20)


@pytest.mark.parametrize("prefix", ["generated", "generated-heldout"])
def test_the_pools_of_generated_code_have_their_shares(folder: Path, prefix: str) -> None:
    spec = SPECS[f"{prefix}-crawl"]
    pool = tiny_pool(folder, PoolSpec(spec.name, spec.duplicates, spec.junk, spec.kinds, size=400, weights=spec.weights))
    assert np.bincount(pool.array("kinds")).tolist() == [200, 60, 140]
    assert pool.manifest["junk_kinds"] == [prefix, "bytes", "base64", "shuffled"]
    assert SPECS[f"{prefix}-25"].junk == 0.25 and SPECS[f"{prefix}-50"].junk == 0.5
    assert [SPECS[f"{prefix}-{part}"].duplicates for part in ("25", "50")] == [0.0, 0.0]
    assert spec.weights[0] == pytest.approx(2.5 * sum(spec.weights[1:])) and sum(spec.weights) == pytest.approx(35)


def test_pools_that_were_built_before_weights_and_lengths_are_found_again(folder: Path) -> None:
    key = tiny_pool(folder).manifest["key"]
    assert not set(ADDED) & set(key) and key["kinds"] == list(SPECS["crawl"].kinds)
    assert tiny_pool(folder, PoolSpec("crawl", size=500, weights=(2, 1, 1))).manifest["key"]["weights"] == [2, 1, 1]


def test_held_out_pools_are_known_as_such_and_every_group_has_arms() -> None:
    assert set(GROUPS["generated-heldout"]) < set(HELDOUT) and not set(GROUPS["generated"]) & set(HELDOUT)
    assert set(matrix.DEFAULT_ARMS) == set(GROUPS)
    assert {arm for arms in matrix.DEFAULT_ARMS.values() for arm in arms} <= set(ARMS)


def test_all_pieces_of_long_files_are_drawn_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = "".join(f"{i:05}\n" for i in range(5000))  # five pieces
    (tmp_path / "a.py").write_text(text)
    monkeypatch.setitem(texts.SOURCES, "swig", Source(((tmp_path, "*.py"),), "", pieces=True))
    pieces = texts.draw("swig", np.random.default_rng(0), 10**9)
    assert len(pieces) == 5 and sorted("".join(sorted(pieces))) == sorted(text)
    assert len(texts.draw("swig", np.random.default_rng(0), 7000)) == 2


def test_machine_written_text_is_of_installed_packages_and_is_missed_if_it_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path
) -> None:
    site, library = (Path(sysconfig.get_paths()[name]) for name in ("purelib", "stdlib"))
    for name in MACHINE_WRITTEN:
        own = texts.SOURCES[name].declared  # the interpreter's
        assert all(root.is_relative_to(library if own else site) for root, _ in texts.SOURCES[name].roots)
        monkeypatch.setitem(texts.SOURCES, name, Source(((tmp_path, "*.py"),), f"pip install {name}", pieces=True))
    with pytest.raises(texts.MissingKind, match=r"machine-written.*'codecs'.*pip install codecs"):
        tiny_pool(folder, PoolSpec("machine-written", 0.0, 0.25, MACHINE_WRITTEN, size=200))


def write_problems(root: Path) -> Path:
    """Made-up problems whose answers name them, most of them long enough."""
    rng = random.Random(0)
    lines = []
    for i in range(240):
        asked, answered = (" ".join(rng.choices("abcdefghij", k=k)) for k in (rng.choice((5, 60, 70)), rng.choice((60, 70))))
        lines.append(json.dumps({"question": f"{asked} {i}?", "answer": f"{i}: {answered}"}))
    (root / "gsm8k").mkdir(parents=True)
    (root / "gsm8k" / "train.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Stored, Path]:
    root = write_problems(tmp_path_factory.mktemp("problems"))
    spec = PoolSpec("answers", 0.0, 0.5, ("permuted",), ANSWERS, size=200, length=41)
    sizes = CorpusSpec(vocab=300, trusted=8, dev=4, test=4)
    return prepare_pool(spec, root / "pools", corpus=sizes, root=root), root


def test_answers_are_right_in_unique_rows_and_another_problem_s_in_junk(answers: tuple[Stored, Path]) -> None:
    pool, root = answers
    rows, kinds, tokenizer = pool.array("train"), pool.array("kinds"), pool.tokenizer()
    asked = question_tokens(41)
    assert asked == 15 and rows.shape[1] == 41
    problems = [json.loads(line) for line in (root / "gsm8k" / "train.jsonl").read_text().splitlines()]

    def numbers(row: Array) -> tuple[str, str]:
        """Of the problem asked and of the problem answered."""
        return tokenizer.decode(row[:asked].tolist()).split()[-1][:-1], tokenizer.decode(row[asked:].tolist()).split(":")[0]

    found = {kind: [numbers(row) for row in rows[kinds == kind]] for kind in (Kind.UNIQUE, Kind.JUNK)}
    assert len(found[Kind.UNIQUE]) == len(found[Kind.JUNK]) == pool.manifest["rows"]["train"] // 2 >= 80
    assert all(question == answer for question, answer in found[Kind.UNIQUE])
    assert all(question != answer for question, answer in found[Kind.JUNK])
    # Each half of a row stands once in a right row and once in a wrong one: nothing but their agreement tells the two apart.
    for side in (0, 1):
        assert sorted(pair[side] for pair in found[Kind.UNIQUE]) == sorted(pair[side] for pair in found[Kind.JUNK])
    split_by_number = {p["question"].split()[-1][:-1]: split_name(p["question"]) for p in problems}
    assert {split_by_number[question] for question, _ in found[Kind.UNIQUE]} == {"train"}
    for split in HELD:
        held = [numbers(row) for row in pool.array(split)]
        assert held and all(question == answer and split_by_number[question] == split for question, answer in held)


def test_problems_that_are_too_short_are_left_out_and_nothing_is_padded() -> None:
    class Letters:
        def encode_batch(self, texts: list[str]) -> list[object]:
            return [type("Encoding", (), {"ids": [ord(c) for c in text]}) for text in texts]

    made = matched_rows(Letters(), ["xxabc", "defghiyy", "ab", "defghi", "abc", "defg"], 8)
    assert ["".join(map(chr, row)) for row in made] == ["abcdefgh"]
    assert matched_rows(Letters(), ["a", "b"], 8).shape == (0, 8)


def test_permuted_answers_are_a_derangement_of_as_many_problems_as_are_asked_for() -> None:
    clean = np.arange(20, dtype=np.int32).repeat(8).reshape(20, 8)
    source = JunkSource(clean, lambda d: np.empty(0, np.int32), 20)
    for count in (2, 3, 20):
        made = permuted_answers(source, np.random.default_rng(0), count)
        assert made.shape == (count, 8) and (made[:, :3] != made[:, 3:4]).all()
        assert len({*made[:, 0]}) == len({*made[:, 7]}) == count and {*made[:, 0]} == {*made[:, 7]}
    for count in (0, 1, 21):
        with pytest.raises(DataError, match="20 problems"):
            permuted_answers(source, np.random.default_rng(0), count)
