"""The planner against what must hold of any plan, and against a graph that is really built."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from grace_ds_quickstart.model import GPT, GPTConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from grace_ds.cli.calibrate import calibrate
from grace_ds.cli.main import main
from grace_ds.cli.plan import Sizes, plan
from grace_ds.cli.plan_model import BreakEven, CollectCost, Model
from grace_ds.cli.plan_rates import MEASURED, Rates
from grace_ds.comm.local import LocalComm
from grace_ds.config.schema import GraceConfig, GraphConfig
from grace_ds.gradients.hooks import Sketcher
from grace_ds.gradients.layers import select_layers
from grace_ds.graph.build import knn
from grace_ds.graph.placement import centroids_of, place
from grace_ds.graph.plan import plan_graph
from grace_ds.graph.rows import Request
from tests.unit.test_graph import rows_of

SIZES = Sizes(10**8, 128, 64, 2048, 500, 0.2, 1024, 30_000, 50.0, 10.0)


def test_the_window_is_the_pools_and_the_tier_is_the_builds() -> None:
    found = plan(SIZES, GraceConfig())
    assert found.window == 20 * 500 * 2048
    assert found.graph.tier == "clustered"
    assert found.repeats == pytest.approx(30_000 * 2048 / (0.2 * 10**8))
    assert plan(replace(SIZES, samples=20_000, steps=0), GraceConfig()).graph.tier == "exact"
    exact = GraceConfig(graph=GraphConfig(recall=1.0))
    assert plan(SIZES, exact).graph.why == "graph.recall is 1"


@pytest.mark.parametrize("tier", ["exact", "clustered"])
def test_more_ranks_hold_and_compute_less_each(tier: str) -> None:
    config = GraphConfig(tier=tier)
    plans = [plan_graph(config, 10**6, 10**6, 64, ranks, True) for ranks in (1, 2, 8, 64)]
    assert plans[0].wire_bytes == 0 < plans[1].wire_bytes
    for few, many in pairwise(plans):
        assert many.flop < few.flop and many.seconds(50, 1e9) < few.seconds(50, 1e9)
    assert plans[3].host_bytes < plans[1].host_bytes
    assert plans[0].device_bytes == 0
    gpu = [plan_graph(GraphConfig(tier=tier, backend="cuvs"), n, n, 64, 8, True).device_bytes for n in (10**6, 10**7)]
    assert 0 < gpu[0] < gpu[1] < 4 * 64 * 10**7


def test_clusters_save_work_where_there_are_many_rows() -> None:
    for n, wins in ((100, False), (10**6, True), (10**9, True)):
        a, b = (plan_graph(GraphConfig(tier=tier), n, n, 64, 1, True).flop for tier in ("clustered", "exact"))
        assert (a < b) is wins


def test_the_planned_pairs_are_those_of_a_real_placement() -> None:
    x, ids, comm = rows_of("clustered", 20_000, 32), np.arange(20_000), LocalComm(10.0)
    for overlap in (1, 2, 4):
        config = GraphConfig(tier="clustered", overlap=overlap)
        planned = plan_graph(config, len(x), len(x), 32, 1, True)
        centroids = centroids_of(comm, ids, x, planned.clusters)
        real = place(comm, Request.of(ids, x, config.k), centroids, 0.99, overlap)
        assert 0.4 < real.pairs / planned.pairs < 2.5
    assert knn(comm, ids[:500], x[:500], ids[:500], x[:500], GraphConfig()) is not None


def test_the_command_line_says_it_as_json_and_refuses_nonsense(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--samples", "1e6", "--ranks", "8", "--gflops", "50", "--set", "recipe=content"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["window"] == 10**6 and told["peak_bytes"] > told["features_bytes"] > 0
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "not built by this configuration; if it were: clustered (1000000 index rows" in said
    assert "To build it: --set recipe=grace" in said
    assert main([*words, "selection.objective=facility_location", "--json"]) == 0
    built = json.loads(capsys.readouterr().out)
    assert built["builds"] and built["peak_bytes"] > told["peak_bytes"]
    assert main([*words, "--budget", "3"]) == 1
    assert "budget = 3.0; it must be in (0, 1]" in capsys.readouterr().err
    assert main([*words, "graph.teir=exact"]) == 1
    assert "'tier'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", "--samples", "1.5", "--ranks", "8"])
    assert "not a whole number" in capsys.readouterr().err


def counted(width: int, layers: int, tokens: int, sketched: bool) -> int:
    """Operations of a real step of two samples, by torch's counter; with the real hooks, without a trusted basis."""
    model = GPT(GPTConfig(vocab=512, context=tokens, width=width, layers=layers))
    ids = torch.randint(0, 512, (2, tokens + 1))
    sketcher = Sketcher(select_layers(model), 0)
    # The fused attention is not counted by torch.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if sketched:
            sketcher.attach()
            capture = sketcher.begin(np.arange(2))
        loss = model(ids)
        sketcher.end()
        loss.backward()
        if sketched:
            sketcher.finish(capture)
    sketcher.detach()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(("width", "layers", "tokens"), [(64, 4, 32), (128, 5, 64), (96, 2, 128)])
def test_operations_of_a_step_and_of_its_harvest_are_those_of_a_real_one(width: int, layers: int, tokens: int) -> None:
    model = Model(layers, width, 512, False)
    bare, with_us = (counted(width, layers, tokens, sketched) for sketched in (False, True))
    assert model.flop(tokens) * 2 == pytest.approx(bare, rel=0.02)
    added = CollectCost.of(model, GraceConfig().collect, tokens, basis=False).flop * 2
    assert added == pytest.approx(with_us - bare, rel=0.04)  # torch does not count the products of both sides, made in place


def test_a_shape_made_up_from_parameters_has_them() -> None:
    for parameters in (1e8, 7e9, 7e10):
        made = Model.of(parameters, 0, 0, 0)
        assert made is not None and made.assumed and made.weights == pytest.approx(parameters, rel=0.1)
    assert Model.of(0, 0, 0, 0) is None


def test_break_even_is_where_both_take_the_same_time() -> None:
    step, collect, first, later, interval = 0.5, 0.01, 9.0, 4.0, 50
    even = BreakEven.of(step, collect, first, later, interval, 10_000)
    for steps, late in ((even.steps, False), (even.steps + 1, True)):
        spent = steps * (step + collect) + first + later * (steps / interval - 1)
        assert (spent > 10_000 * step) is late
    assert even.ratio == pytest.approx(10_000 / even.steps, rel=1e-3)
    assert BreakEven.of(step, 0.0, 0.0, 0.0, interval, 0).ratio == 1.0
    assert BreakEven.of(step, 0.0, 1e6, 1.0, interval, 10).ratio == float("inf")  # the first refresh alone takes longer


def test_dearer_recipes_and_shorter_intervals_cost_more() -> None:
    sizes = replace(SIZES, model=Model(32, 4096, 32_000, False), tflops=300.0)
    recipes = [plan(sizes, GraceConfig(recipe=recipe)) for recipe in ("uniform", "content")]
    recipes += [plan(sizes, GraceConfig(recipe="grace", ablate=parts)) for parts in (["graph"], [])]
    for cheap, dear in pairwise(recipes):
        assert cheap.even is not None and dear.even is not None and cheap.even.overhead < dear.even.overhead
        assert cheap.peak_bytes <= dear.peak_bytes
    assert recipes[0].feature_seconds == 0 and recipes[1].collect_seconds == 0 < (recipes[2].collect_seconds or 0)
    assert [r.builds for r in recipes] == [False, False, False, True]
    assert recipes[2].first_seconds < recipes[3].first_seconds and recipes[2].held_bytes < recipes[3].held_bytes
    blind = plan(sizes, GraceConfig(recipe="grace", ablate=["gradients", "loss"]))
    assert blind.builds and blind.collect_seconds == 0 and blind.table_bytes == 0
    seldom = GraceConfig()
    seldom.collect.share = 0.05
    assert 0 < (plan(sizes, seldom).collect_seconds or 0) < (recipes[3].collect_seconds or 0)
    often = plan(replace(sizes, interval=50, samples=10**6, steps=0), GraceConfig())
    rare = plan(replace(sizes, interval=500, samples=10**6, steps=0), GraceConfig())
    assert often.even is not None and rare.even is not None and often.even.overhead > rare.even.overhead
    assert not rare.rolls and rare.last_seconds < rare.first_seconds  # its features are read and its graph is built once
    rolling = plan(replace(sizes, samples=10**9), GraceConfig())
    assert rolling.rolls and rare.last_seconds / rare.first_seconds < rolling.last_seconds / rolling.first_seconds < 1


def test_a_calibration_measures_here_and_is_quick() -> None:
    started = time.monotonic()
    found = calibrate(GraceConfig(recipe="grace"), 64, 128, 128, LocalComm(60.0))
    assert time.monotonic() - started < 60  # 4 s on an idle machine
    for name in ("gflops", "narrow_gflops", "token_seconds", "fixed_feature_seconds", "fixed_bytes", "graph"):
        assert found.of(name) == MEASURED and getattr(found, name) > 0
    assert found.busy >= 1 and found.of("gbits") != MEASURED
    assert 40 << 20 < found.fixed_bytes < 200 << 20  # the 6-gram counts take 16 MiB, and as much again while they are summed
    assert found.resting_bytes < found.fixed_bytes
    sizes = replace(SIZES, gflops=0.0, gbits=0.0, samples=10_000, steps=0, rates=found)
    assert plan(sizes, GraceConfig()).gflops == found.gflops
    assert plan(replace(sizes, gflops=7.0), GraceConfig()).gflops == 7.0
    assert Rates().of("gflops") == "assumed"


def test_what_is_not_known_is_said_and_what_if_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--samples", "1e5", "--ranks", "8", "--gflops", "50", "--set", "recipe=grace"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "not known: give --parameters" in said and "break-even                  not known" in said
    assert "Assumed: " in said and "Given: products 50 Gflop/s." in said and "--calibrate measures" in said
    model = ["--layers", "12", "--hidden", "768", "--vocab", "5e4", "--step-seconds", "0.7", "--steps", "2e4"]
    model += ["--set", "recipe=grace", "max_repeats=300"]
    assert main([*words, *model]) == 0
    said = capsys.readouterr().out
    assert "where uniform needs 1.0" in said and "of 20,000 to be saved" in said and "12 blocks of width 768" in said
    for row in ("ranks × 2", "interval ÷ 2", "budget × 2", "recipe content", "without graph", "without gradients"):
        assert row in said
    assert main([*words, *model, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["what_if"]["recipe content"]["even"]["overhead"] < told["even"]["overhead"]
    assert told["what_if"]["interval × 2"]["even"]["overhead"] < told["even"]["overhead"]
    assert main([*words, "--budget", "0.9", "--interval", "2"]) == 0
    capsys.readouterr()
    assert main([*words, "--layers", "12"]) == 1
    assert "--layers and --hidden" in capsys.readouterr().err


def test_scales_of_numbers_are_those_of_the_field(capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for samples, parameters in (("100M", "7B"), ("1e8", "7e9"), ("100000k", "0.007T")):
        assert main(["plan", "--samples", samples, "--ranks", "8", "--parameters", parameters, "--gflops", "50", "--json"]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] == told[2]
    assert json.loads(told[0])["sizes"]["samples"] == 10**8


@pytest.mark.parametrize("option", ["--ranks", "--samples", "--batch", "--interval", "--tokens", "--dim", "--budget", "--gflops"])
def test_a_size_of_0_is_refused_in_words(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["plan", "--samples", "1e6", "--ranks", "8", option, "0"])
    said = capsys.readouterr().err
    assert left.value.code == 2 and f"argument {option}: '0'" in said and said.count("\n") == 1


def test_a_plan_is_refused_where_the_job_would_be(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--samples", "1e6", "--ranks", "8", "--gflops", "50", "--batch", "1000", "--steps", "900"]
    assert main(words) == 1
    assert "4.5 times, above max_repeats 4.0: raise budget to at least 0.225" in capsys.readouterr().err
    assert main([*words, "--budget", "0.225"]) == 0
    said = capsys.readouterr().out
    assert "4.00 over the run, at most 4" in said and "budget ÷ 2: 900 steps" in said  # the what-if alone is impossible
    assert main([*words, "--set", "max_repeats=5"]) == 0
    assert "4.50 over the run, at most 5" in capsys.readouterr().out


def test_what_set_says_of_the_config_is_planned_with(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--samples", "1e6", "--ranks", "8", "--gflops", "50", "--json"]
    told = []
    options = ["--budget", "0.4", "--interval", "70", "--dim", "32", "--steps", "100"]
    keys = ["--set", "budget=0.4", "refresh.interval_steps=70", "features.dim=32", "total_steps=100"]
    for given in (options, keys, [*options, "--set", "budget=0.9"]):
        assert main([*words, *given]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] == told[2]
    found = json.loads(told[0])["sizes"]
    assert (found["budget"], found["interval"], found["dim"], found["steps"]) == (0.4, 70, 32, 100)


def test_threads_share_the_tokens_and_take_memory_for_their_blocks() -> None:
    alone, four = GraceConfig(), GraceConfig()
    four.features.threads = 4
    sizes = replace(SIZES, samples=10**7, steps=0)
    one, many = plan(sizes, alone), plan(sizes, four)
    saved = one.feature_seconds - many.feature_seconds
    assert saved == pytest.approx(0.75 * sizes.rates.token_seconds * one.window / sizes.ranks * sizes.tokens, rel=0.01)
    assert 0 < many.scratch_bytes - one.scratch_bytes < 8 * 4 * 60 * 2**18


def test_an_adaptive_cadence_stretches_the_interval_until_refreshes_take_their_share() -> None:
    sizes = replace(SIZES, samples=10**7, steps=0, interval=20, step_seconds=0.1, model=Model(12, 768, 50_000, False))
    fixed, adaptive = GraceConfig(), GraceConfig()
    fixed.refresh.cadence, adaptive.refresh.max_overhead = "fixed", 0.02
    as_given, stretched = plan(sizes, fixed), plan(sizes, adaptive)
    assert as_given.every == 20 < stretched.every
    assert stretched.step_seconds is not None and stretched.collect_seconds is not None
    between = stretched.every * (stretched.step_seconds + stretched.collect_seconds)
    assert stretched.mean_seconds / between == pytest.approx(0.02, rel=0.01)
    assert as_given.even is not None and stretched.even is not None and stretched.even.overhead < as_given.even.overhead
    seldom = plan(replace(sizes, step_seconds=1000.0), adaptive)
    assert seldom.every == 20  # the interval is a lower end
    assert plan(replace(sizes, step_seconds=0.0, model=None), adaptive).every == 20


@pytest.mark.parametrize("columns", [60, 80, 110])
def test_a_plan_fits_the_terminal_and_loses_no_figure(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--samples", "100M", "--ranks", "64", "--parameters", "7B", "--tflops", "400", "--steps", "1e5"]
    words += ["--batch", "2048", "--set", "max_repeats=15", "--gflops", "50"]
    told = []
    for width in (1000, columns):
        monkeypatch.setenv("COLUMNS", str(width))
        assert main(words) == 0
        told.append(capsys.readouterr().out)
    assert max(map(len, told[1].splitlines())) <= columns
    assert set(told[1].split()) == set(told[0].split())
