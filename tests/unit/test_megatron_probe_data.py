"""Trusted samples in the form of Megatron's items."""

from __future__ import annotations

import pytest
import torch

from grace_ds.errors import DataError
from grace_ds.integrations.megatron.probe_data import JobItems


def test_trusted_tokens_become_items_of_the_job():
    like = {
        "tokens": torch.zeros(4, dtype=torch.int64),
        "labels": torch.zeros(4, dtype=torch.int64),
        "loss_mask": torch.zeros(4),
        "position_ids": torch.zeros(4, dtype=torch.int64),
        "attention_mask": torch.tril(torch.ones(1, 4, 4)) < 0.5,
    }
    rows = [{"input_ids": torch.arange(5, 5 + n)} for n in (3, 5, 9)]
    short, whole_row, long = (JobItems(rows, like, "auto")[i] for i in range(3))
    assert short["tokens"].tolist() == [5, 6, 7, 0] and short["labels"].tolist()[:2] == [6, 7]
    assert short["loss_mask"].tolist() == [1, 1, 0, 0] and short["position_ids"].tolist() == [0, 1, 2, 3]
    for item in (whole_row, long):
        assert item["tokens"].tolist() == [5, 6, 7, 8] and item["labels"].tolist() == [6, 7, 8, 9]
        assert item["loss_mask"].tolist() == [1, 1, 1, 1] and torch.equal(item["attention_mask"], like["attention_mask"])
    assert set(short) == set(like) and all(short[key].dtype == like[key].dtype for key in like)
    own = {**like, "more": 1}
    assert JobItems([own], like, "auto")[0] == {key: own[key] for key in like}
    with pytest.raises(DataError, match="trusted_data"):
        JobItems(rows, {"text": torch.zeros(4)}, "auto")
