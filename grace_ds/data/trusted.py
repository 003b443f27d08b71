"""Load the trusted set: a few hundred samples known to be good, in the form of the job's own dataset items."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grace_ds.data.tokenizer import is_failure
from grace_ds.data.trusted_items import ItemForm
from grace_ds.errors import DataError
from grace_ds.records import IntArray
from grace_ds.utils.reading import parse_json, read_npy, read_text

Tokenize = Callable[[str], Sequence[int]]
_BYTES = 1 << 28  # of a file of text or JSON: a few hundred samples, held as Python's objects


class TrustedDataset:
    """Trusted samples in memory, map-style."""

    def __init__(self, items: list[Any]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        return self._items[index]


def load_trusted(
    path: str | Path, like: Any, tokenize: Tokenize | None = None, *, key: Any = "input_ids", probed: bool = True
) -> TrustedDataset:
    """Load the trusted samples of a file as items like the job's own.

    Masks, positions and labels that the file does not hold are made if the job's own items show what they are: ones, the
    count from 0, the token ids themselves or the next ones.  Rows of different lengths are padded to the longest if items
    have an attention mask and labels; the labels of the padding are ignored.

    Args:
        path: .jsonl, each line an object with ``input_ids`` (and any other entries that the job's items have); or .npy,
            integers of shape (n, T); or text: .txt with blank lines between documents, or .jsonl with ``text`` instead
            of ``input_ids``.  Text is joined and cut into samples as long as ``like``.
        like: an item of the job's dataset: a tensor, an array, a list of ints, or a dict or a tuple of such.
        tokenize: the job's tokeniser, for text.
        key: of the token ids in ``like``, if that is a dict or a tuple.
        probed: whether the model will be run on the samples; if not, only their token ids are read, and entries of
            ``like`` that cannot be made are left out.

    Raises:
        DataError: the file is missing, empty or malformed (with file:line), or its rows do not fit ``like``.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"trusted file {file} does not exist: correct trusted, or leave it null")
    form = ItemForm(like, key if isinstance(like, Mapping | tuple) else None, probed)
    texts = _texts(file)
    if texts is not None:
        rows = _cut(file, texts, form.length, tokenize) if texts else []
    elif file.suffix == ".jsonl":
        rows = _jsonl_rows(file)
    elif file.suffix == ".npy":
        rows = _npy_rows(file)
    else:
        raise DataError(f"trusted file {file}: suffix {file.suffix!r} is not known; give .jsonl, .npy or .txt")
    if not rows:
        raise DataError(f"trusted file {file} holds no samples: add some, or set trusted to null")
    return TrustedDataset(form.items(rows))


def refuse_overlap(trusted: Any, validation: Any, tokens_of: Callable[[Any], IntArray]) -> None:
    """Check that no trusted sample is in the validation set, compared token for token.

    Args:
        trusted, validation: map-style datasets.
        tokens_of: the token ids of an item.

    Raises:
        DataError: a sample is in both sets, so that validation would show a gain that does not exist.
    """
    seen = {_digest(tokens_of(validation[sample])): sample for sample in range(len(validation))}
    for sample in range(len(trusted)):
        match = seen.get(_digest(tokens_of(trusted[sample])))
        if match is not None:
            raise DataError(
                f"trusted sample {sample} is validation sample {match}: selection would be steered by what it is measured with; "
                "take it out of one of the two"
            )


def _digest(tokens: IntArray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(tokens, "<i8").tobytes(), digest_size=16).digest()


def _texts(file: Path) -> list[str] | None:
    """Return the documents of a text file; None if its first line shows that it holds token ids."""
    if file.suffix == ".txt":
        return [part for part in _read_text(file).split("\n\n") if part.strip()]
    if file.suffix != ".jsonl":
        return None
    first = next((line for line in _read_text(file).split("\n") if line.strip()), "")
    if '"text"' not in first or '"input_ids"' in first:
        return None
    return [row["text"] for _, row in _objects(file, "text", str)]


def _read_text(file: Path) -> str:
    try:
        return read_text(file, _BYTES)
    except (OSError, ValueError) as error:
        raise DataError(f"trusted file {file} cannot be read as text: {error}; give a smaller file of UTF-8") from error


def _cut(file: Path, texts: list[str], length: int, tokenize: Tokenize | None) -> list[tuple[str, dict[str, Any]]]:
    """Tokenise all texts, join them, and cut them into pieces as long as the job's own samples."""
    if tokenize is None:
        raise DataError(
            f"trusted file {file} holds text: name the job's tokenizer in the config (tokenizer: tokenizer.json), pass "
            "tokenize=lambda text: [...token ids] to grace_ds.initialize, or give a file with input_ids"
        )
    try:
        tokens = np.concatenate([np.asarray(tokenize(text), np.int64) for text in texts])
    except BaseException as error:  # the job's own function: what it makes of half a character, say
        if not is_failure(error):
            raise
        raise DataError(
            f"trusted file {file} cannot be tokenised ({type(error).__name__}: {error}); mend the text, or give input_ids"
        ) from error
    rows = tokens[: len(tokens) // length * length].reshape(-1, length)
    if not len(rows):
        raise DataError(f"trusted file {file} gives {len(tokens)} tokens, the job's samples have {length}: add text")
    return [(f"{file}[{i}]", {"input_ids": row.tolist()}) for i, row in enumerate(rows)]


def split_trusted(n: int, seed: int) -> tuple[IntArray, IntArray]:
    """Split [0, n) into two disjoint halves: one to fit the recipe on, one to judge it by.

    Returns:
        fit (ceil(n / 2),) and calibrate (floor(n / 2),), both int64 and sorted.

    Raises:
        DataError: fewer than 2 samples.
    """
    if n < 2:
        raise DataError(f"{n} trusted sample(s) cannot be split into two halves: give at least 2, better 128 or more")
    order = np.random.Generator(np.random.Philox(key=seed % 2**128)).permutation(n).astype(np.int64)
    return np.sort(order[: (n + 1) // 2]), np.sort(order[(n + 1) // 2 :])


def _jsonl_rows(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return (file:line, object) of every line that is not blank."""
    rows = _objects(file, "input_ids", list)
    for where, row in rows:
        tokens = row["input_ids"]
        if not tokens or not all(type(token) is int and abs(token) < 2**63 for token in tokens):
            raise DataError(f"{where}: input_ids must be a non-empty list of integers, found {str(tokens)[:60]}")
    return rows


def _objects(file: Path, key: str, kind: type) -> list[tuple[str, dict[str, Any]]]:
    """Return (file:line, object) of every line that is not blank, each with ``key`` of that kind."""
    rows: list[tuple[str, dict[str, Any]]] = []
    for number, line in enumerate(_read_text(file).split("\n"), 1):  # splitlines would cut inside of strings
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            row = parse_json(line, object_pairs_hook=_without_repeats)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno}); write one object a line") from None
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({str(error)[:80]}); write one object a line") from None
        if not isinstance(row, dict) or key not in row:
            found = f"keys {sorted(row)}" if isinstance(row, dict) else type(row).__name__
            raise DataError(f"{where}: an object with {key} is needed, found {found}")
        if not isinstance(row[key], kind):
            raise DataError(f"{where}: {key} must be a {kind.__name__}, found {str(row[key])[:60]}")
        rows.append((where, row))
    return rows


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of a line; refuse a key that is given twice, of which JSON's reader would silently take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def _npy_rows(file: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        array = read_npy(file)
    except (OSError, ValueError) as error:
        raise DataError(f"trusted file {file} cannot be read as .npy: {error}; write it by numpy.save") from error
    if array.ndim != 2 or array.dtype.kind not in "iu" or not array.shape[1]:
        raise DataError(f"trusted file {file} holds {array.dtype} of shape {array.shape}: integers (n, T) are needed")
    return [(f"{file}[{i}]", {"input_ids": row.astype(np.int64)}) for i, row in enumerate(array)]
