"""The planner against what must hold of any plan, and against a graph that is really built."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from grace_ds.cli.main import main
from grace_ds.cli.plan import Sizes, plan
from grace_ds.comm.local import LocalComm
from grace_ds.config.schema import GraceConfig, GraphConfig
from grace_ds.graph.build import knn
from grace_ds.graph.placement import centroids_of, place
from grace_ds.graph.plan import plan_graph
from grace_ds.graph.rows import Request
from tests.unit.test_graph import rows_of

SIZES = Sizes(10**8, 128, 64, 2048, 500, 0.2, 1024, 100_000, 50.0, 10.0)


def test_the_window_is_the_pools_and_the_tier_is_the_builds() -> None:
    found = plan(SIZES, GraceConfig())
    assert found.window == 20 * 500 * 2048
    assert found.graph.tier == "clustered"
    assert found.repeats == pytest.approx(100_000 * 2048 / (0.2 * 10**8))
    assert plan(replace(SIZES, samples=20_000), GraceConfig()).graph.tier == "exact"
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
    gpu = [plan_graph(GraphConfig(tier=tier, leaf="cuvs"), n, n, 64, 8, True).device_bytes for n in (10**6, 10**7)]
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
    words = ["plan", "--samples", "1e6", "--ranks", "8", "--gflops", "50"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["window"] == 10**6 and told["peak_bytes"] > told["features_bytes"] > 0
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "not built by this configuration; if it were: clustered (1000000 index rows" in said
    assert main([*words, "--json", "--set", "selection.objective=facility_location"]) == 0
    built = json.loads(capsys.readouterr().out)
    assert built["builds"] and built["peak_bytes"] > told["peak_bytes"]
    assert main([*words, "--budget", "3"]) == 1
    assert "budget is 3" in capsys.readouterr().err
    assert main([*words, "--set", "graph.teir=exact"]) == 1
    assert "'tier'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", "--samples", "1.5", "--ranks", "8"])
    assert "not a whole number" in capsys.readouterr().err
