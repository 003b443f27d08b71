"""Open a corpus that lies on disk as a map-style dataset, by its path alone: what ``grace-ds features`` reads."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grace_ds.data.megatron_bin import MMapTokens
from grace_ds.data.tokenizer import load_tokenizer
from grace_ds.errors import ConfigError, DataError
from grace_ds.records import Array, IntArray

FORMS = (
    "the prefix of a Megatron .bin and .idx, a .jsonl with input_ids or text, a .npy of token ids (n, length), a folder of "
    "datasets' save_to_disk, or module:function that returns the job's dataset"
)
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Corpus:
    """A corpus by its place; small, hashable and picklable, so that each worker opens it itself.

    Attributes:
        path: as in ``FORMS``.
        length: tokens of an item of a .bin and .idx; None: one sequence an item, see :class:`MMapTokens`.
        overlap: with ``length``, see :class:`MMapTokens`.
        dtype: of a .bin, where the files alone are ambiguous.
        tokenizer: for a .jsonl of text: a ``tokenizer.json`` or a folder that ``AutoTokenizer`` reads.
    """

    path: str
    length: int | None = None
    overlap: int = 1
    dtype: str | None = None
    tokenizer: str | None = None

    def open(self) -> Any:
        """Return the dataset, with ``__getitem__`` and ``__len__``.

        Raises:
            ConfigError, DataError: it cannot be opened; the message says why.
        """
        path = Path(self.path)
        if _FUNCTION.fullmatch(self.path) and not path.exists():
            return _from_function(self.path)
        if path.is_dir():
            return _from_folder(path)
        if path.suffix == ".jsonl":
            return JsonLines(path, self.tokenizer)
        if path.suffix == ".npy":
            return _from_npy(path)
        if not any(os.path.isfile(self.path + suffix) for suffix in ("", ".bin", ".idx")):
            raise DataError(f"there is no corpus {self.path}: give {FORMS}")
        return MMapTokens(self.path, length=self.length, overlap=self.overlap, dtype=self.dtype)


class JsonLines:
    """A map-style dataset over the lines of a .jsonl; only their places are held in memory.

    Args:
        path: of the file; blank lines are no items.
        tokenizer: for lines with ``text``; not needed for lines with ``input_ids``.

    Raises:
        DataError: the file cannot be read, or a line is no object with either; when it is read.
        ConfigError: there is text, and no tokenizer.
    """

    def __init__(self, path: Path, tokenizer: str | None) -> None:
        self.path, self._tokenizer = path, tokenizer
        self._encode: Callable[[str], Sequence[int]] | None = None
        places, at = [], 0
        try:
            self._file = path.open("rb")  # open as long as the dataset is
            for line in self._file:
                if line.strip():
                    places.append(at)
                at += len(line)
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): give {FORMS}") from error
        self._places: IntArray = np.array(places, np.int64)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Any:
        """Return the line's object, or ``{"input_ids": (T,) int64}`` of its text."""
        self._file.seek(self._places[index])
        try:
            item = json.loads(self._file.readline())
        except ValueError as error:
            raise DataError(f"{self.path}, item {index}: not JSON ({error}); repair that line") from error
        if isinstance(item, dict) and "input_ids" not in item and isinstance(item.get("text"), str):
            return {"input_ids": np.asarray(self._tokens(item["text"]), np.int64)}
        return item

    def _tokens(self, text: str) -> Sequence[int]:
        if self._encode is None:
            if self._tokenizer is None:
                raise ConfigError(f"{self.path} holds text: name the job's tokenizer with --tokenizer, or give input_ids")
            self._encode = load_tokenizer(self._tokenizer)
        return self._encode(text)


def _from_npy(path: Path) -> Array:
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as .npy: {error}; give {FORMS}") from error
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise DataError(f"{path} holds {array.dtype} of shape {array.shape}: give token ids of shape (n, length)")
    return array


def _from_folder(path: Path) -> Any:
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise ConfigError(f"{path} is a folder, and datasets is not installed: pip install grace_ds[huggingface]") from error
    try:
        dataset = load_from_disk(str(path))
    except Exception as error:  # the library raises what it likes
        raise DataError(f"{path} cannot be read by datasets ({error}): give {FORMS}") from error
    if isinstance(dataset, dict):
        raise DataError(f"{path} holds the splits {sorted(dataset)}: give the folder of one of them")
    return dataset


def _from_function(path: str) -> Any:
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be imported ({error}): put its folder on PYTHONPATH, on the workers too") from error
    return function()
