"""Trusted files become items like the job's own."""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import default_collate

from grace_ds.data.trusted import load_trusted, refuse_overlap, split_trusted
from grace_ds.errors import DataError

ROWS = [[5, 6, 7], [8, 9, 1]]


@pytest.fixture
def jsonl(tmp_path):
    def write(*lines):
        file = tmp_path / "trusted.jsonl"
        file.write_text("\n".join(x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in lines))
        return file

    return write


@pytest.fixture
def npy(tmp_path):
    def write(array):
        file = tmp_path / "trusted.npy"
        np.save(file, np.asarray(array))
        return file

    return write


@pytest.mark.parametrize("like", [torch.tensor([1, 2]), torch.tensor([1], dtype=torch.int32)])
def test_tensor_items(jsonl, npy, like):
    for file in (jsonl(*({"input_ids": r, "source": "x"} for r in ROWS)), npy(np.array(ROWS, np.uint16))):
        data = load_trusted(file, like)
        assert len(data) == 2
        assert [row.tolist() for row in data] == ROWS
        assert data[0].dtype == like.dtype


def test_array_and_list_items(jsonl, npy):
    for file in (jsonl(*({"input_ids": r} for r in ROWS)), npy(ROWS)):
        assert load_trusted(file, [1, 2])[1] == ROWS[1]
        array = load_trusted(file, np.array([1], np.uint16))[1]
        assert array.dtype == np.uint16
        assert array.tolist() == ROWS[1]


def test_dict_items_have_the_jobs_keys_and_collate_with_them(jsonl):
    like = {"input_ids": torch.tensor([1, 2, 3]), "weight": torch.tensor(0.5), "source": "web", "n": 3}
    file = jsonl(*({"input_ids": r, "weight": 1, "source": "book", "n": 3, "extra": []} for r in ROWS))
    data = load_trusted(file, like)
    assert list(data[0]) == list(like)
    batch = default_collate([like, data[0], data[1]])
    assert batch["input_ids"].tolist() == [[1, 2, 3], *ROWS]
    assert batch["weight"].tolist() == [0.5, 1.0, 1.0]
    assert batch["source"] == ["web", "book", "book"]


IDS = torch.tensor([5, 0, 6, 7])
FULL = {
    "input_ids": IDS,
    "attention_mask": torch.tensor([1, 1, 1, 0]),
    "labels": torch.tensor([5, 0, 6, -100]),
    "loss_mask": torch.tensor([0.0, 1.0, 1.0, 0.0]),
    "position_ids": torch.arange(4),
}


def test_masks_labels_and_positions_are_made(jsonl, npy):
    for file in (jsonl(*({"input_ids": r} for r in ROWS)), npy(ROWS)):
        made = load_trusted(file, FULL)[1]
        assert list(made) == list(FULL)
        assert {key: value.tolist() for key, value in made.items()} == {
            "input_ids": ROWS[1],
            "attention_mask": [1, 1, 1],
            "labels": ROWS[1],
            "loss_mask": [1.0, 1.0, 1.0],
            "position_ids": [0, 1, 2],
        }
        assert all(made[key].dtype == FULL[key].dtype for key in FULL)


def test_labels_that_are_the_tokens_that_follow_are_made_so(jsonl):
    file = jsonl(*({"input_ids": r} for r in ROWS))
    like = {"tokens": IDS[:-1], "labels": IDS[1:], "attention_mask": torch.ones(3)}
    made = load_trusted(file, like, key="tokens")[0]
    assert {key: value.tolist() for key, value in made.items()} == {"tokens": [5, 6], "labels": [6, 7], "attention_mask": [1, 1]}


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("labels", torch.tensor([9, 9, 9, 9])),
        ("labels", torch.full((4,), -100)),
        ("attention_mask", torch.ones(4, 4)),
        ("loss_mask", torch.tensor([0.0, 0.5, 1.0, 1.0])),
        ("position_ids", torch.tensor([0, 1, 0, 1])),
        ("weight", torch.tensor(1.0)),
    ],
)
def test_what_cannot_be_made_is_named_and_left_out_where_only_the_text_is_read(jsonl, name, own):
    like, file = {"input_ids": IDS, name: own}, jsonl({"input_ids": [1, 2]})
    with pytest.raises(DataError, match=rf"trusted.jsonl:1: .*lacks \['{name}'\].*trusted_data.*recipe: content"):
        load_trusted(file, like)
    assert {key: value.tolist() for key, value in load_trusted(file, like, probed=False)[0].items()} == {"input_ids": [1, 2]}


def test_what_a_row_has_itself_is_not_made(jsonl):
    row = {"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, 1], "loss_mask": [0, 1], "position_ids": [3, 4]}
    made = load_trusted(jsonl(row), FULL)[0]
    assert {key: value.tolist() for key, value in made.items()} == row


def test_rows_of_several_lengths_are_filled_up_with_what_is_ignored(jsonl):
    file = jsonl({"input_ids": [1, 2, 3]}, {"input_ids": [4]})
    data = load_trusted(file, FULL)
    batch = default_collate([data[0], data[1]])
    assert {key: value[1].tolist() for key, value in batch.items()} == {
        "input_ids": [4, 7, 7],  # what the job's own item has where it is masked
        "attention_mask": [1, 0, 0],
        "labels": [4, -100, -100],
        "loss_mask": [1.0, 0.0, 0.0],
        "position_ids": [0, 1, 2],
    }
    assert batch["attention_mask"][0].tolist() == [1, 1, 1]
    assert [len(x["input_ids"]) for x in load_trusted(file, FULL, probed=False)] == [3, 1]
    plain = load_trusted(file, {"input_ids": IDS})
    assert [len(x["input_ids"]) for x in plain] == [3, 1]  # nothing would tell what was added


class Example(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


def test_tuples_whose_entries_are_clear(jsonl):
    file = jsonl(*({"input_ids": r} for r in ROWS))

    def made(like, **more):
        item = load_trusted(file, like, key=0, **more)[0]
        assert type(item) is type(like)
        return [x.tolist() for x in item]

    assert made((IDS,)) == [[5, 6, 7]]
    assert made((IDS, IDS)) == [[5, 6, 7]] * 2
    assert made(Example(IDS[:-1], IDS[1:])) == [[5, 6], [6, 7]]
    for unclear in ((IDS, torch.tensor(1)), (IDS, IDS.flip(0)), (torch.zeros(4).long(),) * 2, (IDS, IDS, IDS)):
        with pytest.raises(DataError, match=r"tuples of \d, .*trusted_data.*recipe: content"):
            load_trusted(file, unclear, key=0)
        assert load_trusted(file, unclear, key=0, probed=False)[0].tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ("{broken", "not JSON"),
        ("[1, 2]", "found list"),
        ({"text": "raw"}, r"found keys \['text'\]"),
        ({"input_ids": []}, "non-empty list"),
        ({"input_ids": [1, 2.5]}, "non-empty list of integers"),
        ({"input_ids": [True, False]}, "non-empty list of integers"),
        ({"input_ids": "1 2"}, "input_ids must be a list, found 1 2"),
    ],
)
def test_bad_lines_are_named(jsonl, second, says):
    with pytest.raises(DataError, match=rf"trusted\.jsonl:3: .*{says}"):
        load_trusted(jsonl({"input_ids": [1]}, "", second), torch.tensor([1]))


def test_values_that_do_not_fit(jsonl):
    like = {"input_ids": torch.tensor([1]), "mask": torch.tensor([1])}
    with pytest.raises(DataError, match=r"mask: 1-D numbers as in the job"):
        load_trusted(jsonl({"input_ids": [1], "mask": 3}), like)
    with pytest.raises(DataError, match=r"mask: not a regular array"):
        load_trusted(jsonl({"input_ids": [1], "mask": [[1], [1, 2]]}), like)
    with pytest.raises(DataError, match="a list like the job's"):
        load_trusted(jsonl({"input_ids": [1], "mask": 3}), {"input_ids": torch.tensor([1]), "mask": [1]})


def test_line_separators_inside_of_strings_do_not_split_a_row(jsonl):
    data = load_trusted(jsonl({"input_ids": [1], "text": "a\u2028b\x85c"}), {"input_ids": [1], "text": ""})
    assert data[0]["text"] == "a\u2028b\x85c"


def test_bad_files(tmp_path, jsonl, npy):
    like = torch.tensor([1])
    with pytest.raises(DataError, match="does not exist"):
        load_trusted(tmp_path / "none.jsonl", like)
    with pytest.raises(DataError, match="no samples"):
        load_trusted(jsonl("", ""), like)
    with pytest.raises(DataError, match="no samples"):
        load_trusted(npy(np.zeros((0, 4), np.int64)), like)
    for bad in (np.zeros((2, 2)), np.zeros(3, np.int64), np.zeros((2, 0), np.int64)):
        with pytest.raises(DataError, match=r"integers \(n, T\) are needed"):
            load_trusted(npy(bad), like)
    (tmp_path / "torn.npy").write_bytes(b"torn")
    with pytest.raises(DataError, match="cannot be read as"):
        load_trusted(tmp_path / "torn.npy", like)
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"'\.csv' is not known"):
        load_trusted(tmp_path / "x.csv", like)
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot be read as text"):
        load_trusted(tmp_path / "bytes.jsonl", like)


def words(text):
    """A tokeniser: the length of each word."""
    return [len(word) for word in text.split()]


def test_text_is_joined_and_cut_to_the_jobs_length(tmp_path, jsonl):
    txt = tmp_path / "trusted.txt"
    txt.write_text("a bb ccc\ndddd\n\n\n\neeeee ffffff\r\n\r\nggggggg\n\n")
    documents = jsonl({"text": "a bb ccc\ndddd", "url": 1}, "", {"text": "eeeee ffffff"}, {"text": "ggggggg"})
    for file in (txt, documents):
        data = load_trusted(file, torch.tensor([0, 0, 0]), tokenize=words)
        assert [row.tolist() for row in data] == [[1, 2, 3], [4, 5, 6]]  # the seventh token fills no sample
        assert load_trusted(file, {"input_ids": [0] * 7}, tokenize=words)[0] == {"input_ids": [1, 2, 3, 4, 5, 6, 7]}


def test_text_becomes_items_with_masks_and_labels(tmp_path):
    txt = tmp_path / "trusted.txt"
    txt.write_text("a bb ccc dddd eeeee ffffff")
    assert [x["labels"].tolist() for x in load_trusted(txt, {"input_ids": IDS, "labels": IDS}, words)] == [[1, 2, 3, 4]]
    (pair,) = load_trusted(txt, (IDS[:-1], IDS[1:]), words, key=0)
    assert [x.tolist() for x in pair] == [[1, 2, 3], [2, 3, 4]]


def test_text_that_cannot_become_samples_names_the_way_out(tmp_path, jsonl):
    file = jsonl({"text": "a bb"}, {"text": "ccc"})
    with pytest.raises(DataError, match=r"tokenize=lambda text"):
        load_trusted(file, torch.tensor([0, 0]))
    with pytest.raises(DataError, match=r"gives 3 tokens, the job's samples have 4"):
        load_trusted(file, torch.zeros(4, dtype=torch.int64), tokenize=words)
    with pytest.raises(DataError, match=r"none are known in the job's items; .*tokens_key"):
        load_trusted(file, {"x": [0]}, tokenize=words, key=None)
    with pytest.raises(DataError, match=r"trusted\.jsonl:2: text must be a str, found 3"):
        load_trusted(jsonl({"text": "a"}, {"text": 3}), [0], tokenize=words)
    with pytest.raises(DataError, match=r"trusted\.jsonl:2: an object with text is needed, found keys \['input_ids'\]"):
        load_trusted(jsonl({"text": "a"}, {"input_ids": [1]}), [0], tokenize=words)
    (tmp_path / "blank.txt").write_text("\n\n  \n\n")
    with pytest.raises(DataError, match=r"blank\.txt holds no samples"):
        load_trusted(tmp_path / "blank.txt", [0], tokenize=words)
    (tmp_path / "blank.jsonl").write_text('{"text": ""}')
    with pytest.raises(DataError, match=r"gives 0 tokens"):
        load_trusted(tmp_path / "blank.jsonl", [0], tokenize=words)


def test_token_ids_beside_their_text_need_no_tokeniser(jsonl):
    assert load_trusted(jsonl({"text": "raw", "input_ids": [4, 5]}), [0])[0] == [4, 5]


def test_a_trusted_sample_in_the_validation_set_is_refused():
    def tokens(item):
        return np.asarray(item["ids"], np.int64)

    validation = [{"ids": [1, 2, 3]}, {"ids": np.array([4, 5], np.int32)}, {"ids": []}]
    with pytest.raises(DataError, match="trusted sample 1 is validation sample 1"):
        refuse_overlap([{"ids": [1, 2]}, {"ids": [4, 5]}], validation, tokens)
    with pytest.raises(DataError, match="trusted sample 0 is validation sample 0"):
        refuse_overlap([{"ids": [1, 2, 3]}], validation, tokens)
    refuse_overlap([{"ids": [5, 4]}, {"ids": [1, 2]}, {"ids": [4, 5, 0]}], validation, tokens)
    refuse_overlap([], validation, tokens)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 300), st.integers(0, 2**40))
def test_halves_are_disjoint_and_complete(n, seed):
    fit, calibrate = split_trusted(n, seed)
    assert len(fit) - len(calibrate) in (0, 1)
    assert np.array_equal(np.sort(np.concatenate([fit, calibrate])), np.arange(n))
    assert np.array_equal(fit, split_trusted(n, seed)[0])


def test_halves_depend_on_the_seed_and_need_two():
    assert not np.array_equal(split_trusted(100, 0)[0], split_trusted(100, 1)[0])
    with pytest.raises(DataError, match=r"1 trusted sample\(s\)"):
        split_trusted(1, 0)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            {"input_ids": [1, 2], "attention_mask": [1, 1, 1]},
            "attention_mask must be a list of 2 numbers",
        ),  # would unmask padding
        ({"input_ids": [1, 2], "labels": 3}, "labels must be a list of 2 numbers"),
        ({"input_ids": [1, 2], "loss_mask": [[1], [1]]}, "loss_mask must be a list of 2 numbers"),
        ('{"input_ids": [1], "input_ids": [2]}', "a key is given twice"),
        ('{"input_ids": [' + "9" * 5000 + "]}", "not JSON"),
        ('{"input_ids": [1], "extra": ' + "[" * 100_000, "nested too deeply"),
        ({"input_ids": [2**63]}, "non-empty list of integers"),
        ({"input_ids": [1, 2], "position_ids": [0.5, 1]}, "numbers that torch.int64 cannot hold"),
    ],
)
def test_a_line_that_would_be_taken_for_something_else_is_refused(jsonl, line, says):
    with pytest.raises(DataError, match=rf"trusted.jsonl:2: .*{says}"):
        load_trusted(jsonl({"input_ids": [3, 4, 5]}, line), FULL)


def test_numbers_that_do_not_fit_the_jobs_own_type_are_refused(jsonl, npy):
    for like in (torch.arange(2, dtype=torch.int32), np.arange(2, dtype=np.int32)):
        assert list(load_trusted(jsonl({"input_ids": [1, 2**31 - 1]}), like)[0]) == [1, 2**31 - 1]
        for file in (jsonl({"input_ids": [1, 2**32 + 1]}), npy(np.array([[1, 2**32 + 1]]))):
            with pytest.raises(DataError, match="int32 cannot hold"):
                load_trusted(file, like)


def test_a_tokeniser_that_fails_or_panics_is_told_and_an_interrupt_is_not_held_up(tmp_path):
    class PanicException(BaseException):
        pass

    (tmp_path / "a.txt").write_text("some text")
    for error in (ValueError("half a character"), PanicException("range end index 8")):

        def tokenize(text, error=error):
            raise error

        with pytest.raises(DataError, match="cannot be tokenised"):
            load_trusted(tmp_path / "a.txt", [1, 2], tokenize)

    def interrupted(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_trusted(tmp_path / "a.txt", [1, 2], interrupted)


def test_positions_that_a_row_gives_itself_are_kept_where_it_is_filled_up(jsonl):
    file = jsonl({"input_ids": [1, 2, 3, 4]}, {"input_ids": [1, 2], "position_ids": [7, 8]})
    assert load_trusted(file, FULL)[1]["position_ids"].tolist() == [7, 8, 9, 10]
    assert load_trusted(file, FULL)[0]["position_ids"].tolist() == [0, 1, 2, 3]
