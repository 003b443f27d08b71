"""The benchmarks run, and what they say of their figures is right."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import density
from benchmarks.quickstart import equal_loss_seconds, standard_error
from benchmarks.record import Claim, median_interval
from tests.multirank.harness import run_command


def test_a_claim_says_whether_it_is_met() -> None:
    assert Claim("a", 1.07, "", 1.08).met is True
    assert Claim("a", 1.09, "", 1.08).met is False
    assert Claim("a", 1.09, "", 1.08, higher_is_better=True).met is True
    assert Claim("a", 1.09, "", None).met is None


def test_the_interval_of_the_median_covers_it_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits, rounds, n = 0, 1000, 30
    for _ in range(rounds):
        median, low, high = median_interval(rng.exponential(size=n).tolist())
        assert low <= median <= high
        hits += low <= math.log(2) <= high
    assert 0.94 < hits / rounds < 0.985  # 95.7 % by the binomial distribution of n = 30
    assert median_interval([3.0]) == (3.0, 3.0, 3.0)


def test_time_to_equal_loss_lies_between_two_evaluations() -> None:
    curve = [{"val_loss": v, "seconds": s} for v, s in ((6.0, 10.0), (5.0, 20.0), (4.5, 40.0))]
    assert equal_loss_seconds(curve, 4.75) == pytest.approx(30.0)
    assert equal_loss_seconds(curve, 4.0) == math.inf
    assert standard_error([1.0, 3.0]) == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_plan_is_made_before_the_job_that_it_is_compared_with(tmp_path: Path) -> None:
    target, words = (
        tmp_path / "out.json",
        ["--jobs", "content", "--rows", "600", "--data", tmp_path / "data", "--out", tmp_path / "jobs"],
    )
    run_command([sys.executable, "-m", "benchmarks", "plan", *words, "--json", target], timeout=380)
    found = json.loads(target.read_text())
    assert [c["name"] for c in found["claims"]] == ["plan_memory_error", "plan_seconds_factor", "plan_cpu_factor"]
    row = found["rows"]["jobs"][0]
    assert row["ranks"] == 2 and row["rows"] == 600
    assert row["memory error"] == pytest.approx(row["memory planned"] / row["memory"] - 1)
    refreshes = [r for r in found["rows"]["refreshes"] if r["rank"] == 0]
    assert len(refreshes) == 4 and sum(r["seconds"] for r in refreshes) == pytest.approx(row["refreshes"])
    for r in refreshes:
        assert r["gather"] + r["content"] + r["select"] <= r["seconds"] and r["peak"] >= r["start"] > 0


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "options", "claims"),
    [
        ("collect", ["--pairs", "3", "--models", "small"], ["collect_ratio_small", "watch_share_small", "watch_ratio_small"]),
        ("refresh", ["--sizes", "400", "800", "--repeats", "1"], ["refresh_exponent", "repair_share", "refresh_to_faiss_ratio"]),
        (
            "scale",
            ["--sizes", "50000", "100000", "--large", "4000", "--seeds", "1", "--pool", "0"],
            ["root_memory_exponent", "threshold_exact", "refresh_minutes_without_graph", "refresh_gb_without_graph"],
        ),
    ],
)
def test_a_benchmark_writes_its_claims_and_rows(tmp_path: Path, name: str, options: list[str], claims: list[str]) -> None:
    more = ["--data", str(tmp_path / "data")] if name == "refresh" else []
    target = tmp_path / "out.json"
    said = run_command([sys.executable, "-m", "benchmarks", name, *options, *more, "--json", target], timeout=280)
    found = json.loads(target.read_text())
    assert [c["name"] for c in found["claims"]] == claims
    assert all(math.isfinite(c["value"]) for c in found["claims"])
    assert all(c["name"] in said for c in found["claims"])
    assert found["hardware"]["cores"] and found["versions"]["torch"]
    assert "out.json" in found["command"] and str(tmp_path) not in found["command"]
    assert all(rows for rows in found["rows"].values())
    if name == "collect":
        row = found["rows"]["by model"][0]
        assert row["layers"] == 8 and 0 < row["added_flops_share"] < 0.1 and row["hook_peak_bytes"] > 0
    elif name == "refresh":
        assert [r["n"] for r in found["rows"]["by size"]] == [400, 800]
        assert found["claims"][-1]["value"] > 1  # a refresh does all that bare faiss does, and more
        for r in found["rows"]["refreshes"]:
            assert sum(r[s] for s in ("gather", "content", "embed", "graph", "propagate", "select")) <= r["total"]
    else:
        assert [r["n"] for r in found["rows"]["root memory"]] == [50000, 100000]
        assert all(r["exact"] for r in found["rows"]["threshold"])


def test_text_that_fills_a_window_keeps_its_repetitions_and_has_6_grams_of_its_own() -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 50, (20, 64))
    rows[7] = rows[3]
    rows[9, 30:] = rows[5, 30:]
    alone = set(density.unlike_others(rows).tolist())
    assert alone == set(range(20)) - {3, 5, 7, 9}
    made = np.concatenate(list(density.background(rows, 700, rng)))
    assert made.shape == (700, 64) and {row.tobytes() for row in made[:20]} == {row.tobytes() for row in rows}
    assert made.min() >= 0 and made.max() < density.NAMES
    grams = {row[i : i + 6].tobytes() for row in made[20:] for i in range(59)}
    assert len(grams) == 680 * 59
    equal = {(row[:, None] == row).tobytes() for row in rows}
    assert all((row[:, None] == row).tobytes() in equal for row in made[20:])  # which tokens of a text are alike


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_density_benchmark_tells_full_tables_from_others(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    run_command([sys.executable, "-m", "benchmarks", "density", "--sizes", "1000", "6000", "--json", target], timeout=180)
    found = json.loads(target.read_text())
    claims = {c["name"]: c for c in found["claims"]}
    assert list(claims) == ["density_ratio_1e3", "density_table_1e3", "density_ratio_6e3", "density_table_6e3"]
    assert all(abs(c["value"] - 0.2) < 0.02 and c["met"] for name, c in claims.items() if "ratio" in name)
    assert [row["planted"] for row in found["rows"]["by size"]] == [83, 200]
