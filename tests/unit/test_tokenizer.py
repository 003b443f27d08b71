"""The tokenizer that a config names."""

from __future__ import annotations

from pathlib import Path

import pytest

from grace_ds.data.tokenizer import load_tokenizer
from grace_ds.errors import ConfigError


def test_a_tokenizer_is_read_from_its_file_and_from_its_folder(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    plain.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(path)("b a c b") == [2, 1, 0, 2]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer = .* cannot be used .* name a tokenizer.json"):
        load_tokenizer(tmp_path)
