"""A Megatron job fed by the schedule: what is consumed, resumed, run again, read too far ahead."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed (pip install grace_ds[megatron])")

from grace_ds.errors import ConfigError, DataError
from grace_ds.integrations.megatron import job_state
from grace_ds.integrations.megatron.positions import Ring, Scheduled
from tests.multirank.harness import run_ranks
from tests.multirank.megatron_feed_job import BATCH, INTERVAL, STEPS, work


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks(work, 2, str(tmp_path_factory.mktemp("feed")), timeout=240)


def stream(ranks: list[dict[str, Any]], name: str) -> list[list[int]]:
    """The ids of each step in the order of their positions: micro-batch by micro-batch, rank by rank."""
    steps = zip(*(rank[name]["consumed"] for rank in ranks), strict=True)
    return [[i for micro in zip(*step, strict=True) for rows in micro for i in rows] for step in steps]


pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("name", ["none", "workers", "before", "after", "rerun", "blend"])
def test_megatron_consumes_what_arithmetic_says(ranks, name):
    for rank in ranks:
        assert rank[name]["consumed"] == rank[name]["said"]
        assert rank[name]["failures"] == 0


def test_megatron_data_workers_change_nothing(ranks):
    assert stream(ranks, "workers") == stream(ranks, "none")
    assert len({tuple(step) for step in stream(ranks, "none")}) == STEPS


def test_megatron_resumes_by_consumed_samples(ranks):
    assert stream(ranks, "before") == stream(ranks, "none")[:9]
    assert stream(ranks, "after") == stream(ranks, "none")[6:]
    assert ranks[0]["abandoned"] == ["schedule-000002.abandoned"]  # made after step 8, which the resumed run came to again


def test_megatron_step_that_is_run_again_and_evaluation_count_once(ranks):
    assert stream(ranks, "rerun") == stream(ranks, "none")
    for rank in ranks:
        found = {key: rank["rerun"][key] for key in ("step", "cursor", "version")}
        assert found == {"step": STEPS, "cursor": STEPS * BATCH, "version": STEPS // INTERVAL}


def test_megatron_pool_is_one_epoch_whatever_the_length_of_the_run(ranks):
    assert ranks[0]["longer"]["samples"] == ranks[0]["none"]["samples"]
    assert stream(ranks, "longer") == stream(ranks, "none")[:5]
    warmup_steps = [i for step in stream(ranks, "none")[:INTERVAL] for i in step]
    assert len(set(warmup_steps)) == len(warmup_steps)  # uniform, without replacement


def test_megatron_selects_once_the_opening_is_over(ranks):
    assert ranks[0]["objectives"] == ["uniform", "sample", "sample", "sample"]
    assert ranks[0]["coreset"] == ranks[0]["window"] // 2 < ranks[0]["none"]["samples"] // 2


def test_megatron_blend_keeps_its_weights(ranks):
    found = [i for step in stream(ranks, "blend") for i in step]
    parts = [int(i >= ranks[0]["blend"]["first"]) for i in found]
    assert parts == ranks[0]["blend"]["wanted"]
    assert 0.2 < np.mean(parts) < 0.3
    assert max(Counter(found[: INTERVAL * BATCH]).values()) == 1  # the warm-up repeats nothing


def test_megatron_shadow_leaves_the_dataset_alone(ranks):
    assert ranks[0]["shadow"]


def test_megatron_refusals_say_why(ranks):
    for rank in ranks:
        said = rank["refused"]
        assert "lag 1 is too short" in said["lag"] and "lag=2" in said["lag"]
        assert "not published that far" in said["ahead"] and "larger lag" in said["ahead"]
        assert "was made with the dataset" in said["hash"] and "fresh run_dir" in said["hash"]
        assert "second moments" in said["grace"] and "recipe: content" in said["grace"]
        assert "holds no schedule of this run" in said["missing"]
        assert "between two steps" in said["between"]
        assert "virtual stages" in said["interleaved"]
        assert said["left in /dev/shm"] == ""


def test_megatron_arguments_that_cannot_be_served(monkeypatch):
    cases = {"dataloader_type": "cyclic", "rampup_batch_size": [8, 8, 100], "phase_transition_iterations": [5]}
    for name, value in (cases | {"hybrid_context_parallel": True}).items():
        args = SimpleNamespace(
            consumed_train_samples=0, micro_batch_size=1, global_batch_size=4, num_workers=2, dataloader_type="single"
        )
        monkeypatch.setattr(job_state, "_arguments", lambda args=args: args)
        assert job_state.facts_of(None, None, None, None, None).lag == 2
        setattr(args, name, value)
        with pytest.raises(ConfigError, match=name.replace("_", "-")):
            job_state.facts_of(None, None, None, None, None)


def test_megatron_skipped_iterations_move_the_cursor(monkeypatch):
    args = SimpleNamespace(consumed_train_samples=8, micro_batch_size=1, global_batch_size=4, num_workers=0)
    monkeypatch.setattr(job_state, "_arguments", lambda: args)
    found = job_state.facts_of(None, None, None, None, None)
    args.consumed_train_samples = 20  # three iterations were skipped
    assert found.cursor_after(12) == 24


def test_megatron_ring_knows_what_is_not_there():
    ring = Ring(8)
    ring.write(0, np.arange(6) * 10)
    data = Scheduled([{"x": i} for i in range(200)], ring, 100)
    assert data[5] == {"x": 50} and len(data) == 100
    with pytest.raises(DataError, match="attach"):
        data[6]
    ring.write(6, np.arange(6, 14) * 10)
    assert [data[p]["x"] for p in range(6, 14)] == [10 * p for p in range(6, 14)]
    with pytest.raises(DataError, match="long after"):
        data[5]
