"""A slice of ``python -m benchmarks fuzz``, and that the fuzzer sees what it is to see."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from benchmarks.fuzz import all_targets, claimed, files, over
from benchmarks.fuzz import target as target_module
from benchmarks.fuzz.mutate import mutated
from benchmarks.fuzz.target import FOREIGN, HANG, REFUSED, SAME, SILENT, Target, fuzz
from grace_ds.data import schedule as schedule_module
from grace_ds.errors import DataError

CASES = 600


@pytest.mark.timeout(240)
def test_nothing_that_is_read_is_changed_without_a_word_or_hangs_or_raises_what_is_not_ours(tmp_path: Path) -> None:
    quick = [target for target in all_targets(tmp_path) if target.name != "run_dir, report"]  # whose figures take a second
    tallies = over(quick, CASES, 3, lambda name, tally: None)
    assert [found for tally in tallies.values() for found in tally.found] == []
    assert len(tallies) == 12 and sum(tally.cases for tally in tallies.values()) >= CASES
    for tally in tallies.values():
        assert tally.kinds[REFUSED] and tally.cases == tally.kinds.total()


def test_a_header_that_claims_a_billion_billions_is_refused_before_it_is_believed(tmp_path: Path) -> None:
    found = claimed.allocated(tmp_path)
    assert len(found) == 12 and max(found.values()) < 1, found  # MiB; the claims are of terabytes


def of(judge: Any, built: Any = None) -> Target:
    return Target("a target", 1.0, lambda rng: rng.random(), judge, built, 0.5)


def test_the_fuzzer_tells_what_a_reader_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(value: Any) -> str:
        raise DataError(f"{value} is not what it should be; give another")

    def short(value: Any) -> str:
        raise DataError("wrong")

    def breaks(value: Any) -> str:
        return [SAME][int(value * 0) + 1]

    def panics(value: Any) -> str:
        raise BaseException("thread panicked")

    def swallows(value: Any) -> str:
        for _ in range(4):
            try:
                time.sleep(0.3)
            except BaseException:
                continue
        return SAME

    monkeypatch.setattr(target_module, "HANG_SECONDS", 0.05)
    for judge, kind in ((lambda v: SAME, SAME), (refuses, REFUSED), (short, FOREIGN), (breaks, FOREIGN), (panics, FOREIGN)):
        tally = fuzz(of(judge, st.floats(0, 1)), 10, 0)
        assert tally.kinds == {kind: tally.cases} and tally.cases > 4
        assert bool(tally.found) == (kind is FOREIGN)
    assert fuzz(of(lambda v: time.sleep(9)), 1, 0).kinds == {HANG: 1}  # type: ignore[func-returns-value]
    assert fuzz(of(swallows), 1, 0).kinds == {HANG: 1}
    assert "test_fuzz.py" in fuzz(of(breaks), 1, 0).found[0]


def test_a_reader_that_skips_its_digest_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule_module.Schedule, "digest", lambda self: "equal")
    target = replace(files.schedules(tmp_path), built=None)  # these write files
    assert fuzz(target, 1500, 0).kinds[SILENT] > 5


def test_the_mutator_makes_the_same_cases_of_a_seed_and_mostly_others_than_the_file() -> None:
    data = bytes(range(200)) * 3
    made = [mutated(data, random.Random(i)) for i in range(500)]
    assert made == [mutated(data, random.Random(i)) for i in range(500)]
    assert sum(m == data for m in made) < 75 and len(set(made)) > 400
    assert {len(m) < len(data) for m in made} == {len(m) > len(data) for m in made} == {True, False}
    assert mutated(b"", random.Random(0)) is not None
