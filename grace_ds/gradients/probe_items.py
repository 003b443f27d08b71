"""Check that samples can be run through the model in a probe, and report the ones that cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from grace_ds.data.tokens import tokens_of
from grace_ds.errors import DataError
from grace_ds.records import IntArray
from grace_ds.utils.rng import undisturbed_rng

_LOOKED_AT = 64  # pool samples read to find out whether the model embeds the ids in the items


@dataclass(frozen=True)
class SampleForm:
    """What the model and the job require of a sample.

    Attributes:
        vocabulary: rows of the token embedding; None if unknown.
        key: of the token ids in an item, as in ``features.tokens_key``.
    """

    vocabulary: int | None = None
    key: str = "auto"

    @staticmethod
    def of(module: nn.Module, pool: Any, key: str) -> SampleForm:
        """Find the form from a model and the job's dataset.

        ``vocabulary`` is None if the first pool samples hold ids outside of the embedding: the model then maps ids itself.
        """
        form = SampleForm(embedding_rows(module), key)
        if form.vocabulary is None:
            return form
        try:
            with undisturbed_rng():
                for sample in range(min(_LOOKED_AT, len(pool))):
                    form.check(pool[sample], sample, "pool")
        except DataError:
            return SampleForm(None, key)
        return form

    def check_all(self, trusted: Any, collate: Callable[[list[Any]], Any] | None) -> None:
        """Check every sample of a trusted set before a run begins.

        Args:
            collate: the job's, tried on a shortest and a longest sample if lengths differ; None: there are no probes.

        Raises:
            DataError: a sample holds an id that the model has no embedding for, or samples of two lengths cannot be joined.
        """
        with undisturbed_rng():
            lengths = []
            for sample in range(len(trusted)):
                self.check(trusted[sample], sample, "trusted")
                tokens = ids_of(trusted[sample], self.key)
                lengths.append(-1 if tokens is None else len(tokens))
            ends = np.array([np.argmin(lengths), np.argmax(lengths)])
            if collate is not None and lengths[ends[0]] != lengths[ends[1]]:
                self.batch(trusted, ends, collate, "trusted")

    def check(self, item: Any, sample: int, which: str) -> None:
        """Check the token ids of an item, including those under an attention mask of 0.

        Args:
            sample: position of the item in the ``which`` samples ("trusted" or "pool"), for the message.

        Raises:
            DataError: the embedding has no row for an id.
        """
        tokens = ids_of(item, self.key)
        if self.vocabulary is None or tokens is None or not len(tokens):
            return
        odd = tokens[(tokens < 0) | (tokens >= self.vocabulary)]
        if len(odd):
            raise DataError(
                f"{which} sample {sample} holds token id {int(odd[0])}, and the model's embedding has {self.vocabulary} rows; "
                "give ids of the job's own tokenizer, or resize the embedding"
            )

    def batch(self, dataset: Any, ids: IntArray, collate: Callable[[list[Any]], Any], which: str) -> Any:
        """Check the samples ``ids`` and join them with ``collate``.

        Raises:
            DataError: an item cannot be read, holds an id that the model has no embedding for, or does not fit the others.
        """
        items = [dataset[int(i)] for i in ids]
        for item, sample in zip(items, ids.tolist(), strict=True):
            self.check(item, sample, which)
        try:
            return collate(items)
        except Exception as error:
            lengths = [None if (tokens := ids_of(item, self.key)) is None else len(tokens) for item in items]
            summary = ", ".join(f"{i}: {'?' if n is None else n}" for i, n in zip(ids.tolist(), lengths, strict=True))
            raise DataError(
                f"the job's collate_fn cannot join {which} samples (sample: tokens) {summary} ({type(error).__name__}: {error}); "
                "give them one length, or pass a collate_fn that pads"
            ) from error


def embedding_rows(module: nn.Module) -> int | None:
    """Return the number of rows of the token embedding; None if the model has none.

    A transformers model names its token embedding.  Of several embeddings in another model the largest counts: an id beyond it
    fits none.

    A transformers model names the table.  Of several others the largest counts: an id beyond it fits none.
    """
    named = getattr(module, "get_input_embeddings", None)
    table = None
    if callable(named):
        try:
            table = named()
        except NotImplementedError:
            table = None
    tables = [table] if isinstance(table, nn.Embedding) else [m for m in module.modules() if isinstance(m, nn.Embedding)]
    return max((m.num_embeddings for m in tables), default=None)


def ids_of(item: Any, key: str) -> IntArray | None:
    """Return all token ids of an item, (T,) int64; None if it has none."""
    try:
        return np.asarray(tokens_of(item, key, masked=True))
    except DataError:
        return None
