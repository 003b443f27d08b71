"""Ulysses and PipelineEngine under DeepSpeed: ranks that share a model train on one rank's samples, and their sketches add up.

Their names hold megatron, to be found with the other layouts of a model over ranks.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.multirank.harness import run_module
from tests.multirank.launch import environment

STEPS = 12  # of parallel_job, which is not imported here: it imports DeepSpeed
KINDS = {
    "one": 1,
    "in_order": 1,
    "ulysses": 2,
    "pipeline": 2,
}  # in_order: as a PipelineEngine's own sampler, which does not shuffle
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("parallel")
    found = {}
    for kind, ranks in KINDS.items():
        (out / kind).mkdir()
        run_module("tests.multirank.parallel_job", [kind, out / kind], ranks, timeout=180, env=environment(out))
        found[kind] = [json.loads((out / kind / f"{kind}-{rank}.json").read_text()) for rank in range(ranks)]
    return found


def order(ranks: list[dict[str, Any]], key: str) -> list[list[int]]:
    """The ids of each step in their order, as the last rank saw them: of a pipeline the one that has the loss."""
    steps: list[list[int]] = ranks[-1][key]
    return steps


@pytest.mark.parametrize(("kind", "single"), [("ulysses", "one"), ("pipeline", "in_order")])
def test_megatron_like_layouts_train_on_the_one_ranks_samples(records, kind, single):
    one = records[single][0]
    assert one["steps"] != records["in_order" if single == "one" else "one"][0]["steps"]
    assert order(records[kind], "steps") == one["steps"]
    assert len(one["steps"]) == STEPS and all(len(step) == 8 for step in one["steps"])
    for rank in records[kind]:
        assert rank["schedules"] == one["schedules"]
        assert (rank["cursor"], rank["failures"]) == (one["cursor"], 0)
    if kind == "ulysses":
        assert records[kind][0]["steps"] == records[kind][1]["steps"]


@pytest.mark.parametrize("kind", list(KINDS))
def test_megatron_like_layouts_resume(records, kind):
    for rank in records[kind]:
        assert rank["again_schedules"] == rank["schedules"]
    assert order(records[kind], "again") == order(records[kind], "steps")[6:]


@pytest.mark.parametrize("kind", ["ulysses", "pipeline"])
def test_megatron_like_layouts_sketches_add_up(records, kind):
    found = [rank["sketches"] for rank in records[kind]]
    assert found[0]["error"] <= 1e-5
    assert found[0]["loss_error"] <= 1e-5
    assert all(rank["alone"] > 0.5 for rank in found)
    assert [rank["failures"] for rank in found] == [0, 0]
    assert sum(rank["here"] for rank in found) == found[0]["all"] * (2 if kind == "ulysses" else 1)


def test_megatron_like_layouts_read_gradients_by_default(records):
    for ranks in records.values():
        assert {rank["recipe auto"] for rank in ranks} == {"grace"}


def test_megatron_like_pipeline_refuses_data_of_its_own(records):
    assert all("data of its own" in rank["own data"] for rank in records["pipeline"])
