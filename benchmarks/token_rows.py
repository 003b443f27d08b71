"""Rows of tokens in memory as a dataset, for the benchmarks that read content."""

from __future__ import annotations

from grace_ds.records import Array


class TokenRows:
    """A map-style dataset of token rows in memory."""

    def __init__(self, tokens: Array) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> Array:
        row: Array = self.tokens[i]
        return row
