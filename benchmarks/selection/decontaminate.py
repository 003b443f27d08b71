"""What a model is judged on must not stand in what it learns from: rows that share an n-gram are dropped.

Rows are token sequences, (n, length) int32.  An n-gram is n tokens within one row, hashed to 64 bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from grace_ds.records import Array

GRAM = 13  # as in the decontamination of GPT-3's training set (arXiv 2005.14165), of tokens in the place of words
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that its powers never vanish mod 2^64
_FINISH = np.uint64(0xBF58476D1CE4E5B9)
_BLOCK = 8192  # rows hashed at once


def gram_hashes(rows: Array) -> npt.NDArray[np.uint64]:
    """(n, length - 12) uint64: the hash of every 13-gram of each row."""
    tokens = rows.astype(np.uint64) + np.uint64(1)
    width = max(0, rows.shape[1] - GRAM + 1)
    hashed = np.zeros((len(rows), width), np.uint64)
    for at in range(GRAM if width else 0):
        hashed *= _BASE
        hashed += tokens[:, at : at + width]
    hashed ^= hashed >> np.uint64(32)
    hashed *= _FINISH
    hashed ^= hashed >> np.uint64(29)
    return hashed


def shares_gram(rows: Array, others: Array) -> npt.NDArray[np.bool_]:
    """(n,) bool: whether a row of ``rows`` shares a 13-gram with any row of ``others``."""
    mine = gram_hashes(rows)
    shared = np.zeros(len(rows), np.bool_)
    wanted = np.unique(mine)
    for start in range(0, len(others), _BLOCK):
        found = np.intersect1d(wanted, gram_hashes(others[start : start + _BLOCK]))
        if len(found):
            shared |= np.isin(mine, found).any(axis=1)
    return shared


def decontaminate(splits: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, int]]:
    """Each split without the rows that share a 13-gram with any split before it.

    Args:
        splits: rows by split, the training text first; what comes first is kept whole.

    Returns:
        the kept rows by split, in their order, and how many rows each split lost.
    """
    kept: dict[str, Array] = {}
    dropped: dict[str, int] = {}
    for name, rows in splits.items():
        bad = np.zeros(len(rows), np.bool_)
        for before in kept.values():
            bad |= shares_gram(rows, before)
        kept[name], dropped[name] = rows[~bad], int(bad.sum())
    return kept, dropped
