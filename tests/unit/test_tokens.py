"""Finding the token ids in items of every usual form, and streaming them."""

from __future__ import annotations

import random
from collections import UserDict

import numpy as np
import pytest
import torch

from grace_ds.data.tokens import TokenReader, fingerprint, tokens_of
from grace_ds.errors import DataError

ROW = [5, 9, 2, 7]


@pytest.mark.parametrize(
    "item",
    [
        torch.tensor(ROW),
        torch.tensor([ROW], dtype=torch.int32),
        np.array(ROW, np.uint16),
        ROW,
        tuple(ROW),
        {"input_ids": torch.tensor(ROW), "labels": torch.tensor([1, 1, 1, 1])},
        UserDict({"input_ids": ROW}),
        {"tokens": ROW},
        {"ids": np.array(ROW)},
        {"text_ids": ROW},
        (torch.tensor(ROW), torch.tensor([0, 0, 0, 0])),
        [torch.tensor([0.5, 0.5]), torch.tensor(ROW)],
        {"input_ids": torch.tensor([*ROW, 0, 0]), "attention_mask": torch.tensor([1, 1, 1, 1, 0, 0])},
        {"input_ids": [0, *ROW], "attention_mask": [0, 1, 1, 1, 1]},
    ],
)
def test_finds_tokens(item):
    found = tokens_of(item)
    assert found.dtype == np.int64
    assert found.tolist() == ROW


@pytest.mark.parametrize("item", [[], {"input_ids": []}, torch.zeros(0, dtype=torch.long)])
def test_a_sample_without_tokens_is_empty(item):
    assert tokens_of(item).shape == (0,)


def test_key_overrides_the_guess():
    assert tokens_of({"input_ids": [1], "mine": ROW}, "mine").tolist() == ROW
    assert tokens_of((torch.tensor([1]), torch.tensor(ROW)), "1").tolist() == ROW


@pytest.mark.parametrize(
    ("item", "key", "says"),
    [
        ({"pixels": ROW, "label": 1}, "auto", "'label', 'pixels'"),
        ({"input_ids": ROW}, "mine", "mine"),
        ({"input_ids": torch.tensor([0.5])}, "auto", "input_ids"),
        (torch.rand(4), "auto", "float32"),
        (torch.zeros(3, 3, dtype=torch.long), "auto", r"\(3, 3\)"),
        ("some text", "auto", "str"),
        ((), "auto", "tuple of 0"),
        ((torch.rand(2), "x"), "auto", "Tensor"),
        ((torch.tensor(ROW),), "3", "'3'"),
        (["some", "text"], "auto", "list of 2"),
    ],
)
def test_not_found_names_the_cure(item, key, says):
    with pytest.raises(DataError, match=says) as caught:
        tokens_of(item, key)
    assert "features.tokens_key" in str(caught.value)
    assert "features.enabled: false" in str(caught.value)


def test_blocks_keep_order_and_lengths():
    rows = [list(range(length)) for length in (3, 0, 1, 9, 2)]
    reader = TokenReader([{"input_ids": np.array(r, np.int64)} for r in rows], max_tokens=4)
    ids = np.array([4, 0, 1, 3, 2])
    for size in (1, 2, 5, 100):
        seen, read = [], []
        for block in reader.blocks(ids, size):
            assert 1 <= len(block) <= size
            seen += block.ids.tolist()
            read += [block.flat[a:b].tolist() for a, b in zip(block.offsets[:-1], block.offsets[1:], strict=True)]
        assert seen == ids.tolist()
        assert read == [rows[i][:4] for i in ids]
    assert reader.all().offsets.tolist() == [0, 3, 3, 4, 8, 10]


def test_a_broken_item_is_named():
    class Broken:
        def __len__(self):
            return 9

        def __getitem__(self, index):
            if index == 7:
                raise OSError("disk gone")
            return ROW if index != 8 else "text"

    reader = TokenReader(Broken())
    with pytest.raises(DataError, match=r"dataset\[7\] raised OSError: disk gone"):
        list(reader.blocks(np.arange(9)))
    with pytest.raises(DataError, match="sample 8: no token ids"):
        list(reader.blocks(np.array([8])))


def test_iterable_dataset_is_refused():
    with pytest.raises(DataError, match="map-style"):
        TokenReader(iter([ROW]))


class Augmented:
    """Draws from every global generator whenever an item is read."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return [int(random.random() * 9), int(np.random.rand() * 9), int(torch.rand(()) * 9)]


def test_reading_leaves_the_random_state_alone():
    def draws():
        return random.random(), np.random.rand(), float(torch.rand(()))

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    undisturbed = draws()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    reader = TokenReader(Augmented())
    list(reader.blocks(np.arange(8), 3))
    reader.fingerprint()
    assert draws() == undisturbed


def test_fingerprint_tells_datasets_apart():
    rows = [[i, i + 1, 7] for i in range(300)]
    base = fingerprint(rows)
    assert base == fingerprint([list(r) for r in rows])
    assert base == fingerprint([torch.tensor(r) for r in rows][:0] + rows)
    changed = [list(r) for r in rows]
    changed[0][1] = 99
    moved = [list(r) for r in rows]
    moved[-1] = moved[-1][::-1]
    others = [changed, moved, rows[:-1], [torch.tensor(r) for r in rows]]
    digests = {base, *(fingerprint(o) for o in others), fingerprint(rows, "0"), fingerprint(rows, max_tokens=2)}
    assert len(digests) == 7
    assert fingerprint([]) == fingerprint([])
