"""Build items like the job's own from rows of token ids; fill in missing entries if they are unambiguous."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grace_ds.errors import DataError
from grace_ds.records import Array, IntArray

PASS_DATASET = "pass a dataset whose items look like the job's as trusted_data to grace_ds.initialize"
IGNORED = -100  # the label that torch's cross_entropy ignores
MASK, LABELS, LOSS_MASK, POSITIONS = "attention_mask", "labels", "loss_mask", "position_ids"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class ItemForm:
    """The form of the job's items.

    Attributes:
        like: one of the job's items.
        key: of the token ids in ``like``, a mapping's key or a tuple's position; None: ``like`` is the token ids.
        probed: whether the model will be run on the items; if not, only their token ids are read.
    """

    like: Any
    key: Any
    probed: bool

    @property
    def tokens(self) -> Any:
        """The token ids of ``like``."""
        return self.like if self.key is None else self.like[self.key]

    @property
    def length(self) -> int:
        """Tokens that a row of text needs to become an item as long as ``like``.

        Raises:
            DataError: ``like`` has no token ids.
        """
        if self.key is None and isinstance(self.like, Mapping | tuple):
            raise DataError(
                f"text gives token ids, and none are known in the job's items; name their entry with features.tokens_key, or "
                f"{PASS_DATASET}"
            )
        return len(self.tokens) + self._shifts

    def items(self, rows: Sequence[tuple[str, Row]]) -> list[Any]:
        """Build an item from each row, in order.

        Args:
            rows: pairs (location, for messages; entries, including ``input_ids``).

        Raises:
            DataError: an entry is missing and cannot be filled in, or does not fit.
        """
        if isinstance(self.like, Mapping):
            named = [self._mapping(row, where) for where, row in rows]
            pad = self.probed and {MASK, LABELS} <= set(self.like) and len({len(r[self.key]) for r in named}) > 1
            filled = self._padded(named) if pad else named
            return [
                {key: value_like(value, self.like[key], f"{where}: {key}") for key, value in row.items()}
                for (where, _), row in zip(rows, filled, strict=True)
            ]
        if isinstance(self.like, tuple):
            return [self._tuple(row["input_ids"], where) for where, row in rows]
        return [value_like(row["input_ids"], self.like, f"{where}: input_ids") for where, row in rows]

    @property
    def _relation(self) -> str | None:
        """Relation of the item's labels to its token ids: the ``same``, the ``next`` ones; None if unknown."""
        if isinstance(self.like, Mapping):
            return relation(self.tokens, self.like[LABELS]) if self.key is not None and LABELS in self.like else None
        if isinstance(self.like, tuple) and len(self.like) == 2 and self.key == 0:
            return relation(*self.like)
        return None

    @property
    def _shifts(self) -> bool:
        return self._relation == "next"

    def _mapping(self, row: Row, where: str) -> dict[str, Any]:
        """Return the entries of a row under the names that the job's items have."""
        given = {key: row["input_ids"] if key == self.key else row[key] for key in self.like if key in row or key == self.key}
        missing = [key for key in self.like if key not in given]
        if LABELS in missing and self._shifts:
            given[self.key], given[LABELS] = row["input_ids"][:-1], row["input_ids"][1:]
        if self.key is not None:
            given |= {key: value for key in missing if (value := self._filled(key, given)) is not None}
        self._check_lengths(given, where)
        lacks = [key for key in self.like if key not in given]
        if lacks and (self.probed or self.key is None):
            raise DataError(
                f"{where}: the job's items have {sorted(map(str, self.like))}, this row lacks {lacks}, which cannot be made from "
                f"token ids; {PASS_DATASET}, add them to the file, or set recipe: content, which reads token ids alone"
            )
        return {key: given[key] for key in self.like if key in given}

    def _check_lengths(self, given: Row, where: str) -> None:
        """Check that masks, labels and positions have an entry for each token, where the job's own have.

        Raises:
            DataError: one has not; what is filled up later would be taken for tokens.
        """
        if self.key is None:
            return
        n = len(given[self.key])
        for key in (MASK, LABELS, LOSS_MASK, POSITIONS):
            if key in given and np.shape(self.like[key]) == (len(self.tokens),) and not _is_row(given[key], n):
                raise DataError(f"{where}: {key} must be a list of {n} numbers, one for each token, found {str(given[key])[:60]}")

    def _filled(self, key: str, given: Row) -> Any:
        """Make an entry from the token ids; None if the job's own entry differs from what would be made."""
        tokens, own = given[self.key], np.asarray(self.like[key])
        n, alike = len(tokens), own.shape == (len(self.tokens),)
        if key == LABELS:
            return given.get(LABELS, tokens if self._relation == "same" else None)
        if key in (MASK, LOSS_MASK) and alike and bool(np.isin(own, (0, 1)).all()):
            return np.ones(n, np.int64)
        if key == POSITIONS and alike and bool((own == np.arange(len(own))).all()):
            return np.arange(n)
        return None

    def _padded(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the rows padded to one length; the padding is masked and its labels are ignored."""
        longest = max(len(row[self.key]) for row in rows)
        mask, tokens = np.asarray(self.like[MASK]), np.asarray(self.tokens)
        hidden = tokens[mask == 0] if mask.shape == tokens.shape else tokens[:0]
        fill = {self.key: int(hidden[0]) if len(hidden) else 0, MASK: 0, LABELS: IGNORED, LOSS_MASK: 0}
        padded = []
        for row in rows:
            n = len(row[self.key])
            changed: dict[str, Any] = {
                key: np.concatenate([np.asarray(row[key]), np.full(longest - n, value)])
                for key, value in fill.items()
                if key in row and _is_row(row[key], n)
            }
            if POSITIONS in row and _is_row(row[POSITIONS], n) and (own := np.asarray(row[POSITIONS])).dtype.kind in "iuf":
                changed[POSITIONS] = np.concatenate([own, own[-1] + 1 + np.arange(longest - n)])  # the count goes on
            padded.append({key: changed.get(key, value) for key, value in row.items()})
        return padded

    def _tuple(self, tokens: Any, where: str) -> Any:
        """Build a tuple of token ids and labels, or of token ids alone; return bare token ids if only those are read."""
        kind = self._relation
        if len(self.like) == 1 and self.key == 0:
            values = [tokens]
        elif kind is not None:
            values = [tokens, tokens] if kind == "same" else [tokens[:-1], tokens[1:]]
        elif not self.probed:
            return value_like(tokens, self.tokens, f"{where}: input_ids")
        else:
            raise DataError(
                f"{where}: the job's items are tuples of {len(self.like)}, and it cannot be told what of them is made from token "
                f"ids; {PASS_DATASET}, or set recipe: content, which reads token ids alone"
            )
        entries = [
            value_like(value, like, f"{where}: entry {i}") for i, (value, like) in enumerate(zip(values, self.like, strict=True))
        ]
        return type(self.like)(*entries) if hasattr(self.like, "_fields") else type(self.like)(entries)


def relation(tokens: Any, labels: Any) -> str | None:
    """Return how labels relate to tokens: ``same``, ``next`` (the tokens that follow), or None for neither or an unclear case.

    Args:
        tokens, labels: of one sample, one axis; labels of ``IGNORED`` are skipped.
    """
    x, y = _integers(tokens), _integers(labels)
    if x is None or y is None or x.shape != y.shape or len(x) < 2:
        return None
    valid = y != IGNORED
    same = bool(valid.any() and (x == y)[valid].all())
    shifted = bool(valid[:-1].any() and (x[1:] == y[:-1])[valid[:-1]].all())
    return None if same == shifted else "same" if same else "next"


def _integers(value: Any) -> IntArray | None:
    try:
        array: Array = np.asarray(value)
    except (ValueError, RuntimeError):  # ragged, or on a device
        return None
    return array.astype(np.int64) if array.ndim == 1 and array.dtype.kind in "iu" else None


def _is_row(value: Any, n: int) -> bool:
    """Return whether a row's entry has one value for each of its ``n`` tokens."""
    if not isinstance(value, list | np.ndarray) or len(value) != n:
        return False
    return value.ndim == 1 if isinstance(value, np.ndarray) else not any(isinstance(part, list | dict) for part in value)


def value_like(value: Any, like: Any, where: str) -> Any:
    """Convert ``value`` to the kind of ``like``: a tensor or an array of its dtype, a list, or unchanged.

    Raises:
        DataError: ``value`` has another number of axes, no numbers, or some that do not fit the dtype.
    """
    import torch

    if not isinstance(like, (torch.Tensor, np.ndarray)):
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if isinstance(like, list) and not isinstance(value, list):
            raise DataError(f"{where}: a list like the job's is needed, found {type(value).__name__}")
        return value
    try:
        array: Array = np.asarray(value)
    except ValueError as error:
        raise DataError(f"{where}: not a regular array ({error})") from None
    if array.dtype.kind not in "iufb" or array.ndim != like.ndim:
        raise DataError(f"{where}: {like.ndim}-D numbers as in the job are needed, found {array.ndim}-D {array.dtype}")
    made: Any
    if isinstance(like, np.ndarray):
        with np.errstate(invalid="ignore", over="ignore"):  # what does not fit is refused below
            made = kept = array.astype(like.dtype)
    else:
        made = torch.from_numpy(array.copy()).to(like.dtype)
        kept = array if like.dtype.is_floating_point or like.dtype.is_complex else made.numpy()
    if kept.dtype.kind in "iub" and not np.array_equal(kept, array):
        raise DataError(f"{where}: it holds numbers that {like.dtype} cannot hold; give token ids of the job's own tokeniser")
    return made
