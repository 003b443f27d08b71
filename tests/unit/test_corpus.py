"""Corpora by their path: each form gives the tokens that it holds, and a mistake is told with its cure."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from grace_ds.data.corpus import Corpus
from grace_ds.data.megatron_bin import MMapTokens
from grace_ds.data.tokens import TokenReader
from grace_ds.errors import ConfigError, DataError
from tests.unit.test_megatron_data import by_hand

ROWS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]


def the_job_s_own() -> list[list[int]]:
    return ROWS


def read(corpus: Corpus) -> list[list[int]]:
    reader = TokenReader(pickle.loads(pickle.dumps(corpus)).open())
    return [reader.row(i).tolist() for i in range(len(reader))]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(
        "\n\n".join(json.dumps({"input_ids": row, "text": "ü"}, ensure_ascii=False) for row in ROWS) + "\n  \n", "utf-8"
    )
    assert read(Corpus(str(path))) == ROWS


def test_json_lines_of_text(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(20)} | {"?": 20}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": " ".join(map(str, row))}) for row in ROWS))
    assert read(Corpus(str(path), tokenizer=str(tmp_path / "tokenizer.json"))) == ROWS
    with pytest.raises(ConfigError, match="--tokenizer"):
        Corpus(str(path)).open()[0]


def test_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "corpus.npy", np.array([[1, 2], [3, 4]], np.uint16))
    assert read(Corpus(str(tmp_path / "corpus.npy"))) == [[1, 2], [3, 4]]


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_megatron_files(tmp_path: Path, suffix: str) -> None:
    prefix = str(tmp_path / "corpus")
    by_hand(Path(prefix), list(map(len, ROWS)), tokens=[token for row in ROWS for token in row])
    assert read(Corpus(prefix + suffix)) == ROWS
    cut = MMapTokens(prefix, length=4, overlap=1)
    assert read(Corpus(prefix, 4, 1)) == [cut.tokens(i).tolist() for i in range(len(cut))]


def test_a_folder_of_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"input_ids": ROWS}).save_to_disk(tmp_path / "saved")
    assert read(Corpus(str(tmp_path / "saved"))) == ROWS
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"input_ids": ROWS})}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match=r"splits \['train'\]"):
        Corpus(str(tmp_path / "splits")).open()
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="cannot be read by datasets"):
        Corpus(str(tmp_path / "nothing")).open()


def test_a_function() -> None:
    assert read(Corpus(f"{__name__}:the_job_s_own")) == ROWS
    with pytest.raises(ConfigError, match="PYTHONPATH"):
        Corpus("no_such_module_here:train").open()
    with pytest.raises(ConfigError, match="PYTHONPATH"):
        Corpus(f"{__name__}:no_such_function").open()


def test_what_is_no_corpus_is_told_with_the_forms(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no corpus .*nowhere.*\.jsonl with input_ids"):
        Corpus(str(tmp_path / "nowhere")).open()
    with pytest.raises(DataError, match="cannot be read"):
        Corpus(str(tmp_path / "nowhere.jsonl")).open()
    np.save(tmp_path / "wrong.npy", np.zeros((2, 3)))
    with pytest.raises(DataError, match="float64"):
        Corpus(str(tmp_path / "wrong.npy")).open()
    (tmp_path / "torn.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match=r"torn\.npy"):
        Corpus(str(tmp_path / "torn.npy")).open()
    (tmp_path / "bad.jsonl").write_text('{"input_ids": [1]}\n{"input_ids": \n')
    with pytest.raises(DataError, match="item 1: not JSON"):
        Corpus(str(tmp_path / "bad.jsonl")).open()[1]
