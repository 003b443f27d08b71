"""Junk beyond the quickstart's: kinds to tune on, and kinds that no tuning may see.

A kind has the quickstart's signature: (source, rng, count) to rows (count, length) int32, deterministic in the generator.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from grace_ds_quickstart.corpus import chunk
from grace_ds_quickstart.generated import generated_code, templated
from grace_ds_quickstart.pollute import CRAWL_JUNK, JUNK, JunkKind, JunkSource

from benchmarks.selection import texts
from benchmarks.selection.answers import permuted_answers
from benchmarks.selection.decontaminate import shares_gram
from benchmarks.selection.generated import HELD_OUT
from grace_ds.errors import DataError
from grace_ds.records import Array

Decode = Callable[[Array], list[str]]  # rows (n, length) -> n texts
CHARACTERS = 8  # asked for a token: no text here has so many, so one draw is enough
DEV_JUNK = ("rot13", "markov", "csv", "hexdump", "prose")
UNSEEN_JUNK = ("html", "reversed", "language", "json")
OFF_DOMAIN = ("c", "man", "javascript", "perl")
SPARE = 64  # rows drawn beyond those needed, for the few that share text with what a model is judged on


def junk_kind(name: str, decode: Decode, root: Path | None) -> JunkKind:
    """The junk kind called ``name``.

    Args:
        name: of the quickstart's or of this file's.
        decode: of the corpus' tokenizer.
        root: of the second corpus; needed by ``shakespeare`` alone.

    Raises:
        DataError: there is no such kind.
        MissingKind: its text is not on this machine.
    """
    if name in JUNK:
        return JUNK[name]
    if name in texts.SOURCES:
        texts.files_of(name)  # missing text is said here and now
        return lambda source, rng, count: rows_of(name, source, rng, count, texts.draw(name, rng, _characters(source, count)))
    plain: dict[str, JunkKind] = {
        "markov": markov,
        "csv": csv_numbers,
        "hexdump": hexdump,
        "generated": generated_code,
        "generated-heldout": templated(HELD_OUT),
        "permuted": permuted_answers,
    }
    if name in plain:
        return plain[name]
    if name in ("rot13", "reversed", "json"):
        return _of_clean_text(name, decode)
    readers: dict[str, Callable[[], list[str]]] = {"html": texts.html_pages, "prose": texts.descriptions}
    if name == "shakespeare":
        readers[name] = lambda: [_shakespeare(root)]
    if name not in readers:
        raise DataError(f"junk kind {name!r} is not known: choose from {sorted({*JUNK, *plain, *readers, *texts.SOURCES})}")
    return lambda source, rng, count: rows_of(name, source, rng, count, readers[name]())


def rows_of(name: str, source: JunkSource, rng: np.random.Generator, count: int, documents: Sequence[str]) -> Array:
    """``count`` of the rows of ``documents``, in random order.

    Raises:
        DataError: the documents have fewer.
    """
    rows = chunk(source.encode(documents), source.rows.shape[1])
    if len(rows) < count:
        raise DataError(f"junk kind {name!r} has text for {len(rows)} rows, {count} are needed: ask for a smaller pool")
    return rows[rng.permutation(len(rows))[:count]].astype(np.int32)


def blended(kinds: Sequence[JunkKind], weights: Sequence[float]) -> JunkKind:
    """The kind that takes from each of ``kinds`` a part in proportion to its weight."""
    ends = np.cumsum(weights) / np.sum(weights)

    def make(source: JunkSource, rng: np.random.Generator, count: int) -> Array:
        counts = np.diff(np.round(ends * count).astype(np.int64), prepend=0)
        return np.concatenate([kind(source, rng, int(part)) for kind, part in zip(kinds, counts, strict=True)])

    return make


def apart_from(kind: JunkKind, name: str, held: Array) -> JunkKind:
    """``kind`` without the rows that share a 13-gram with any of ``held`` (n, length)."""

    def make(source: JunkSource, rng: np.random.Generator, count: int) -> Array:
        rows = kind(source, rng, count + SPARE)
        rows = rows[~shares_gram(rows, held)][:count]
        if len(rows) < count:
            raise DataError(f"junk kind {name!r}: more than {SPARE} rows share text with rows that a model is judged on")
        return rows

    return make


def markov(source: JunkSource, rng: np.random.Generator, count: int) -> Array:
    """Order-1 Markov text: each token drawn from the followers of the last one in the clean rows."""
    left, right = source.rows[:, :-1].reshape(-1), source.rows[:, 1:].reshape(-1)
    order = np.argsort(left, kind="stable")
    follower = right[order]
    start = np.searchsorted(left[order], np.arange(source.vocab + 1))
    rows = np.empty((count, source.rows.shape[1]), np.int32)
    rows[:, 0] = left[rng.integers(0, len(left), size=count)]
    for at in range(1, rows.shape[1]):
        low, high = start[rows[:, at - 1]], start[rows[:, at - 1] + 1]
        # A token that only ever ends a row has no follower: any pair of the text goes on from there.
        dead = low == high
        low, high = np.where(dead, 0, low), np.where(dead, len(follower), high)
        rows[:, at] = follower[rng.integers(low, high)]
    return rows


def csv_numbers(source: JunkSource, rng: np.random.Generator, count: int) -> Array:
    """Tables of random numbers, comma-separated, each with its own columns, scale and digits."""
    tables: list[str] = []
    characters, total = _characters(source, count), 0
    while total < characters:
        columns, digits = int(rng.integers(2, 12)), int(rng.integers(0, 6))
        values = rng.normal(scale=10.0 ** rng.integers(-2, 5), size=(int(rng.integers(5, 60)), columns))
        tables.append("\n".join(",".join(f"{x:.{digits}f}" for x in row) for row in values) + "\n")
        total += len(tables[-1])
    return rows_of("csv", source, rng, count, tables)


def hexdump(source: JunkSource, rng: np.random.Generator, count: int) -> Array:
    """What hexdump -C prints of random bytes."""
    lines: list[str] = []
    base = int(rng.integers(0, 1 << 20)) * 16
    for i in range(_characters(source, count) // 76):
        data = rng.integers(0, 256, size=16, dtype=np.uint8).tobytes()
        shown = "".join(chr(b) if 32 <= b < 127 else "." for b in data)
        lines.append(f"{base + 16 * i:08x}  {data[:8].hex(' ')}  {data[8:].hex(' ')}  |{shown}|\n")
    return rows_of("hexdump", source, rng, count, ["".join(lines)])


def _of_clean_text(name: str, decode: Decode) -> JunkKind:
    """Junk made of the pool's own text, so that it brings in no text of another split."""

    def make(source: JunkSource, rng: np.random.Generator, count: int) -> Array:
        clean = decode(source.rows[rng.integers(0, len(source.rows), size=2 * count + 8)])
        if name == "rot13":
            changed = [str(codecs.encode(text, "rot13")) for text in clean]
        elif name == "reversed":
            changed = [text[::-1] for text in clean]
        else:
            changed = [truncated_json(clean[i : i + 4], rng) for i in range(len(clean))]
        return rows_of(name, source, rng, count, changed)

    return make


def truncated_json(clean: Sequence[str], rng: np.random.Generator) -> str:
    """A piece, cut at random, of nested JSON whose names are the words of some clean text."""
    words: list[str] = re.findall(r"[A-Za-z_]\w+", " ".join(clean)) or ["none"]

    def word() -> str:
        return words[int(rng.integers(0, len(words)))]

    def tree(depth: int) -> Any:
        what = int(rng.integers(0, 7 if depth else 5))
        if what == 5:
            return [tree(depth - 1) for _ in range(int(rng.integers(1, 6)))]
        if what == 6:
            return {word(): tree(depth - 1) for _ in range(int(rng.integers(1, 6)))}
        scalars = (word(), int(rng.integers(-1000, 10**6)), round(float(rng.normal()), 4), bool(rng.integers(0, 2)), None)
        return scalars[what]

    indent = (None, 2)[int(rng.integers(0, 2))]
    text = json.dumps({word(): tree(4) for _ in range(40)}, indent=indent)
    start = int(rng.integers(0, max(1, len(text) - 200)))
    return text[start : start + int(rng.integers(200, 1200))]


def _shakespeare(root: Path | None) -> str:
    path = None if root is None else root / "tinyshakespeare" / "input.txt"
    if path is None or not path.is_file():
        raise texts.MissingKind(f"no text of kind 'shakespeare' ({path}): --corpus names a folder with tinyshakespeare/input.txt")
    return path.read_text("utf-8")


def _characters(source: JunkSource, count: int) -> int:
    return CHARACTERS * count * int(source.rows.shape[1]) + 1024


__all__ = ["CRAWL_JUNK", "DEV_JUNK", "OFF_DOMAIN", "UNSEEN_JUNK", "Decode", "apart_from", "blended", "junk_kind", "rows_of"]
