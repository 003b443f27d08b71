"""What the greedy benchmark says of its figures is right."""

from __future__ import annotations

import argparse

import pytest
from rich.console import Console

from benchmarks.greedy import add_arguments, run, selection_claims
from grace_ds.errors import ConfigError


def row(n: int, turn: int, by: str, seconds: float, value: float = 1.0) -> dict[str, object]:
    return {"n": n, "turn": turn, "by": by, "seconds": seconds, "F": value}


def test_ratios_are_of_the_fastest_library_at_the_largest_size_that_was_run() -> None:
    rows = [row(10, 0, "ours", 1.0, 0.9), row(10, 0, "apricot", 3.0), row(10, 0, "submodlib", 2.0)]
    rows += [row(100, t, "ours", 2.0) for t in range(3)] + [row(100, t, "apricot", s) for t, s in enumerate((50.0, 80.0, 60.0))]
    found = {c.name: c for c in selection_claims(rows, ["apricot", "submodlib"])}
    assert found["greedy_speedup"].value == 30.0
    assert found["greedy_speedup_apricot"].value == 30.0
    assert found["greedy_speedup_submodlib"].value == 2.0
    assert found["greedy_speedup_submodlib"].unit.endswith("n = 10")
    assert found["greedy_objective_ratio"].value == pytest.approx(0.9)
    assert found["greedy_exponent_apricot"].value == pytest.approx(1.30103)
    assert "greedy_exponent_submodlib" not in found
    assert selection_claims(rows[:1], ["apricot"]) == []


def test_of_two_libraries_at_one_size_the_faster_one_counts() -> None:
    rows = [row(10, 0, "ours", 1.0), row(10, 0, "apricot", 3.0), row(10, 0, "submodlib", 2.0, 4.0)]
    found = {c.name: c.value for c in selection_claims(rows, ["apricot", "submodlib"])}
    assert found["greedy_speedup"] == 2.0
    assert found["greedy_objective_ratio"] == 0.25


def test_a_library_that_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(ConfigError, match=r"apricot is not installed.*benchmark"):
        run(parser.parse_args(["--libraries", "apricot"]), Console())
