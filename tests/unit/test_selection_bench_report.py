"""From runs to figures: equal loss, shares, claims, and which runs are done again."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.interrupts import deferred_interrupts
from benchmarks.selection.claims import claims
from benchmarks.selection.equal_loss import EqualLoss, equal_loss_steps, joint_bound, ratios
from benchmarks.selection.matrix import add_arguments, chosen_arms, pool_names, read_tried, run_specs, seeds_of
from benchmarks.selection.report import PoolRuns, run_row, tables
from benchmarks.selection.runs import ROOT, RunSpec, _meaning, code_digest, finished, run_all, take_from
from benchmarks.selection.store import Stored
from grace_ds.cli.commandline import INTERRUPTED
from grace_ds.utils.processes import end_group
from tests.processes import living, wait_until
from tests.selection_pools import tiny_pool

SPEC = RunSpec(pool="crawl", pool_folder="/a", pool_digest="d", arm="uniform", seed=0, order_seed=0, steps=400)


def result(
    arm: str,
    seed: int,
    dev: float,
    *,
    steps: int = 400,
    order: int | None = None,
    pool: str = "crawl",
    cpu: float = 1.0,
    chosen: float = 0.0,
) -> dict[str, Any]:
    """What a job writes, with ``cpu`` CPU seconds a step and a share ``chosen`` of it for selection."""
    spec = replace(SPEC, pool=pool, arm=arm, seed=seed, order_seed=seed if order is None else order, steps=steps)
    total = cpu * steps
    costs = {"cpu_total": total, "cpu_selection": chosen * total, "cpu_train": (1 - chosen) * total}
    flops = {"flops_total": 2 * total, "flops_selection": 0.0, "flops_train": 2 * total}
    more = {"repeats": 1.0, "kinds": {"unique": 1.0}, "told": {"block": {}}, "curve": [{"step": steps, "dev": dev, "test": dev}]}
    return {"settings": asdict(spec), "dev": dev, "test": dev + 0.5, "parameters": 1, **costs, **flops, **more}


def log_law(steps: float, seed: int = 0) -> float:
    return 8.0 + 0.1 * seed - math.log(steps)


# -- equal loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [401.0, 500.0, 777.0, 1600.0])
def test_equal_loss_is_exact_where_loss_is_straight_in_the_log_of_the_steps(steps: float) -> None:
    points = [(n, log_law(n)) for n in (1600, 400, 800)]
    found = equal_loss_steps(points, log_law(steps))
    assert found.steps == pytest.approx(steps) and found.bound == ""


def test_equal_loss_is_never_extrapolated() -> None:
    points = [(n, log_law(n)) for n in (400, 800)]
    assert equal_loss_steps(points, log_law(900)) == EqualLoss(800, ">")
    assert equal_loss_steps(points, log_law(300)) == EqualLoss(400, "<")
    assert equal_loss_steps(points, log_law(400)) == EqualLoss(400, "")


def test_equal_loss_takes_the_first_crossing() -> None:
    assert equal_loss_steps([(100, 5.0), (200, 4.0), (400, 4.5), (800, 3.0)], 4.5).steps == pytest.approx(100 * 2**0.5)


def test_ratios_count_the_arms_whole_cost() -> None:
    uniform = [result("uniform", 0, log_law(n), steps=n, cpu=2.0) for n in (400, 800, 1600)]
    found = ratios(result("grace", 0, log_law(800), cpu=2.5), uniform, "dev")
    assert found.steps == pytest.approx(2.0) and found.bound == ""
    assert found.cpu == pytest.approx(800 * 2.0 / (400 * 2.5)) and found.flops == pytest.approx(found.cpu)


def test_bounds_of_a_mean() -> None:
    assert [joint_bound(b) for b in (["", ""], ["", ">"], ["<", "<"], [">", "<"])] == ["", ">", "<", "?"]


# -- tables and claims -------------------------------------------------------------------------------------------------


def crawl(gain: Sequence[float] = (0.5, 0.4), oracle: float = 0.6) -> PoolRuns:
    found = []
    for seed, won in enumerate(gain):
        found += [result("uniform", seed, log_law(n, seed), steps=n) for n in (400, 800, 1600)]
        found += [result("uniform", seed, log_law(400, seed) + 0.03, order=1000 + seed)]
        base = log_law(400, seed)
        found += [result("grace", seed, base - won), result("oracle", seed, base - oracle), result("content", seed, base - 0.1)]
    return PoolRuns("crawl", found, "dev", 400)


def test_deltas_are_against_the_same_seed_and_shares_against_the_oracle() -> None:
    runs = crawl()
    assert runs.deltas("grace") == pytest.approx([-0.5, -0.4])
    assert runs.share("grace") == pytest.approx(0.75) and runs.share("uniform") == 0.0
    assert runs.luck() == pytest.approx(0.03)
    assert crawl(oracle=-0.1).share("grace") is None  # an oracle that gains nothing is no yardstick


def test_claims_of_the_crawl_pool() -> None:
    found = {c.name: c for c in claims([crawl()], "grace")}
    names = {"steps_ratio_mean", "steps_ratio_min", "net_ratio", "oracle_share", "beyond_content_crawl", "choosing_share_small"}
    assert set(found) == names
    assert found["beyond_content_crawl"].value == pytest.approx(-0.35) and found["beyond_content_crawl"].met
    assert found["steps_ratio_mean"].value == pytest.approx((math.exp(0.5) + math.exp(0.4)) / 2)
    assert found["steps_ratio_min"].value == pytest.approx(math.exp(0.4))
    assert found["net_ratio"].value == pytest.approx(found["steps_ratio_mean"].value)
    assert found["oracle_share"].met is False and found["steps_ratio_mean"].met is False
    bound = {c.name: c for c in claims([crawl(gain=(9.0, 0.8), oracle=9.0)], "grace")}
    assert "lower bound" in bound["steps_ratio_mean"].unit and "bound" not in bound["steps_ratio_min"].unit
    assert bound["steps_ratio_mean"].value == pytest.approx((4 + math.exp(0.8)) / 2) and bound["steps_ratio_min"].met
    assert claims([crawl()], "pseudo") == []


def test_claims_of_the_held_out_pools_take_the_worst_share_and_the_least_gain_of_each_part() -> None:
    pools = []
    shares = {"unseen-junk": (0.9, 0.5, 0.8), "off-domain": (0.6, 0.65, 0.7), "generated-heldout-50": (0.95, 0.6, 0.9)}
    for pool, (grace, no_gradients, no_graph) in shares.items():
        gains = {"uniform": 0.0, "oracle": 1.0, "grace": grace, "no_gradients": no_gradients, "no_graph": no_graph}
        pools.append(PoolRuns(pool, [result(arm, 0, 5.0 - gain, pool=pool) for arm, gain in gains.items()], "dev", 400))
    found = {c.name: c for c in claims(pools, "grace")}
    assert found["oracle_share_heldout"].value == pytest.approx(0.6) and found["oracle_share_heldout"].met is False
    assert found["oracle_share_generated"].value == pytest.approx(0.95) and found["oracle_share_generated"].met is True
    assert found["gradient_gain_generated"].value == pytest.approx(0.35) and found["gradient_gain_generated"].met is True
    assert found["gradient_gain_elsewhere"].value == pytest.approx(-0.05)
    assert found["graph_gain_generated"].value == pytest.approx(0.05) and found["graph_gain_generated"].met is False
    assert found["graph_gain_elsewhere"].value == pytest.approx(-0.1) and found["graph_gain_elsewhere"].met is False
    assert "sketch_gain_generated" not in found  # that arm did not run


def test_claims_of_the_natural_pool() -> None:
    mine = [result("grace", s, 5.0 + d, pool="natural", chosen=0.03) for s, d in enumerate((0.02, -0.01, 0.005))]
    runs = PoolRuns("natural", [*mine, *(result("uniform", s, 5.0, pool="natural") for s in range(3))], "dev", 400)
    found = {c.name: c for c in claims([runs], "grace")}
    goal = found["natural_delta_mean"].goal  # the standard error, as it is above the least
    assert found["natural_delta_mean"].value == pytest.approx(0.005) and goal is not None and goal > 0.008
    assert found["choosing_share_small"].value == pytest.approx(0.03) and found["choosing_share_small"].met
    assert {c.name: c.met for c in claims([runs], "grace", "4m")}["choosing_share_4m"] is False


def test_test_losses_stay_hidden_until_the_final_tables_and_held_out_kinds_always() -> None:
    record = tables([crawl()], {"grace": 7}, final=False)
    assert all("test" not in row and "test" not in row["curve"][0] and "kinds" in row for row in record.rows["runs"])
    assert {row["arm"]: row["tried"] for row in record.rows["crawl, 400 steps"]}["grace"] == 7
    final = tables([replace_metric(crawl())], {}, final=True)
    assert all("test" in row for row in final.rows["runs"])
    assert final.rows["crawl, 400 steps"][0]["test"] == pytest.approx((log_law(400) + log_law(400, 1)) / 2 + 0.5)
    assert "kinds" not in run_row(result("content", 0, 5.0, pool="second"), final=True)
    assert "pool_folder" not in record.rows["runs"][0]


def replace_metric(runs: PoolRuns) -> PoolRuns:
    return PoolRuns(runs.pool, runs.runs, "test", runs.steps)


# -- what is run -------------------------------------------------------------------------------------------------------


def parsed(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(options)


def test_the_matrix_holds_every_arm_the_orders_and_the_lengths_once() -> None:
    args = parsed("--pool", "crawl", "--arms", "oracle", "--seeds", "2", "--uniform-steps", "400,800")
    pool = Stored(Path("/p"), {"digest": "d", "rows": {"train": 20_000}}, reused=True)
    specs = run_specs(args, "crawl", pool, seeds_of(args, 0))
    told = sorted((s.arm, s.seed, s.order_seed, s.steps) for s in specs)
    assert told == sorted(
        (arm, seed, order, steps)
        for seed in (0, 1)
        for arm, order, steps in (
            ("uniform", seed, 400),
            ("oracle", seed, 400),
            ("uniform", seed + 1000, 400),
            ("uniform", seed, 800),
        )
    )
    assert all(s.code and s.versions for s in specs)
    assert {s.lr for s in specs} == {5e-3}
    for given, rate in (([], 2e-3), (["--lr", "1e-3"], 1e-3)):
        large = parsed("--pool", "crawl", "--model", "4m", "--seeds", "1", *given)
        assert {s.lr for s in run_specs(large, "crawl", pool, (0,))} == {rate}
    assert chosen_arms(parsed("--pool", "dose"))[0] == "uniform"


def test_of_several_divisions_each_is_a_seed_and_one_alone_has_all_of_them() -> None:
    several = parsed("--pool", "crawl", "--division", "7", "9", "--seeds", "3")
    assert [list(seeds_of(several, division)) for division in several.division] == [[7], [9]]
    for given, division in (([], 0), (["--division", "4"], 4)):
        one = parsed("--pool", "crawl", "--seeds", "3", *given)
        assert one.division == [division] and list(seeds_of(one, division)) == [0, 1, 2]


def test_the_command_line_says_what_is_wrong() -> None:
    with pytest.raises(SystemExit, match=r"--corpus DIR.*--only unseen-junk off-domain"):
        pool_names(parsed("--pool", "heldout"))
    assert pool_names(parsed("--pool", "heldout", "--only", "off-domain")) == ["off-domain"]
    with pytest.raises(SystemExit, match=r"pool answers needs --corpus DIR$"):
        pool_names(parsed("--pool", "answers"))
    assert pool_names(parsed("--pool", "answers", "--corpus", "somewhere")) == ["answers"]
    with pytest.raises(SystemExit, match="none of them is in natural"):
        pool_names(parsed("--pool", "natural", "--only", "crawl"))
    with pytest.raises(SystemExit, match="--tried grrace=3"):
        read_tried(["grrace=3"])
    tried = read_tried(["rho=5", "2"])
    assert tried["rho"] == 5 and tried["uniform"] == 2
    with pytest.raises(SystemExit):
        parsed("--pool", "crawl", "--uniform-steps", "4,x")


def test_the_budget_is_raised_where_samples_would_repeat_too_often() -> None:
    assert SPEC.budget_of(20_000) == 0.2 and SPEC.budget_of(6_400) == pytest.approx(0.5) and SPEC.budget_of(100) == 1.0
    assert SPEC.interval == 80


# -- resuming ----------------------------------------------------------------------------------------------------------


def fake_jobs(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Jobs that count their starts beside the result, in the place of training."""
    program = (
        "import json, pathlib, sys, time\n"
        "spec, out = json.loads(pathlib.Path(sys.argv[1]).read_text()), pathlib.Path(sys.argv[2])\n"
        "with out.with_suffix('.starts').open('a') as f: f.write('x')\n" + body
    )

    class Popen(subprocess.Popen[bytes]):
        def __init__(self, command: list[str], **options: Any) -> None:
            super().__init__([sys.executable, "-c", program, *command[3:]], **options)

    monkeypatch.setattr(subprocess, "Popen", Popen)


DONE = "out.write_text(json.dumps({'settings': spec, 'dev': 1.0, 'cpu_total': 1.0, 'cpu_selection': 0.0}))\n"


def starts(folder: Path, spec: RunSpec) -> int:
    return len((folder / f"{spec.name}.starts").read_text())


def test_a_finished_run_is_taken_and_a_changed_stamp_is_run_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_jobs(monkeypatch, DONE)
    specs = [replace(SPEC, seed=s, order_seed=s) for s in range(3)]
    found = run_all(specs, tmp_path, jobs=2, limit_seconds=30, say=lambda line: None)
    assert [r["settings"]["seed"] for r in found] == [0, 1, 2]
    run_all(specs, tmp_path, jobs=2, limit_seconds=30, say=lambda line: None)
    assert [starts(tmp_path, s) for s in specs] == [1, 1, 1]
    moved = replace(specs[0], pool_folder="/elsewhere")  # where the pool lies changes nothing
    assert finished(moved, tmp_path) is not None
    for change in ({"lr": 1e-3}, {"code": "other"}, {"pool_digest": "e"}, {"versions": "torch 9"}):
        changed = replace(specs[0], **change)
        assert finished(changed, tmp_path) is None
    run_all([replace(specs[0], code="other"), *specs[1:]], tmp_path, jobs=2, limit_seconds=30, say=lambda line: None)
    assert [starts(tmp_path, s) for s in specs] == [2, 1, 1]


def test_runs_of_an_earlier_record_are_taken_again_where_nothing_that_they_depend_on_differs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_jobs(monkeypatch, DONE)
    specs = [replace(SPEC, seed=s, order_seed=s) for s in range(3)]
    rows = [{**spec.stamp(), "dev": 2.0, "test": 3.0, "cpu_total": 1.0, "cpu_selection": 0.0} for spec in specs]
    rows[1]["code"] = "other"
    record = tmp_path / "record.json"
    record.write_text(json.dumps({"rows": {"runs": rows}}))
    assert take_from([record], specs, tmp_path) == 2
    found = run_all(specs, tmp_path, jobs=2, limit_seconds=30, say=lambda line: None)
    assert [r["dev"] for r in found] == [2.0, 1.0, 2.0]
    assert found[0]["settings"] == asdict(specs[0])
    assert take_from([record], specs, tmp_path) == 0  # they are there
    with pytest.raises(SystemExit, match="no record of runs"):
        take_from([tmp_path / "nothing.json"], specs, tmp_path)


def test_a_failed_run_shows_its_last_lines_and_the_others_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_jobs(monkeypatch, "if spec['seed'] == 0: print('the reason', flush=True); sys.exit(3)\n" + DONE)
    specs = [replace(SPEC, seed=s, order_seed=s) for s in range(2)]
    with pytest.raises(SystemExit, match=r"(?s)1 run\(s\) failed.*exit status 3.*the reason"):
        run_all(specs, tmp_path, jobs=1, limit_seconds=30, say=lambda line: None)
    assert finished(specs[0], tmp_path) is None and finished(specs[1], tmp_path) is not None


def test_a_run_beyond_its_limit_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_jobs(monkeypatch, "print('still at it', flush=True); time.sleep(60)\n")
    with pytest.raises(SystemExit, match=r"(?s)not done after 2 s \(--limit\), stopped.*still at it"):
        run_all([SPEC], tmp_path, jobs=1, limit_seconds=2, say=lambda line: None)


def test_the_code_digest_ignores_comments_and_docstrings_but_not_code() -> None:
    a = 'def f(x: int) -> int:\n    """One."""\n    return x + 1  # why\n'
    b = 'def f(x: int) -> int:\n    """Another."""\n\n    return x + 1\n'
    assert _meaning(a) == _meaning(b) != _meaning(b.replace("+ 1", "+ 2"))
    assert len({code_digest(arm) for arm in ("uniform", "rho", "d2", "content", "content_unique")}) == 5


# -- for real ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[RunSpec], list[dict[str, Any]], Path]:
    """Two arms on a tiny pool, each in a process of its own."""
    folder = tmp_path_factory.mktemp("trained")
    pool = tiny_pool(folder)
    common = replace(SPEC, pool_folder=str(pool.folder), pool_digest=pool.manifest["digest"], steps=6, batch=8, eval_every=3)
    specs = [replace(common, arm=arm).stamped() for arm in ("uniform", "d2")]
    return specs, run_all(specs, folder / "runs", jobs=2, limit_seconds=100, say=lambda line: None), folder / "runs"


@pytest.mark.slow
def test_two_arms_run_end_to_end(trained: tuple[list[RunSpec], list[dict[str, Any]], Path]) -> None:
    specs, results, folder = trained
    for spec, found in zip(specs, results, strict=True):
        assert [p["step"] for p in found["curve"]] == [3, 6]
        assert 0 < found["dev"] < 7 and 0 < found["test"] < 7
        assert sum(found["kinds"].values()) == pytest.approx(1.0)
        assert found["cpu_total"] == pytest.approx(found["cpu_train"] + found["cpu_selection"])
        assert json.loads((folder / f"{spec.name}.json").read_text()) == found == finished(spec, folder)
    uniform, d2 = results
    assert uniform["flops_selection"] == 0 < d2["flops_selection"] and uniform["flops_train"] == d2["flops_train"]
    assert uniform["cpu_selection"] < 0.05 * uniform["cpu_total"] and d2["cpu_selection"] > uniform["cpu_selection"]
    assert uniform["dev"] != d2["dev"]


@pytest.mark.slow
def test_the_ceiling_trains_on_unique_rows_alone_once_it_chooses(
    trained: tuple[list[RunSpec], list[dict[str, Any]], Path], tmp_path: Path
) -> None:
    specs, results, _ = trained
    (found,) = run_all(
        [replace(specs[0], arm="content_unique").stamped()], tmp_path, jobs=1, limit_seconds=100, say=lambda line: None
    )
    warmup_steps = 1 / specs[0].steps  # the pool as it is
    assert 1 - warmup_steps <= found["kinds"]["unique"] and results[0]["kinds"]["unique"] < 1 - warmup_steps
    assert found["told"]["metrics"]["version"] > 0
    decided = found["told"]["decisions"]
    assert len(decided) == found["told"]["metrics"]["version"] + 1 and all(d["level"] for d in decided)


def test_an_interrupt_while_a_run_is_being_started_waits_until_it_is_noted() -> None:
    noted: list[str] = []
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():
        signal.raise_signal(signal.SIGINT)
        noted.append("run")
    assert noted == ["run"]


@pytest.mark.slow
def test_a_benchmark_that_is_terminated_leaves_no_run_behind(tmp_path: Path) -> None:
    program = (
        "import runpy, sys\nfrom pathlib import Path\nimport benchmarks.selection.matrix as matrix\n"
        "from tests.selection_pools import tiny_pool\n"
        "matrix.prepare = lambda args, name, division: tiny_pool(args.out)\n"  # a second, not a minute
        "runpy.run_module('benchmarks', run_name='__main__')\n"
    )
    words = ["selection", "--pool", "crawl", "--arms", "rs2", "--seeds", "1", "--steps", "100000", "--out", str(tmp_path)]
    command = [sys.executable, "-c", program, *words]

    def runs() -> list[int]:
        return [pid for pid, said in living(str(tmp_path)).items() if "benchmarks.selection.job" in said]

    with (tmp_path / "said").open("wb") as out:
        env = {**os.environ, "STARTED_BY": str(tmp_path)}
        asked = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        wait_until(lambda: len(runs()) == 2, 60)
        asked.terminate()
        assert asked.wait(30) == INTERRUPTED, (tmp_path / "said").read_text()
        wait_until(lambda: not runs(), 5)
    finally:
        for pid in (asked.pid, *runs()):
            end_group(pid, signal.SIGKILL, 5)


@pytest.mark.slow
def test_the_same_run_twice_gives_the_same_losses(
    trained: tuple[list[RunSpec], list[dict[str, Any]], Path], tmp_path: Path
) -> None:
    specs, results, _ = trained
    (again,) = run_all(specs[:1], tmp_path, jobs=1, limit_seconds=100, say=lambda line: None)
    assert [(p["dev"], p["test"], p["train"]) for p in again["curve"]] == [
        (p["dev"], p["test"], p["train"]) for p in results[0]["curve"]
    ]
