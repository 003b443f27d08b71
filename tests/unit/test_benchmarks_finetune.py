"""The fine-tuning benchmark's own arithmetic: problems, splits, differences."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.finetune.matrix import add_arguments, record_of
from benchmarks.finetune.problems import IGNORED, Problem, number_in, read, sample, split
from grace_ds.errors import DataError


def problem(i: int) -> Problem:
    return Problem(f"What is {i} and one more here today", f"It is {i} plus 1.\n#### {i + 1}", str(i + 1))


def test_a_file_is_read_without_calculator_marks_and_errors_name_the_line(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    rows = [{"question": "2+3?", "answer": "2+3=<<2+3=5>>5\n#### 5"}, {"question": "big?", "answer": "#### 1,234"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    first, second = read(file)
    assert (first.answer, first.number, second.number) == ("2+3=5\n#### 5", "5", "1234")
    file.write_text(json.dumps(rows[0]) + "\n" + json.dumps({"question": "?"}))
    with pytest.raises(DataError, match=r"train\.jsonl:2: an object"):
        read(file)


@pytest.mark.parametrize(("text", "number"), [("#### 7.0", "7"), ("so\n#### $-12", "-12"), ("#### 2.5 x", "2.5"), ("7", None)])
def test_the_final_number_is_read_as_it_is_meant(text: str, number: str | None) -> None:
    assert number_in(text) == number


def test_labels_are_the_answers_alone() -> None:
    made = sample(Problem("ab", "c", "1"), lambda text: [ord(c) for c in text], 0)
    answer = [ord(" "), ord("c"), 0]
    assert made["labels"][-3:] == made["input_ids"][-3:] == answer
    assert set(made["labels"][:-3]) == {IGNORED}
    assert len(made["labels"]) == len(made["input_ids"])


def test_pool_trusted_and_test_are_disjoint_fixed_and_of_problems_that_fit() -> None:
    train, test = [problem(i) for i in range(100)], [problem(i) for i in range(200, 240)]

    def fits(p: Problem) -> bool:
        return int(p.number) % 2 == 0

    one, two = (split(train, test, fits, (30, 15, 10), False) for _ in range(2))
    assert one == two
    assert not set(one.pool) & set(one.trusted)
    assert all(fits(p) for p in [*one.pool, *one.trusted, *one.test])
    assert one.test == [p for p in test if fits(p)][:10]  # the first that fit, whatever the training file holds
    with pytest.raises(DataError, match="51 are needed|raise --max-tokens"):
        split(train, test, fits, (40, 15, 10), False)


def test_half_of_a_polluted_pool_is_copies_or_junk_and_the_rest_is_as_it_was() -> None:
    train = [problem(i) for i in range(400)]
    found = split(train, train, lambda _: True, (200, 50, 10), True)
    kinds = {kind: [p for p, k in zip(found.pool, found.kinds, strict=True) if k == kind] for kind in ("unique", "copy", "junk")}
    assert {kind: len(rows) for kind, rows in kinds.items()} == {"unique": 100, "copy": 60, "junk": 40}
    assert set(kinds["unique"]) <= set(train)
    assert len({p.answer for p in kinds["copy"]}) <= 24
    assert all(p not in train for p in kinds["copy"] + kinds["junk"])


def result(arm: str, seed: int, nll: float, **more: Any) -> dict[str, Any]:
    return {"settings": {"arm": arm, "seed": seed}, "nll": nll, "right": 1, "asked": 20, **more}


def test_differences_are_taken_seed_by_seed() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["--data", "x", "--arms", "uniform", "content"])
    runs = [result("uniform", 0, 1.0), result("uniform", 1, 2.0), result("content", 0, 0.9), result("content", 1, 2.1)]
    record = record_of(args, runs)
    (claim,) = record.claims
    assert (claim.name, claim.value) == ("natural_content_minus_uniform", pytest.approx(0.0))
    assert "2 seeds, standard error 0.100" in claim.unit
    assert claim.met is None
    assert record.rows["arms"][0]["right"] == "2 of 40"
