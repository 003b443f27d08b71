"""``recipe: grace`` in a Megatron job: however the model and the data lie on the ranks, refreshes see and decide the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

pytest.importorskip("megatron.core", reason="megatron-core is not installed (pip install grace_ds[megatron])")

from grace_ds.config.schema import CollectConfig
from grace_ds.gradients.influence_probe import Probes
from grace_ds.records import HIDDEN
from tests.multirank.harness import ROOT, run_ranks
from tests.multirank.megatron_grace_job import BATCH, INTERVAL, STEPS, Layout, refusals, work

Found = list[dict[str, Any]]  # what each rank found

ONE = [Layout(), Layout(adam=True, plain=True), Layout(per_token=True, plain=True)]
TWO = [
    Layout(tp=2, resumes=True),
    Layout(tp=2, sp=True, recompute=True, two=True),
    Layout(pp=2),
    Layout(pp=2, recompute=True, per_token=True, plain=True),
    Layout(),
    Layout(adam=True, distributed=True, plain=True),
    Layout(tp=2, breaks=True, plain=True),
]
FOUR = [Layout(tp=2, plain=True), Layout(tp=2, pp=2, plain=True)]
EXACT = [*((2, i) for i, layout in enumerate(TWO) if not layout.breaks), *((4, i) for i in range(len(FOUR)))]
SPREAD = {1: ONE, 2: TWO, 4: FOUR}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, list[Found]]:
    """Number of ranks → for each layout what every rank found."""
    folder = str(tmp_path_factory.mktemp("grace"))
    found = {size: run_ranks(work, size, folder, layouts, timeout=540) for size, layouts in SPREAD.items()}
    return {size: [[rank[i] for rank in ranks] for i in range(len(SPREAD[size]))] for size, ranks in found.items()}


def reference(results, size: int, i: int) -> Found:
    """Of the same job on one rank."""
    layout = SPREAD[size][i]
    return results[1][next(k for k, one in enumerate(ONE) if (one.adam, one.per_token) == (layout.adam, layout.per_token))]


def rows_of(ranks: Found) -> dict[str, np.ndarray]:
    """All rows that a run has kept, in the order of their samples."""
    parts = [rank["rows"] for rank in ranks if "rows" in rank]
    order = np.argsort(np.concatenate([part["ids"] for part in parts]), kind="stable")
    return {key: np.concatenate([part[key] for part in parts])[order] for key in parts[0]}


def whole(factors: Any) -> np.ndarray:
    u, s, v = (array.astype(np.float64) for array in factors)
    return u @ np.diag(s) @ v.T


def far(found: np.ndarray, wanted: np.ndarray) -> float:
    """Error, in lengths of the right one."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def name(case: tuple[int, int]) -> str:
    return f"{case[0]} ranks, {SPREAD[case[0]][case[1]]}"


@pytest.mark.parametrize("case", EXACT, ids=name)
def test_megatron_influences_are_those_of_one_rank(results, case):
    ranks, one = results[case[0]][case[1]], reference(results, *case)
    found, wanted = rows_of(ranks), rows_of(one)
    assert np.array_equal(found["ids"], wanted["ids"]) and np.array_equal(found["basis"], wanted["basis"])
    known = np.isfinite(wanted["influence"])
    assert known.sum() > 100 and np.array_equal(np.isfinite(found["influence"]), known)
    assert far(found["influence"][known], wanted["influence"][known]) <= 1e-4
    for column, error in (("norm", 1e-5), ("loss", 1e-5), ("sketch", 1e-3)):  # sketches are kept in half precision
        assert far(found[column].astype(np.float64), wanted[column].astype(np.float64)) <= error
    for layer, factors in one[0]["basis"].items():
        assert far(whole(ranks[0]["basis"][layer]), whole(factors)) <= 1e-4
    units, wanted_units = ranks[0]["reference"], one[0]["reference"]
    assert units.keys() == wanted_units.keys() and len(units) == 3
    assert all(abs(units[version] / unit - 1) <= 1e-4 for version, unit in wanted_units.items())
    assert all(rank["failures"] == 0 for rank in ranks)


@pytest.mark.parametrize("case", EXACT, ids=name)
def test_megatron_schedules_are_those_of_one_rank(results, case):
    """The same sample at every position.  A digest also covers inverse-probability weights, which follow the last bits."""
    ranks, one = results[case[0]][case[1]], reference(results, *case)[0]
    for rank in (rank for rank in ranks if "schedules" in rank):
        assert len(rank["schedules"]) == len(one["schedules"]) > 1
        for found, wanted in zip(rank["schedules"], one["schedules"], strict=True):
            assert np.array_equal(found[1], wanted[1]) and np.array_equal(found[2], wanted[2])
            assert np.abs(found[3] - wanted[3]).max() < 0.01
            if SPREAD[case[0]][case[1]].pp == case[0]:  # a pipeline alone changes no order of summation
                assert found[0] == wanted[0]
        assert rank["snapshot"]["refresh_failures"] == 0 and not rank["snapshot"]["frozen"]


def test_megatron_refreshes_use_what_gradients_tell(results):
    for size, i in [(1, 0), (1, 1), (1, 2), *EXACT]:
        ranks = results[size][i]
        lines = ranks[0]["lines"]
        assert [line["step"] for line in lines if line["objective"] == "sample"] == [INTERVAL, 2 * INTERVAL]
        live = [line for line in lines if line["objective"] == "sample" and "gradients" in line["parts"]]
        assert all(line["drawn_by"] == "grace" and line["labels"] > 0 and line["known_influence"] > 0 for line in live)
        assert live and live[-1]["received"] == INTERVAL * BATCH
        assert all(unit > 0 for unit in ranks[0]["reference"].values())
        rows, noise = rows_of(ranks), ranks[0]["noise"]
        strength = rows["influence"] * rows["norm"]
        noise, known = noise[rows["ids"]], np.isfinite(strength)
        assert strength[known & ~noise].mean() > 2 * strength[known & noise].mean()


@pytest.mark.parametrize("i", [0, 1], ids=lambda i: str(TWO[i]))
def test_megatron_ranks_alone_and_blockwise_moments_are_off(results, i):
    """The controls: without the sum over the ranks, and without the products of features that lie on different ranks."""
    leader, one = results[2][i][0], results[1][0][0]
    exact = leader["exact"]
    assert far(exact["influence"], one["exact"]["influence"]) <= 1e-4
    for layer, factors in one["exact"]["basis"].items():
        assert far(whole(exact["basis"][layer]), whole(factors)) <= 1e-4
    for control in ("alone", "blockwise"):
        assert far(leader[control]["influence"], exact["influence"]) > 0.2
    # As an approximation, blockwise moments order samples alike, but not well enough.
    assert 0.9 < rank_correlation(leader["blockwise"]["influence"], exact["influence"]) < 0.99


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


def test_megatron_probes_leave_the_job_as_it_was(results):
    looked = [rank["untouched"] for layouts in results.values() for ranks in layouts for rank in ranks if "untouched" in rank]
    assert len(looked) == 9
    assert all(all(found.values()) for found in looked), looked


def test_megatron_refresh_that_fails_costs_that_refresh_only(results):
    """The ranks that follow stay in step with their leader."""
    ranks = results[2][TWO.index(Layout(tp=2, breaks=True, plain=True))]
    assert ranks[0]["snapshot"]["refresh_failures"] == 1 and not ranks[0]["snapshot"]["frozen"]
    assert [line["step"] for line in ranks[0]["lines"]] == [0, INTERVAL // 2, 2 * INTERVAL]
    assert ranks[0]["lines"][-1]["received"] > INTERVAL * BATCH  # the failed refresh has lost no row


def test_megatron_run_is_taken_up_from_its_schedules(results):
    """The same samples up to the next refresh; gradients are measured anew."""
    ranks = results[2][0]
    again, schedule = ranks[0]["resumed"], ranks[0]["schedules"][0]
    assert schedule[4]["decided_at_step"] == INTERVAL
    into = (again["begin"] - INTERVAL - 1) * BATCH  # it is in force from one step after its refresh
    assert np.array_equal(again["slots"], schedule[1][into : into + len(again["slots"])]) and len(again["slots"]) > 2 * BATCH
    assert again["snapshot"]["step"] == STEPS and again["snapshot"]["refresh_failures"] == 0 and again["rows"] > 0
    assert ranks[1]["resumed"] is None


def test_megatron_interleaved_pipeline_is_one_rank(tmp_path):
    layouts = [[Layout(blocks=4, plain=True)], [Layout(pp=2, vp=2, blocks=4), Layout(pp=2, vp=2, blocks=4, recompute=True)]]
    one, two = (run_ranks(work, n + 1, str(tmp_path), each, timeout=150) for n, each in enumerate(layouts))
    wanted = rows_of([one[0][0]])
    for i in range(2):
        ranks = [rank[i] for rank in two]
        found = rows_of(ranks)
        known = np.isfinite(wanted["influence"])
        assert far(found["influence"][known], wanted["influence"][known]) <= 1e-4
        for a, b in zip(ranks[0]["schedules"], one[0][0]["schedules"], strict=True):
            assert np.array_equal(a[1], b[1]) and np.array_equal(a[2], b[2])
        assert all(all(rank["untouched"].values()) for rank in ranks)


# -- what it costs -------------------------------------------------------------------------------------------------------

COLUMNS, LINES, MOMENT, FACTORS = 17, 35, 32, 8  # of Y and W at 8 factors; of a second moment; of the trusted basis


def summed(layers: list[tuple[int, int]], rows: int, bases: int, judged: int) -> float:
    """Bytes that a rank gives to the sums and broadcasts of its model, without the layers' scale and the leader's words."""
    sides = sum(a + b for a, b in layers)
    fits = 8 * (MOMENT * sides + sum(COLUMNS * a + LINES * b for a, b in layers))
    told = 4 * FACTORS * (sides + len(layers))
    return bases * (fits + told) + 4 * (rows + bases * judged) * (CollectConfig().dim + 3 + HIDDEN)


def test_megatron_bytes_are_those_counted(results):
    for i in (0, 2):
        for rank in results[2][i]:
            leader = results[2][i][0]
            rows = (2 * INTERVAL - 1) * BATCH  # of the first step the unfolded sketches, of the last two nothing yet
            judged = Probes.of(0.75, INTERVAL, BATCH).judge
            expected = summed(leader["layers"], rows, 3, judged)
            assert 1 <= rank["bytes"] / expected < 1.15  # and the layers' scale once, and the leader's words


def test_megatron_bytes_are_less_than_a_hundredth_of_the_jobs():
    """At the size of configs/megatron_gpu.yaml: all that GRACE moves on a rank between two refreshes, beside the job's own."""
    c = OmegaConf.load(ROOT / "configs" / "megatron_gpu.yaml")
    m, p, interval = c.model, c.parallel, int(c.grace.refresh.interval_steps)
    replicas = c.processes // (p.tensor * p.pipeline)
    h, here = m.hidden, m.layers / p.pipeline
    layers = [(h, 3 * h), (h, h), (h, 4 * h), (4 * h, h)] * (m.layers // 2)
    samples = interval * c.train.batch / replicas
    probes = Probes.of(0.01, interval, c.train.batch)
    # Megatron sums a layer's output over the tensor-parallel ranks twice forwards and twice backwards, stages hand on once each.
    a_sample = 2 * m.length * h * (4 * here + 2)
    gradients = interval * 2 * 12 * m.layers * h**2 / (p.tensor * p.pipeline)
    job = samples * a_sample + gradients
    probed = (probes.pool + probes.fit + probes.judge) / replicas * a_sample
    moments = probes.pool / replicas * m.length * MOMENT * 4 * 4 * here
    kept = summed(layers, samples * CollectConfig().share, 1, probes.judge)
    assert 0.001 < (probed + moments + kept) / job < 0.01


# -- what is refused -----------------------------------------------------------------------------------------------------


def test_megatron_says_what_it_cannot_serve():
    said = run_ranks(refusals, 1, timeout=110)[0]
    assert "grace_ds.megatron.attach(model) before grace_ds.megatron.wrap" in said["unattached grace"]
    assert "use mode: train" in said["shadow grace"]
    assert "--bf16" in said["fp16 grace"]
    assert "before get_forward_backward_func()" in said["late grace"]
    assert {said[f"{name} auto"] for name in ("unattached", "shadow", "fp16", "late")} == {"content"}
    assert said["whole"] == "megatron.core.pipeline_parallel.schedules"
