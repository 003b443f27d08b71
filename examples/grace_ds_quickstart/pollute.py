"""What a crawl adds to clean text: near-duplicates, junk and machine-written code, in stated shares.

Rows are token sequences, (n, length) int32.  All functions are deterministic in the generator that they are given.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from grace_ds.errors import DataError
from grace_ds.records import Array, IntArray

Encode = Callable[[Sequence[str]], Array]  # documents -> one stream of token ids, (total,) int32


class Kind(IntEnum):
    """What a row of a pool is; kept beside the pool to look at afterwards, never shown to a selection."""

    UNIQUE = 0
    DUPLICATE = 1
    JUNK = 2
    GENERATED = 3


@dataclass(frozen=True)
class JunkSource:
    """What a junk kind may draw from.

    Attributes:
        rows: (n, length) int32, the clean rows.
        encode: the job's own tokeniser, so that junk looks as the crawl's would after tokenising.
        vocab: number of token ids.
    """

    rows: Array
    encode: Encode
    vocab: int


JunkKind = Callable[[JunkSource, np.random.Generator, int], Array]


@dataclass(frozen=True)
class Pool:
    """A training pool.

    Attributes:
        rows: (n, length) int32, in shuffled order.
        kinds: (n,) uint8, :class:`Kind`.
        sources: (n,) int64, row of the clean input that a row is or was copied from; -1 for junk and generated rows.
    """

    rows: Array
    kinds: Array
    sources: IntArray

    def counts(self) -> dict[str, int]:
        """Rows of each kind, by its lower-case name."""
        return {kind.name.lower(): int((self.kinds == kind).sum()) for kind in Kind}


def near_duplicates(rows: Array, rng: np.random.Generator, count: int, vocab: int) -> tuple[Array, IntArray]:
    """``count`` copies of ``rows``, few sources often and many seldom (Zipf), each with 1 to 4 tokens replaced.

    Returns:
        the copies (count, length) int32, and the row that each was copied from, (count,) int64.
    """
    weight = 1.0 / np.arange(1, len(rows) + 1)
    by_rank = rng.permutation(len(rows))
    sources = by_rank[rng.choice(len(rows), size=count, p=weight / weight.sum())].astype(np.int64)
    copies = rows[sources].copy()
    for copy, edits in zip(copies, rng.integers(1, 5, size=count), strict=True):
        where = rng.choice(len(copy), size=int(edits), replace=False)
        # An offset of 1 .. vocab-1 can never give the old token back: the stated number of edits is the real one.
        copy[where] = (copy[where] + rng.integers(1, vocab, size=int(edits))) % vocab
    return copies, sources


def random_bytes(source: JunkSource, rng: np.random.Generator, count: int) -> Array:
    """Binary files taken for text: random bytes, decoded as Latin-1 and tokenised."""

    def draw(size: int) -> str:
        return rng.integers(0, 256, size=size, dtype=np.uint8).tobytes().decode("latin-1")

    return _cut(source, draw, count)


def base64_text(source: JunkSource, rng: np.random.Generator, count: int) -> Array:
    """Embedded attachments: base64 of random bytes in lines of 76 characters."""

    def draw(size: int) -> str:
        raw = rng.integers(0, 256, size=size, dtype=np.uint8).tobytes()
        return base64.encodebytes(raw).decode("ascii")

    return _cut(source, draw, count)


def shuffled_tokens(source: JunkSource, rng: np.random.Generator, count: int) -> Array:
    """Scrambled layout: clean rows with their tokens in random order (the right unigrams, no sense)."""
    picked = source.rows[rng.integers(0, len(source.rows), size=count)]
    return rng.permuted(picked, axis=1).astype(np.int32)


JUNK: dict[str, JunkKind] = {"bytes": random_bytes, "base64": base64_text, "shuffled": shuffled_tokens}
CRAWL_JUNK = ("bytes", "base64", "shuffled")


def mix(
    source: JunkSource,
    rng: np.random.Generator,
    size: int,
    *,
    duplicates: float = 0.3,
    junk: float = 0.2,
    kinds: Sequence[str] = CRAWL_JUNK,
    generated: float = 0.0,
    generate: JunkKind | None = None,
) -> Pool:
    """A pool of ``size`` rows: shares of near-duplicates, junk (its kinds in equal parts) and generated rows, the rest unique.

    Args:
        source: the clean rows, at least ``size * (1 - duplicates - junk - generated)`` of them.
        rng: the only source of randomness.
        size: rows of the pool.
        duplicates: share of near-duplicates of the pool's own unique rows.
        junk: share of junk.
        kinds: names in :data:`JUNK`.
        generated: share of rows that a program wrote.
        generate: writes them; needed for a share above 0.

    Raises:
        DataError: the shares do not fit, a kind is not known, or there are too few clean rows.
    """
    n_duplicate, n_junk, n_generated = round(size * duplicates), round(size * junk), round(size * generated)
    n_unique = size - n_duplicate - n_junk - n_generated
    _check(source, n_unique, (duplicates, junk, generated), kinds)
    unique_sources = rng.permutation(len(source.rows))[:n_unique].astype(np.int64)
    unique = source.rows[unique_sources]
    copies, copied = near_duplicates(unique, rng, n_duplicate, source.vocab)
    # Made from this pool's own rows, so that scrambled text brings in no text of another split.
    own = JunkSource(unique, source.encode, source.vocab)
    parts: list[Array] = []
    if n_junk:
        shares = np.array_split(np.arange(n_junk), len(kinds))
        parts = [JUNK[name](own, rng, len(share)) for name, share in zip(kinds, shares, strict=True)]
    if n_generated:
        if generate is None:
            raise DataError(f"a share of {generated} generated rows: give generate, the function that writes them")
        parts.append(generate(own, rng, n_generated))
    rows = np.concatenate([unique, copies, *parts]).astype(np.int32)
    counts = {Kind.UNIQUE: n_unique, Kind.DUPLICATE: n_duplicate, Kind.JUNK: n_junk, Kind.GENERATED: n_generated}
    labels = np.repeat(list(counts), list(counts.values())).astype(np.uint8)
    origins = np.concatenate([unique_sources, unique_sources[copied], np.full(n_junk + n_generated, -1, np.int64)])
    order = rng.permutation(size)
    return Pool(rows=rows[order], kinds=labels[order], sources=origins[order])


def _check(source: JunkSource, n_unique: int, shares: tuple[float, ...], kinds: Sequence[str]) -> None:
    if min(shares) < 0 or sum(shares) >= 1:
        raise DataError(f"shares of duplicates, junk and generated rows {shares}: each must be >= 0 and their sum below 1")
    unknown = sorted(set(kinds) - set(JUNK))
    if unknown or (shares[1] > 0 and not kinds):
        raise DataError(f"junk kinds {unknown or 'none given'}: choose from {sorted(JUNK)}")
    if n_unique > len(source.rows):
        raise DataError(f"the pool needs {n_unique} clean rows, there are {len(source.rows)}: ask for a smaller pool")


def _cut(source: JunkSource, draw: Callable[[int], str], count: int) -> Array:
    """``count`` rows from one long stream of ``draw``; more text is drawn until there are enough tokens."""
    length = source.rows.shape[1]
    needed = count * length
    parts: list[Array] = []
    have = 0
    while have < needed:
        stream = source.encode([draw(4 * (needed - have) + 1024)])
        parts.append(stream)
        have += len(stream)
    return np.concatenate([*parts, np.empty(0, np.int32)])[:needed].reshape(count, length)
