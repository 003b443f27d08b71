"""Load the tokenizer that a config names, for text in an unchanged script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grace_ds.errors import ConfigError
from grace_ds.utils.reading import TOKENIZER, read_text


def is_failure(error: BaseException) -> bool:
    """Return whether an exception says that a library has failed, and not that the process is to end.

    The panic of a library in Rust, as of ``tokenizers`` on a damaged file, is no ``Exception``.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def load_tokenizer(path: str | Path) -> Callable[[str], Sequence[int]]:
    """Return text → token ids, without special tokens.

    Args:
        path: a ``tokenizer.json`` of Hugging Face's tokenizers, or a folder that ``AutoTokenizer`` reads.

    Raises:
        ConfigError: it cannot be read, or the library that reads it is not installed.
    """
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    try:
        if file.is_file():
            from tokenizers import Tokenizer

            plain = Tokenizer.from_str(read_text(file, TOKENIZER))
            return lambda text: list(plain.encode(text, add_special_tokens=False).ids)
        from transformers import AutoTokenizer

        whole: Any = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        return lambda text: list(whole.encode(text, add_special_tokens=False))
    except BaseException as error:  # the libraries raise what they like
        if not is_failure(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"tokenizer = {str(path)!r} cannot be used ({reason}); name a tokenizer.json or a folder of a saved tokenizer, and "
            "install grace_ds[huggingface]"
        ) from error
