"""Bring trusted samples into the form of the job's own items, which a probe hands to the job's forward step."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

from grace_ds.data.tokens import tokens_of
from grace_ds.errors import DataError

_NEEDED = ("tokens", "labels", "loss_mask")


class JobItems(Dataset[Any]):
    """Trusted samples as items of Megatron's GPT datasets, all of one length.

    A sample's tokens are cut to the job's length, or padded at the end with targets that do not count.  An item that has all
    entries of the job's own is passed on as it is.

    Args:
        trusted: map-style; items with token ids.
        like: an item of the job's own dataset.
        key: of the token ids in a trusted item, as in ``features.tokens_key``.

    Raises:
        DataError: the job's items are not those of a GPT dataset, and the trusted ones are not like them.
    """

    def __init__(self, trusted: Any, like: Any, key: str) -> None:
        self.trusted, self.like, self.key = trusted, like, key
        known = isinstance(like, dict) and all(name in like for name in _NEEDED)
        if not known and not self._alike(trusted[0]):
            found = sorted(like) if isinstance(like, dict) else type(like).__name__
            raise DataError(
                f"a trusted sample must look like the training dataset's items ({found}) for a probe, and only those with "
                f"{', '.join(_NEEDED)} can be made from token ids: pass a dataset of such items as trusted_data to "
                "grace_ds.megatron.wrap, or set recipe: content"
            )

    def __len__(self) -> int:
        return len(self.trusted)

    def __getitem__(self, index: int) -> Any:
        item = self.trusted[index]
        if self._alike(item):
            return {name: item[name] for name in self.like} if isinstance(self.like, dict) else item
        length = len(self.like["tokens"])
        tokens = torch.zeros(length + 1, dtype=self.like["tokens"].dtype)
        found = torch.as_tensor(tokens_of(item, self.key))[: length + 1]
        tokens[: len(found)] = found
        counts = torch.zeros(length, dtype=self.like["loss_mask"].dtype)
        counts[: max(len(found) - 1, 0)] = 1
        made = {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": counts}
        if "position_ids" in self.like:
            made["position_ids"] = torch.arange(length, dtype=self.like["position_ids"].dtype)
        return {name: made.get(name, value) for name, value in self.like.items()}  # the attention mask is causal for all

    def _alike(self, item: Any) -> bool:
        if isinstance(self.like, dict):
            return isinstance(item, dict) and set(self.like) <= set(item)
        return type(item) is type(self.like)
