"""GSM8K as samples of token ids: the pool, the trusted problems and the test slice, disjoint and fixed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grace_ds.errors import DataError
from grace_ds.records import Array

IGNORED = -100
SPLIT_SEED = 20  # of the split, and of the pollution: the same for every run
COPIED, JUNK, SOURCES = 0.3, 0.2, 24  # of a polluted pool: near-duplicates of SOURCES problems, and shuffled words

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Problem:
    """A question, the worked answer, and its final number as written."""

    question: str
    answer: str
    number: str

    @property
    def prompt(self) -> str:
        """What the model is given."""
        return f"Question: {self.question}\nAnswer:"


@dataclass(frozen=True)
class Problems:
    """All that a run reads.

    Attributes:
        pool, trusted: of the training file.
        kinds: of the pool's rows: unique, copy or junk.
        test: of the test file.
    """

    pool: list[Problem]
    kinds: list[str]
    trusted: list[Problem]
    test: list[Problem]


def read(path: Path) -> list[Problem]:
    """The problems of a GSM8K file, without its calculator marks.

    Raises:
        DataError: it cannot be read, with file:line.
    """
    out = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give GSM8K's train.jsonl with --data") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            question, answer = str(row["question"]).strip(), str(row["answer"]).strip()
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f'{path}:{number}: an object with "question" and "answer" is needed ({error})') from None
        answer = re.sub(r"<<[^<>]*>>", "", answer)
        out.append(Problem(question, answer, number_in(answer) or ""))
    return out


def number_in(text: str) -> str | None:
    """The number after the first ``####``, without commas and a trailing point; None where there is none."""
    found = re.search(r"####\s*\$?(-?[\d,]*\.?\d+)", text)
    return None if found is None else found.group(1).replace(",", "").removesuffix(".0")


def sample(problem: Problem, tokenize: Tokenize, eos: int) -> dict[str, list[int]]:
    """Token ids with the labels of the answer alone."""
    prompt, answer = tokenize(problem.prompt), [*tokenize(f" {problem.answer}"), eos]
    return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}


def split(
    train: Sequence[Problem],
    test: Sequence[Problem],
    fits: Callable[[Problem], bool],
    sizes: tuple[int, int, int],
    polluted: bool,
) -> Problems:
    """The first problems that fit of each file, the training file's in a seeded order.

    Args:
        sizes: of the pool, the trusted set and the test slice.
        polluted: half of the pool's rows are near-duplicates or junk, made of its other half.

    Raises:
        DataError: there are too few.
    """
    pool_size, trusted_size, test_size = sizes
    rng = np.random.default_rng(SPLIT_SEED)
    usable = [train[i] for i in rng.permutation(len(train)) if fits(train[i])]
    kept = [problem for problem in test if fits(problem)]
    if len(usable) < pool_size + trusted_size or len(kept) < test_size:
        raise DataError(
            f"{len(usable)} training and {len(kept)} test problems are short enough, {pool_size + trusted_size} and {test_size} "
            "are needed: raise --max-tokens, or lower --pool-size, --trusted or --test-size"
        )
    trusted, pool = usable[:trusted_size], usable[trusted_size : trusted_size + pool_size]
    kinds = ["unique"] * pool_size
    if polluted:
        pool, kinds = _polluted(pool, rng)
    return Problems(pool, kinds, trusted, kept[:test_size])


def _polluted(clean: list[Problem], rng: Any) -> tuple[list[Problem], list[str]]:
    copies, junk = round(COPIED * len(clean)), round(JUNK * len(clean))
    unique = clean[: len(clean) - copies - junk]
    rows = [(problem, "unique") for problem in unique]
    rows += [(_near(unique[int(rng.integers(SOURCES))], rng), "copy") for _ in range(copies)]
    rows += [(_shuffled(unique[int(rng.integers(len(unique)))], rng), "junk") for _ in range(junk)]
    order: Array = rng.permutation(len(rows))
    return [rows[i][0] for i in order], [rows[i][1] for i in order]


def _near(problem: Problem, rng: Any) -> Problem:
    """A copy with two neighbouring words of the question in the other order."""
    words = problem.question.split()
    at = int(rng.integers(len(words) - 1))
    words[at], words[at + 1] = words[at + 1], words[at]
    return Problem(" ".join(words), problem.answer, problem.number)


def _shuffled(problem: Problem, rng: Any) -> Problem:
    """The problem's own words in a random order, question and answer each."""
    question, answer = (" ".join(rng.permutation(text.split())) for text in (problem.question, problem.answer))
    return Problem(question, answer, problem.number)
