"""Read token corpora that Megatron or DeepSpeed have tokenised already as a dataset, without copying them."""

from __future__ import annotations

import operator
import os
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from grace_ds.data.megatron_index import file_size, read_layout
from grace_ds.errors import ConfigError, DataError
from grace_ds.records import IntArray


class MMapTokens(Dataset[dict[str, torch.Tensor]]):
    """A map-style dataset over a Megatron or DeepSpeed ``.bin``/``.idx`` pair; the tokens stay in the file.

    Without ``length`` an item is one sequence of the file, which is one document unless the corpus was split into
    sentences; the items differ in length, so that a loader needs a collate function.

    With ``length`` an item is a piece of the whole corpus read as one stream, in the file's order and across documents, as
    Megatron's GPT dataset cuts it: item i holds tokens [i * length, (i + 1) * length + overlap).  To separate documents,
    their end-of-document tokens must be in the file (``--append-eod``).  The last tokens, if they do not fill an item, are
    left out.  The ids are stable: they depend only on the file and ``length``.

    It can be pickled (only its path and sizes travel), so workers of either start method share the page cache.

    Args:
        prefix: path of the two files, with or without ``.bin`` or ``.idx``.
        length: tokens from the start of an item to the start of the next; None: one sequence per item.
        overlap: tokens of the next item at the end of an item: 1 for a model that is fed ``ids[:-1]`` and scored on
            ``ids[1:]``, 0 for one that shifts its labels itself.  Only used with ``length``.
        dtype: token type ("uint32", …), needed if the files alone are ambiguous; None: detect it.

    Attributes:
        layout: the checked layout of the files.

    Raises:
        ConfigError: ``length`` or ``overlap`` is out of range.
        DataError: a file is missing, truncated, contradicts itself or the other, does not hold token ids, or holds too
            few for one item.  Reading an item raises it at a negative token.
    """

    def __init__(
        self, prefix: str | os.PathLike[str], *, length: int | None = None, overlap: int = 1, dtype: str | None = None
    ) -> None:
        if length is not None and length < 1:
            raise ConfigError(f"length is {length}: give the tokens of an item, at least 1, or None for one sequence an item")
        if length is not None and not 0 <= overlap <= length:
            raise ConfigError(f"overlap is {overlap} with length {length}: give 1, or 0 if the model shifts its labels itself")
        self.layout, self.length, self.overlap = read_layout(prefix, dtype), length, overlap
        if len(self) < 1:
            raise DataError(
                f"{self.layout.bin} has {self.layout.total} tokens, fewer than one item of {length} + {overlap}: lower length"
            )
        self._open()

    def _open(self) -> None:
        self._tokens, self._lengths, self._pointers = self.layout.tokens(), self.layout.lengths(), self.layout.pointers()

    def __len__(self) -> int:
        if self.length is None:
            return self.layout.sequences
        return max(0, self.layout.total - self.overlap) // self.length

    def tokens(self, index: int) -> IntArray:
        """Return a copy of the token ids of item ``index``, (T,) int64; a negative index counts from the end.

        Raises:
            IndexError: there is no such item.
            DataError: a token is negative, which indicates a wrong token type.
        """
        i = operator.index(index)
        if not -len(self) <= i < len(self):
            raise IndexError(f"item {i} of {len(self)} in {self.layout.prefix}")
        i %= len(self)
        if self.length is not None:
            start, stop = i * self.length, (i + 1) * self.length + self.overlap
        else:
            start = int(self._pointers[i]) // self._tokens.itemsize
            stop = start + int(self._lengths[i])
        tokens: IntArray = self._tokens[start:stop].astype(np.int64)
        if len(tokens) and tokens.min() < 0:
            raise DataError(
                f"{self.layout.bin}: token {tokens.min()} in item {i}, read as {self.layout.dtype}; ids are never negative: "
                "the index names another type than was written, or this is no token corpus; build it anew"
            )
        return tokens

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return ``{"input_ids": (T,) int64}`` of item ``index``; see :meth:`tokens`."""
        return {"input_ids": torch.from_numpy(self.tokens(index))}

    def __getstate__(self) -> dict[str, Any]:
        return {"layout": self.layout, "length": self.length, "overlap": self.overlap}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        found = file_size(self.layout.idx), file_size(self.layout.bin)
        if found != self.layout.sizes:
            raise DataError(
                f"{self.layout.prefix}: .idx and .bin have {found} bytes and had {self.layout.sizes} when the dataset was made: "
                "leave a corpus in use alone, and make the dataset anew"
            )
        self._open()
