"""A byte-level BPE, trained on the job's own training text: every byte string can be encoded, nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from grace_ds.records import Array

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END = "<|end|>"


def train_tokenizer(texts: Sequence[str], vocab: int) -> Tokenizer:
    """A byte-level BPE of ``vocab`` entries; the first one (id 0) is the end of a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_stream(tokenizer: Tokenizer, texts: Sequence[str]) -> Array:
    """All documents one after another, each closed by the end token.

    Returns:
        (total,) int32.
    """
    end = tokenizer.token_to_id(END)
    parts: list[Array] = []
    for encoding in tokenizer.encode_batch(list(texts)):
        parts.append(np.asarray([*encoding.ids, end], np.int32))
    return np.concatenate(parts) if parts else np.empty(0, np.int32)
