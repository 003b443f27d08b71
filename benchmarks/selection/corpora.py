"""The clean text of a benchmark: split by document into training, trusted, dev and test rows that share no 13-gram.

Three corpora: the standard library's sources, split by package; GSM8K's training problems as running text, split by problem; and
the same problems in rows of their own (:mod:`benchmarks.selection.answers`).  ``dev`` is to choose on, ``test`` for the final
tables only.  Few packages are held out, and one division's happen to be more or less like its trusted ones; so there are others
to choose on, where the test documents of the first take no part at all.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grace_ds_quickstart.corpus import chunk, read_packages, split_of, spread
from grace_ds_quickstart.tokenizer import encode_stream, train_tokenizer

from benchmarks.selection.answers import matched_rows
from benchmarks.selection.decontaminate import GRAM, decontaminate
from benchmarks.selection.store import Built, Stored, stored
from grace_ds.errors import DataError
from grace_ds.records import Array

FORMAT = 3  # raise when the same spec would give other data
STDLIB, GSM8K, ANSWERS = "stdlib", "gsm8k", "answers"
HELD = ("trusted", "dev", "test")
Documents = dict[str, list[str]]  # name of a package or problem -> its texts


@dataclass(frozen=True)
class CorpusSpec:
    """What to build; two equal specs on one machine give the same bytes.

    Attributes:
        division: of the documents into splits: 0 is that of the final tables, any other one is to choose on.
    """

    name: str = STDLIB
    division: int = 0
    length: int = 65  # 64 inputs and the target of the last one
    vocab: int = 1024
    trusted: int = 384
    dev: int = 512
    test: int = 512


def split_name(document: str, division: int = 0) -> str:
    """train, trusted, dev or test: the quickstart's split, its validation divided again by another hash of the name.

    In another division than 0 names are hashed with its number, and division 0's test documents are ``unused``.
    """
    if division and split_name(document) == "test":
        return "unused"
    split = split_of(f"{division}/{document}" if division else document)
    if split != "validation":
        return split
    return "dev" if hashlib.blake2b(document.encode(), digest_size=1, salt=b"dev or test").digest()[0] < 128 else "test"


def read_documents(name: str, root: Path | None) -> Documents:
    """The texts of a corpus.

    Args:
        name: ``stdlib``, ``gsm8k``, or ``answers``, whose texts are a problem's question and its answer.
        root: of the corpus; default for ``stdlib`` the running interpreter's own.

    Raises:
        DataError: there is no such corpus at ``root``.
    """
    if name == STDLIB:
        return read_packages(root or Path(sysconfig.get_paths()["stdlib"]))
    if root is None:
        raise DataError("the second corpus is not known: give --corpus DIR, a folder with gsm8k/train.jsonl")
    path = root / "gsm8k" / "train.jsonl"
    if not path.is_file():
        raise DataError(f"{path} does not exist: --corpus names a folder with gsm8k/train.jsonl and tinyshakespeare/input.txt")
    problems = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    if name == ANSWERS:
        return {p["question"]: [f"{p['question']}\n", f"{p['answer']}\n"] for p in problems}
    return {p["question"]: [f"{p['question']}\n{p['answer']}\n"] for p in problems}


def prepare_corpus(spec: CorpusSpec, folder: Path, root: Path | None = None) -> Stored:
    """The corpus' folder: clean.npy, trusted.npy, dev.npy, test.npy, tokenizer and manifest."""
    where = str(root or (sysconfig.get_paths()["stdlib"] if spec.name == STDLIB else "")) if spec.name == STDLIB else ""
    key = {"format": FORMAT, "python": platform.python_version(), "root": where, **asdict(spec)}
    return stored(folder, key, lambda: build(spec, root))


def build(spec: CorpusSpec, root: Path | None) -> Built:
    """Rows of all splits, decontaminated before the held ones are thinned out evenly."""
    documents = read_documents(spec.name, root)
    names: dict[str, list[str]] = {split: [] for split in ("train", *HELD)}
    for name in documents:
        split = split_name(name, spec.division)
        if split in names:
            names[split].append(name)
    texts = {split: [text for name in names[split] for text in documents[name]] for split in names}
    if not texts["train"]:
        raise DataError(f"corpus {spec.name}: no training text; is its root right?")
    tokenizer = train_tokenizer(texts["train"], spec.vocab)
    if spec.name == ANSWERS:
        whole = {split: matched_rows(tokenizer, texts[split], spec.length) for split in names}
    else:
        whole = {split: chunk(encode_stream(tokenizer, texts[split]), spec.length) for split in names}
    kept, dropped = decontaminate(whole)
    arrays: dict[str, Array] = {"clean": kept["train"]}
    for split in HELD:
        asked_for = getattr(spec, split)
        if spec.name == ANSWERS:  # a problem is one row, and there are no more problems: the manifest says how many
            asked_for = min(asked_for, len(kept[split]))
        arrays[split] = spread(kept[split], asked_for, split)
    facts: dict[str, Any] = {
        "vocab": tokenizer.get_vocab_size(),
        "rows": {split: len(array) for split, array in arrays.items()},
        "rows_before_decontamination": {split: len(rows) for split, rows in whole.items()},
        "dropped_for_shared_grams": dropped,
        "gram": GRAM,
        "documents": {split: len(names[split]) for split in names},
    }
    if spec.name == STDLIB:
        facts["packages"] = names
    return Built(arrays, tokenizer.to_str(), facts)
