"""Read the token ids out of a job's own dataset, for any form of items, in flat blocks.

The stages behind this file see only :class:`TokenBlock`: the tokens of some samples one after another, with offsets, so
that they can work on whole arrays.  Reading a dataset's items may run the job's own code.  The random state of Python,
NumPy and torch is restored afterwards, so that reading the data never changes the job's draws.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from grace_ds.errors import DataError
from grace_ds.records import Array, IntArray
from grace_ds.utils.rng import undisturbed_rng

TOKEN_KEYS = ("input_ids", "tokens", "ids", "text_ids")
IGNORED = -100  # label of a token that torch's cross_entropy leaves out
BREAK = -(2**31)  # stands between two documents of a packed sample; no n-gram holds it
BLOCK_TOKENS = 1 << 18  # approximate tokens per block, so that its temporaries fit the caches
FINGERPRINT_ITEMS = 64
_NONE = np.empty(0, np.int64)
CURE = "name the entry that holds the token ids with features.tokens_key, or set features.enabled: false"


@dataclass(frozen=True)
class TokenBlock:
    """The tokens of n samples, one after another.

    Attributes:
        ids: (n,) int64, dataset ids.
        flat: (total,) int64, all tokens in the order of ``ids``; :data:`BREAK` between the documents of a packed sample.
        offsets: (n + 1,) int64; sample i is ``flat[offsets[i]:offsets[i + 1]]``.
    """

    ids: IntArray
    flat: IntArray
    offsets: IntArray

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, selected: npt.NDArray[np.bool_]) -> TokenBlock:
        """Return the samples that ``selected`` (n,) bool names."""
        lengths = np.diff(self.offsets)
        offsets = np.zeros(int(selected.sum()) + 1, np.int64)
        np.cumsum(lengths[selected], out=offsets[1:])
        return TokenBlock(self.ids[selected], self.flat[np.repeat(selected, lengths)], offsets)

    @staticmethod
    def of(ids: IntArray, rows: list[IntArray]) -> TokenBlock:
        """Build the block of ``rows``, one token array per sample."""
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        flat = np.concatenate(rows) if rows else np.empty(0, np.int64)
        return TokenBlock(np.asarray(ids, np.int64), flat.astype(np.int64, copy=False), offsets)


def tokens_of(item: Any, key: str = "auto", masked: bool = False) -> IntArray:
    """Return the token ids of one dataset item.

    Args:
        item: a 1-D integer tensor, array or list; a mapping; or a tuple or list of such.  A leading axis of length 1 is
            dropped; if a mapping holds an ``attention_mask``, the tokens that it masks are dropped, and without one what its
            ``labels`` show to be padding: a run of one token at either end whose labels are all ignored (-100).
        key: the mapping's key or the tuple's position; "auto" tries ``TOKEN_KEYS``, or takes the first integer entry.
        masked: True keeps the masked tokens.

    Returns:
        (T,) int64.

    Raises:
        DataError: no token ids were found.
    """
    if isinstance(item, Mapping):
        names = TOKEN_KEYS if key == "auto" else (key,)
        found = next((name for name in names if name in item), None)
        tokens = None if found is None else _vector(item[found])
        if tokens is None:
            raise DataError(f"no token ids in a dict with keys {sorted(map(str, item))} (looked for {names}); {CURE}")
        return tokens if masked else _unmasked(tokens, item)
    direct = _vector(item)
    if direct is not None:
        return direct
    if isinstance(item, (tuple, list)):
        return _from_sequence(item, key)
    shape = getattr(item, "shape", None)
    detail = "" if shape is None else f" of shape {tuple(shape)} and dtype {getattr(item, 'dtype', None)}"
    raise DataError(f"no token ids in an item of type {type(item).__name__}{detail}; {CURE}")


def key_of(item: Any, key: str = "auto") -> Any:
    """Return where :func:`tokens_of` finds the token ids of an item.

    A mapping's key or a tuple's position; None if the item is the token ids themselves.

    Raises:
        DataError: no token ids were found.
    """
    tokens_of(item, key)
    if isinstance(item, Mapping):
        return key if key != "auto" else next(name for name in TOKEN_KEYS if name in item)
    if _vector(item) is not None:
        return None
    return int(key) if key != "auto" else next(i for i, entry in enumerate(item) if _vector(entry) is not None)


def _from_sequence(item: tuple[Any, ...] | list[Any], key: str) -> IntArray:
    """Return the first integer vector of a tuple or list, or the one at position ``key``."""
    if key == "auto":
        for entry in item:
            tokens = _vector(entry)
            if tokens is not None:
                return tokens
    elif key.isdigit() and int(key) < len(item):
        tokens = _vector(item[int(key)])
        if tokens is not None:
            return tokens
    kinds = [type(entry).__name__ for entry in item[:8]]
    raise DataError(f"no token ids in a {type(item).__name__} of {len(item)} entries {kinds} (key {key!r}); {CURE}")


def _vector(value: Any) -> IntArray | None:
    """Return ``value`` as a 1-D int64 array; None if it is not a vector of integers."""
    if hasattr(value, "detach"):  # a torch tensor, without importing torch
        value = value.detach().cpu().numpy() if not value.is_floating_point() else None
    elif isinstance(value, (list, tuple)):
        if not value:  # a sample without tokens, as a list; an empty tuple is an item without entries
            return np.empty(0, np.int64) if isinstance(value, list) else None
        value = value if isinstance(value[0], (int, np.integer)) else None
    elif not isinstance(value, np.ndarray):
        value = None
    if value is None:
        return None
    try:
        array = np.asarray(value)
    except ValueError:  # a ragged list
        return None
    if array.ndim == 2 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 1 or array.dtype.kind not in "iu":
        return None
    return array.astype(np.int64)


def _unmasked(tokens: IntArray, item: Mapping[Any, Any]) -> IntArray:
    """Return the tokens whose attention mask is not 0, or those between the padding that the labels show."""
    mask, labels = _flat(item.get("attention_mask")), _flat(item.get("labels"))
    if mask is not None:
        return tokens[mask != 0] if mask.shape == tokens.shape else tokens
    if labels is None or labels.shape != tokens.shape or not len(tokens):
        return tokens
    ignored = labels == IGNORED
    first = int(np.argmin(ignored & (tokens == tokens[0])))
    last = len(tokens) - int(np.argmin((ignored & (tokens == tokens[-1]))[::-1]))
    # A single token at an end is more likely one that begins or ends a text.
    return tokens[first if first > 1 else 0 : last if last < len(tokens) - 1 else len(tokens)]


def _flat(value: Any) -> Array | None:
    """Return a tensor, array or list of numbers as a 1-D array; None if there is none."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    try:
        return None if value is None else np.asarray(value).reshape(-1)
    except ValueError:  # a ragged list
        return None


def document_starts(item: Any, tokens: int) -> IntArray:
    """Return the positions above 0 at which a document of a packed item begins, (m,) int64, ascending; none if it says none.

    Args:
        item: a dataset item; only a mapping can say where its documents begin.
        tokens: number of its tokens; an entry that does not fit it says nothing.
    """
    none = np.empty(0, np.int64)
    if not isinstance(item, Mapping):
        return none
    lengths, positions = (_vector(item[key]) if key in item else None for key in ("seq_lengths", "position_ids"))
    if lengths is not None and len(lengths) and (lengths > 0).all() and int(lengths.sum()) == tokens:
        return np.cumsum(lengths)[:-1]
    if positions is not None and len(positions) == tokens:
        starts = np.flatnonzero((positions[1:] == 0) & (positions[:-1] > 0)) + 1
        counted = np.diff(positions) == 1
        counted[starts - 1] = True
        return starts if counted.all() else none  # positions that do not count tokens say nothing about documents
    return none


class TokenReader:
    """Reader that streams the token ids of a map-style dataset.

    Args:
        dataset: with ``__getitem__`` (int) and ``__len__``.
        key: as for :func:`tokens_of`.
        max_tokens: maximum tokens read per sample; the rest is ignored.
        separator: token id that ends a document within a sample; -1: none does.  Without one, an item marks its documents by
            ``seq_lengths`` (as TRL packs) or by ``position_ids`` that start again.

    Attributes:
        seconds: time spent in the dataset so far.
    """

    def __init__(self, dataset: Any, key: str = "auto", max_tokens: int = 4096, separator: int = -1) -> None:
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise DataError(
                f"dataset of type {type(dataset).__name__} has no __getitem__ and __len__: content features need a "
                "map-style dataset; give one, or set features.enabled: false"
            )
        self.dataset, self.key, self.max_tokens, self.separator = dataset, key, max_tokens, separator
        self.seconds = 0.0
        self._fingerprint = ""

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, sample: int) -> IntArray:
        """Return the first ``max_tokens`` tokens of one sample with its documents divided by :data:`BREAK`, (T,) int64."""
        try:
            item = self.dataset[sample]
        except Exception as error:
            raise DataError(f"dataset[{sample}] raised {type(error).__name__}: {error}; repair that item") from error
        if type(item) is np.ndarray and item.ndim == 1 and item.dtype.kind in "iu" and self.separator < 0:
            # The usual item of a large corpus, in a fifth of the time: one thread reads for all that compute.
            return item[: self.max_tokens].astype(np.int64)
        try:
            tokens = tokens_of(item, self.key)
            starts = document_starts(item, len(tokens)) if isinstance(item, Mapping) else _NONE
            if len(starts):
                starts = starts[starts < min(len(tokens), self.max_tokens)]
            tokens = tokens[: self.max_tokens]
            if self.separator >= 0:
                tokens = np.where(tokens == self.separator, BREAK, tokens)
            return np.insert(tokens, starts, BREAK) if len(starts) else tokens
        except DataError as error:
            raise DataError(f"sample {sample}: {error}") from error

    def blocks(self, ids: IntArray, block: int = 1024) -> Iterator[TokenBlock]:
        """Yield the samples ``ids`` in order, in blocks as of :meth:`rows`."""
        for part, rows in self.rows(ids, block):
            yield TokenBlock.of(part, rows)

    def rows(self, ids: IntArray, block: int = 1024) -> Iterator[tuple[IntArray, list[IntArray]]]:
        """Yield ids and tokens of the samples ``ids`` in order: at most ``block``, and about ``BLOCK_TOKENS`` tokens, at a time.

        The dataset is read by the thread that iterates, and by no other.
        """
        start = 0
        while start < len(ids):
            began = time.perf_counter()
            rows: list[IntArray] = []
            total = 0
            with undisturbed_rng():
                while start + len(rows) < len(ids) and len(rows) < block and total < BLOCK_TOKENS:
                    rows.append(self.row(int(ids[start + len(rows)])))
                    total += len(rows[-1])
            part = np.asarray(ids[start : start + len(rows)], np.int64)
            start += len(rows)
            self.seconds += time.perf_counter() - began
            yield part, rows

    def all(self, ids: IntArray | None = None) -> TokenBlock:
        """Return the samples ``ids`` (default: the whole dataset) as one block; for few samples, such as a trusted set."""
        ids = np.arange(len(self), dtype=np.int64) if ids is None else ids
        parts = list(self.blocks(ids))
        rows = [part.flat[a:b] for part in parts for a, b in zip(part.offsets[:-1], part.offsets[1:], strict=True)]
        return TokenBlock.of(ids, rows)

    def fingerprint(self) -> str:
        """Return 32 hex digits over the key, ``max_tokens``, the length, the items' type and the tokens of 64 spread items.

        Other items are not read: a dataset edited in place needs another cache folder.
        """
        digest = hashlib.blake2b(f"{len(self)} {self.key} {self.max_tokens}".encode(), digest_size=16)
        with undisturbed_rng():
            for part in self._spread():
                digest.update(part)
            digest.update(type(self.dataset[0]).__name__.encode() if len(self) else b"")
        return digest.hexdigest()

    def token_fingerprint(self) -> str:
        """Return 32 hex digits over what is read of the samples: as :meth:`fingerprint`, whatever the items' form.

        A corpus that is tokenised in files and the dataset that a job makes of them have one such fingerprint.  It is computed
        once.
        """
        if self._fingerprint:
            return self._fingerprint
        digest = hashlib.blake2b(f"tokens {len(self)} {self.max_tokens} {self.separator}".encode(), digest_size=16)
        with undisturbed_rng():
            for part in self._spread():
                digest.update(part)
        self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _spread(self) -> Iterator[bytes]:
        """Yield id, length and tokens of 64 spread items."""
        n = len(self)
        for sample in np.unique(np.linspace(0, max(n - 1, 0), min(FINGERPRINT_ITEMS, n)).astype(np.int64)):
            row = self.row(int(sample))
            yield np.array([sample, len(row)], "<i8").tobytes() + row.astype("<i8").tobytes()


def fingerprint(dataset: Any, key: str = "auto", max_tokens: int = 4096) -> str:
    """Return 32 hex digits that identify a dataset's tokens; see :meth:`TokenReader.fingerprint`."""
    return TokenReader(dataset, key, max_tokens).fingerprint()
