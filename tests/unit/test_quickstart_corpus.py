"""The corpus: split by package and by name alone, deterministic, reused when nothing changed, rebuilt when torn."""

from __future__ import annotations

import json
import os
import random
import re
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer

from grace_ds.errors import DataError
from grace_ds.quickstart.corpus import SPLITS, TOKENIZER, CorpusSpec, chunk, prepare, read_packages, split_of
from grace_ds.quickstart.pollute import Kind
from grace_ds.quickstart.tokenizer import encode_stream, train_tokenizer

SPEC = CorpusSpec(pool_size=200, trusted_size=10, validation_size=12, vocab=512)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A library of 60 modules and one package, each with words of its own."""
    root = tmp_path_factory.mktemp("library")
    rng = random.Random(5)
    for i in range(60):
        words = [
            f"mod{i:02d}" if rng.random() < 0.3 else rng.choice(["def", "class", "return", "self", "import"]) for _ in range(900)
        ]
        (root / f"mod{i:02d}.py").write_text(" ".join(words))
    for name in ("pack", "site-packages", "pack/tests", "test"):
        (root / name).mkdir()
    (root / "pack/inner.py").write_text("inner = 1\n" * 50)
    (root / "pack/tests/hidden.py").write_text("secret")
    (root / "site-packages/third.py").write_text("secret")
    (root / "test/big.py").write_text("secret")
    (root / "_sysconfigdata__x.py").write_text("secret")
    (root / "empty.py").write_text("\n")
    return root


@pytest.fixture(scope="module")
def built(library, tmp_path_factory):
    return prepare(SPEC, tmp_path_factory.mktemp("data"), library)


def load(corpus):
    return {name: np.load(corpus.folder / f"{name}.npy") for name in (*SPLITS, "kinds")}


def test_tests_third_parties_and_machine_files_are_left_out(library):
    packages = read_packages(library)
    assert set(packages) == {f"mod{i:02d}" for i in range(60)} | {"pack"}
    assert packages["pack"] == ["inner = 1\n" * 50]


def test_the_standard_library_splits_as_recorded():
    # Of record: a change of these would give other data under the same name.
    assert {split_of(name) for name in ("json", "random", "uuid", "wsgiref")} == {"validation"}
    assert {split_of(name) for name in ("asyncio", "unittest", "ipaddress", "venv")} == {"trusted"}
    assert {split_of(name) for name in ("email", "http", "typing", "encodings")} == {"train"}


def test_sizes_counts_and_disjoint_packages(built):
    arrays = load(built)
    assert {name: arrays[name].shape for name in SPLITS} == {"train": (200, 65), "trusted": (10, 65), "validation": (12, 65)}
    assert all(arrays[name].dtype == np.int32 for name in SPLITS)
    assert built.manifest["kinds"] == {"unique": 80, "duplicate": 40, "junk": 30, "generated": 50}
    assert np.bincount(arrays["kinds"]).tolist() == [80, 40, 30, 50]
    names = [set(built.manifest["packages"][split]) for split in SPLITS]
    assert sum(map(len, names)) == len(set.union(*names)) == 61


def test_no_validation_text_in_train_or_trusted(built, library):
    packages = built.manifest["packages"]
    texts = [t for name in packages["train"] for t in read_packages(library)[name]]
    tokenizer = train_tokenizer(texts, SPEC.vocab)
    arrays = load(built)
    for split in SPLITS:
        text = " ".join(tokenizer.decode(row.tolist()) for row in arrays[split])
        others = {name for other in SPLITS if other != split for name in packages[other] if name.startswith("mod")}
        seen = {name for name in others if f" {name} " in text}
        # A token edit, shuffled junk or a made-up field of the training pool may spell another module's name by chance.
        assert len(seen) <= (2 if split == "train" else 0), seen


def test_same_arguments_same_bytes_and_reuse(built, library, tmp_path):
    again = prepare(SPEC, tmp_path, library)
    assert not again.reused
    assert again.manifest["digest"] == built.manifest["digest"]
    before = os.stat(tmp_path / "train.npy").st_mtime_ns
    assert prepare(SPEC, tmp_path, library).reused
    assert os.stat(tmp_path / "train.npy").st_mtime_ns == before


def test_damaged_or_other_data_are_built_again(library, tmp_path):
    first = prepare(SPEC, tmp_path, library)
    rows = np.load(tmp_path / "train.npy")
    np.save(tmp_path / "train.npy", rows[::-1])
    repaired = prepare(SPEC, tmp_path, library)
    assert not repaired.reused and repaired.manifest["digest"] == first.manifest["digest"]
    (tmp_path / "manifest.json").write_text(json.dumps({"key": 1})[:-1])
    assert not prepare(SPEC, tmp_path, library).reused
    natural = prepare(CorpusSpec(**{**vars(SPEC), "pool": "natural"}), tmp_path, library)
    assert not natural.reused and natural.manifest["kinds"] == {"unique": 200, "duplicate": 0, "junk": 0, "generated": 0}
    assert not [p for p in tmp_path.iterdir() if ".tmp" in p.name]


def test_generated_rows_are_text_of_their_own(built):
    arrays, tokenizer = load(built), Tokenizer.from_file(str(built.folder / TOKENIZER))
    generated = arrays["train"][arrays["kinds"] == Kind.GENERATED]
    assert len(np.unique(generated, axis=0)) == len(generated)
    written = {"class", "return", "self", "import", "inner"}  # of the library's words those of four letters and more
    foreign = [set(re.findall("[a-z]{4,}", text)) - written for text in tokenizer.decode_batch(generated.tolist())]
    assert sum(map(bool, foreign)) > 45


def test_shares_are_part_of_the_spec(library, tmp_path):
    first = prepare(SPEC, tmp_path, library)
    other = prepare(replace(SPEC, generated=0.0, junk=0.4), tmp_path, library)
    assert not other.reused and other.manifest["digest"] != first.manifest["digest"]
    assert other.manifest["kinds"] == {"unique": 80, "duplicate": 40, "junk": 80, "generated": 0}


def test_natural_rows_are_the_training_rows(library, tmp_path):
    spec = CorpusSpec(pool="natural", pool_size=10**6, trusted_size=4, validation_size=4, vocab=512)
    corpus = prepare(spec, tmp_path, library)
    rows = load(corpus)["train"]
    assert len(rows) == corpus.manifest["rows"]["train"] < 10**6
    assert len(np.unique(rows, axis=0)) > 0.95 * len(rows)


def test_too_little_text_says_how_much_there_is(library, tmp_path):
    spec = CorpusSpec(pool_size=20, trusted_size=10**5, validation_size=4, vocab=512)
    with pytest.raises(DataError, match=r"trusted split has \d+ sequences, 100000 are needed"):
        prepare(spec, tmp_path, library)
    with pytest.raises(DataError, match="no Python source files below"):
        prepare(SPEC, tmp_path, tmp_path)
    with pytest.raises(DataError, match="pool 'spam' is not known"):
        prepare(CorpusSpec(pool="spam"), tmp_path, library)


def test_tokenizer_round_trips_any_text_and_closes_documents():
    tokenizer = train_tokenizer(["def f(x):\n    return x\n"] * 20, 300)
    text = "def g(y): return '\u00e9\u4e2d\x00\xff' # \t"
    stream = encode_stream(tokenizer, [text, ""])
    assert stream.tolist().count(0) == 2 and stream[-1] == 0
    assert tokenizer.decode(stream.tolist()) == text


def test_chunks_are_consecutive_and_whole():
    assert chunk(np.arange(11, dtype=np.int32), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
