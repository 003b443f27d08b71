"""Sketches of a model that lies on two ranks, against gradients of one sample at a time, put together and projected."""

from __future__ import annotations

import math
from typing import Any

import pytest
from omegaconf import OmegaConf

pytest.importorskip("megatron.core", reason="megatron-core is not installed (pip install grace_ds[megatron])")

from grace_ds.config.schema import CollectConfig
from grace_ds.records import HIDDEN
from tests.multirank.harness import ROOT, run_ranks
from tests.multirank.megatron_job import DIM, LENGTH, VOCAB, Case, refusals, work

TENSOR = [Case(tp=2, sp=sp, recompute=recompute) for sp in (False, True) for recompute in (False, True)]
PIPELINE = [Case(pp=2, micro=4, recompute=recompute) for recompute in (False, True)]


@pytest.fixture(scope="module")
def results() -> dict[Case, list[dict[str, Any]]]:
    found = {}
    for cases in (TENSOR, PIPELINE):
        ranks = run_ranks(work, 2, cases, timeout=180)
        found |= {case: [rank[i] for rank in ranks] for i, case in enumerate(cases)}
    return found


@pytest.mark.slow
@pytest.mark.timeout(420)
@pytest.mark.parametrize("case", [*TENSOR, *PIPELINE], ids=str)
def test_megatron_rows_are_those_of_the_whole_gradients(results, case):
    leader = results[case][0]
    assert leader["error"] <= 1e-5
    assert leader["sigma_error"] <= 1e-5
    assert leader["align_error"] <= 1e-5
    assert leader["ids"] == [100 * k + i for k in range(case.micro) for i in range(case.rows)]
    assert all(rank["failures"] == 0 for rank in results[case])
    # An untrained model guesses: each loss is near that of a uniform one, and none is missing.
    assert all(abs(loss - math.log(VOCAB)) < 1 for loss in leader["loss"])


@pytest.mark.slow
@pytest.mark.timeout(420)
@pytest.mark.parametrize("case", [*TENSOR, *PIPELINE], ids=str)
def test_megatron_ranks_alone_are_far_off(results, case):
    """The negative control: without the sum over the ranks no rank has the rows."""
    assert all(rank["alone"] > 0.5 for rank in results[case])


@pytest.mark.slow
@pytest.mark.timeout(420)
@pytest.mark.parametrize("case", [*TENSOR, *PIPELINE], ids=str)
def test_megatron_step_that_is_run_again_counts_once(results, case):
    assert results[case][0]["rerun_ids"]
    assert results[case][0]["rerun"] < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_megatron_layers_are_named_and_placed_globally(results):
    blocks = [f"decoder.layers.{i}.{part}" for i in range(2) for part in LINEARS]
    for case, ranks in results.items():
        assert all(sorted(rank["names"]) == sorted([*blocks, "output_layer"]) for rank in ranks)
        assert ranks[0]["names"] == ranks[1]["names"]
        assert ranks[0]["sigma"] == ranks[1]["sigma"]
        if case.pp == 2:
            assert ranks[0]["here"] == [n for n in ranks[0]["names"] if n.startswith("decoder.layers.0.")]
            assert set(ranks[1]["here"]) == set(ranks[1]["names"]) - set(ranks[0]["here"])
        # Sequence parallel in earnest: each rank sees its share of the tokens, and all of them otherwise.
        assert all(rank["tokens_seen"] == [LENGTH // 2 if case.sp else LENGTH] for rank in ranks)


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_megatron_sums_are_small(results):
    """One sum a window: so many numbers a sample, and once the unfolded sketches."""
    for case, ranks in results.items():
        samples = case.micro * case.rows
        window, once = samples * (DIM + 3 + HIDDEN) * 4, samples * (9 * 64 + 1) * 4
        assert all(rank["bytes"] == window + once for rank in ranks)


def test_megatron_sums_are_a_thousandth_of_the_gradients():
    """At the size of configs/megatron_gpu.yaml: what a rank hands to the sums of a step, beside its gradients in bfloat16."""
    c = OmegaConf.load(ROOT / "configs" / "megatron_gpu.yaml")
    parts = c.parallel.tensor * c.parallel.pipeline
    gradients = 12 * c.model.layers * c.model.hidden**2 / parts * 2
    samples = c.train.batch / (c.processes / parts)
    dim = CollectConfig().dim
    assert dim == DIM  # what the test above has counted
    assert 0.0005 < samples * (dim + 3 + HIDDEN) * 4 / gradients < 0.001
    once = samples * (c.model.layers // 2 * 4 * CollectConfig().rank ** 2 + 1) * 4
    assert once / (gradients * c.grace.refresh.interval_steps) < 0.0001  # the layers' scale, in a run's first window only


LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_megatron_what_is_left_out_and_what_is_refused():
    said = run_ranks(refusals, 1, timeout=110)[0]
    assert said["auto"].split() == [f"decoder.layers.1.{part}" for part in sorted(LINEARS)]
    assert "several samples in one row" in said["packed"]
    assert said["copies"] == "True False"  # a layer that every rank has whole is counted once
    assert said["token shares"] == "True"
    assert said["experts"].split() == [f"decoder.layers.0.{part}" for part in sorted(LINEARS[:2])] + ["output_layer"]
    assert 10 < int(said["share"]) < 90 and f"they hold {said['share']} % of the model's parameters" in said["lines"]
    assert "Transformer Engine" in said["engine"] and "--transformer-impl local" in said["engine"]
