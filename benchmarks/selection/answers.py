"""Problems with their own answer, and with another problem's: rows that differ only in whether their halves belong together.

A row is the end of a question and the beginning of an answer, joined at a fixed place: nothing is padded, and every bigram of a
row with a wrong answer, but the one at the joint, stands in a row with a right one too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from grace_ds_quickstart.pollute import JunkSource

from grace_ds.errors import DataError
from grace_ds.records import Array

LENGTH = 129  # of the benchmark's rows: 48 tokens of the question, 81 of the answer


def question_tokens(length: int) -> int:
    """How many of a row's tokens are the question's: three eighths, since the loss on the answer is what tells them apart."""
    return 3 * length // 8


def matched_rows(tokenizer: Any, texts: Sequence[str], length: int) -> Array:
    """One row for each problem that is long enough: the last tokens of its question, the first ones of its answer.

    Args:
        texts: question, answer, question, answer, and so on.

    Returns:
        (n, length) int32.
    """
    asked = question_tokens(length)
    ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    pairs = zip(ids[::2], ids[1::2], strict=True)
    rows = [q[-asked:] + a[: length - asked] for q, a in pairs if len(q) >= asked and len(a) >= length - asked]
    return np.array(rows, np.int32).reshape(-1, length)


def permuted_answers(source: JunkSource, rng: np.random.Generator, count: int) -> Array:
    """``count`` of the clean rows' questions, each with another row's answer, (count, length) int32; no half occurs twice.

    Raises:
        DataError: there are fewer clean rows, or fewer than 2 are asked for, of which none can have another's answer.
    """
    if not 2 <= count <= len(source.rows):
        raise DataError(f"{count} permuted answers of {len(source.rows)} problems: ask for 2 at least, and no more than problems")
    asked = question_tokens(source.rows.shape[1])
    picked = rng.permutation(len(source.rows))[:count]
    others = np.roll(picked, 1)  # a cycle of length >= 2 leaves no answer in its place
    rows = np.concatenate([source.rows[picked, :asked], source.rows[others, asked:]], axis=1)
    return rows.astype(np.int32)
