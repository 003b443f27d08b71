"""A Megatron job fed by the schedule: what is consumed, resumed, run again, read too far ahead."""

from __future__ import annotations

import threading
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

pytest.importorskip("megatron.core", reason="megatron-core is not installed (pip install grace_ds[megatron])")

from grace_ds.data.sampler import Geometry
from grace_ds.errors import ConfigError, DataError
from grace_ds.integrations.megatron import job_state, positions
from grace_ds.integrations.megatron.corpus import Texts, one_epoch
from grace_ds.integrations.megatron.cyclic import CyclicPositions
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


@pytest.mark.parametrize("name", ["none", "workers", "before", "after", "rerun", "blend", "rolling", "rolled"])
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


def test_megatron_resumes_a_window_that_moves(ranks):
    """What a sample's copies were is that of the window it entered: a resumed run must not see them anew."""
    assert ranks[0]["rolling"]["window"] < ranks[0]["rolling"]["samples"]
    assert stream(ranks, "rolled") == stream(ranks, "rolling")[10:]
    for rank in ranks:
        assert rank["rolled"]["content"] == rank["rolling"]["content"] and len(set(rank["rolled"]["content"][1])) > 3


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


def test_megatron_each_dataset_of_a_blend_has_its_share_of_a_coreset(ranks):
    for sources in ranks[0]["blend"]["sources"]:
        window, coreset = np.array(sources["window"]), np.array(sources["coreset"])
        assert sources["names"] == [0, 1] and np.abs(coreset / window - 0.5).max() < 0.01


def test_megatron_interleaved_stages_read_one_schedule(ranks):
    """The first stage's data workers are started before the last stage is there, and wait."""
    first, last = (rank["interleaved"] for rank in ranks)
    assert first["holds"] == [True, False] and last["holds"] == [False, True]
    assert first["read"] == last["read"] == first["scheduled"]
    assert first["early"] == last["early"] and "2 virtual stages, and 1 of them" in first["early"]
    assert len(first["read"]) == INTERVAL * BATCH


def test_megatron_shadow_leaves_the_dataset_alone(ranks):
    assert ranks[0]["shadow"]


def test_megatron_refusals_say_why(ranks):
    for rank in ranks:
        said = rank["refused"]
        assert "lag 1 is too short" in said["lag"] and "lag=2" in said["lag"]
        assert "not published that far" in said["ahead"] and "larger lag" in said["ahead"]
        assert "was made with the dataset" in said["hash"] and "fresh run_dir" in said["hash"]
        assert "attach(model) before grace_ds.megatron.wrap" in said["grace"] and "recipe: content" in said["grace"]
        assert "holds no schedule of this run" in said["missing"]
        assert "between two steps" in said["between"]
        assert said["left in /dev/shm"] == ""


def test_megatron_arguments_that_cannot_be_served(monkeypatch):
    cases = {"dataloader_type": "external", "phase_transition_iterations": [5]}
    for name, value in (cases | {"hybrid_context_parallel": True}).items():
        args = SimpleNamespace(
            consumed_train_samples=0, micro_batch_size=1, global_batch_size=4, num_workers=2, dataloader_type="single"
        )
        monkeypatch.setattr(job_state, "arguments", lambda args=args: args)
        assert job_state.facts_of(None, None, None, None, None).lag == 2
        setattr(args, name, value)
        with pytest.raises(ConfigError, match=name.replace("_", "-")):
            job_state.facts_of(None, None, None, None, None)


def test_megatron_skipped_iterations_move_the_cursor(monkeypatch):
    args = SimpleNamespace(consumed_train_samples=8, micro_batch_size=1, global_batch_size=4, num_workers=0)
    monkeypatch.setattr(job_state, "arguments", lambda: args)
    found = job_state.facts_of(None, None, None, None, None)
    args.consumed_train_samples = 20  # three iterations were skipped
    assert (found.cursor_before(8), found.cursor_after(8)) == (20, 24)


@pytest.mark.parametrize(("skipped", "due", "end"), [([], 6, 24), ([5], 6, 28), ([4, 5, 6], 5, 32), ([9], 6, 24), ([2], 2, 16)])
def test_megatron_next_refresh_follows_the_first_step_that_is_not_skipped(monkeypatch, skipped, due, end):
    """Of 4 samples an iteration; after iteration 1, so that 8 samples are consumed."""
    args = SimpleNamespace(consumed_train_samples=4, micro_batch_size=1, global_batch_size=4, num_workers=0)
    args.iterations_to_skip, args.curr_iteration = skipped, 1
    monkeypatch.setattr(job_state, "arguments", lambda: args)
    assert job_state.facts_of(None, None, None, None, None).next_end(8, due * 4) == end


def test_megatron_longest_gap_is_the_longest_run_of_skipped_iterations(monkeypatch):
    args = SimpleNamespace(consumed_train_samples=0, micro_batch_size=1, global_batch_size=4, num_workers=0)
    for skipped, longest in (([], 0), ([7], 1), ([9, 3, 4, 5, 10], 3)):
        args.iterations_to_skip = skipped
        monkeypatch.setattr(job_state, "arguments", lambda: args)
        assert job_state.facts_of(None, None, None, None, None).longest_gap == longest


def test_megatron_ramp_ends_where_its_own_calculator_says(monkeypatch):
    """2, 4, 6, 8 samples a step, each for 8 samples: steps end at 2, 4, 6, 8, 12, 16, 22, 28, 36, …"""
    from megatron.core import num_microbatches_calculator as calculator

    calculator.init_num_microbatches_calculator(0, [2, 2, 24], 8, 1, 2, False)
    try:
        args = SimpleNamespace(consumed_train_samples=6, micro_batch_size=1, global_batch_size=8, num_workers=0)
        args.rampup_batch_size, args.iteration, args.iterations_to_skip = [2, 2, 24], 3, [6]
        monkeypatch.setattr(job_state, "arguments", lambda: args)
        monkeypatch.setattr(job_state, "_data_parallel", lambda: (2, 0))
        found = job_state.facts_of(None, None, None, None, None)
        calculator.update_num_microbatches(6)
        assert found.cursor_after(-1) == 8
        assert [found.next_end(6, due, started=False) for due in (0, 8, 9, 16, 17, 22, 29)] == [8, 8, 12, 16, 28, 28, 36]
        args.consumed_train_samples = 7
        with pytest.raises(ConfigError, match="between two steps"):
            job_state.facts_of(None, None, None, None, None)
    finally:
        calculator.unset_num_microbatches_calculator()
    with pytest.raises(ConfigError, match="rampup-batch-size cannot be followed"):
        job_state.facts_of(None, None, None, None, None)


@pytest.mark.parametrize("sharded", [True, False])
def test_megatron_cyclic_positions_are_each_asked_for_once(sharded):
    places = [CyclicPositions(53, Geometry(2, rank, 3, 2), sharded, 48) for rank in range(2)]
    indices = range(48) if sharded else range(51)
    found = [places[0](index) for index in indices]
    assert found == [places[1](index) for index in indices]  # a rank reads its own only, by one mapping for all
    assert sorted(found)[:48] == list(range(48)) and found != sorted(found)
    with pytest.raises(ConfigError, match="2 times over a dataset of 53"):
        CyclicPositions(53, Geometry(2, 0, 3, 2), sharded, 60)


def test_megatron_reader_waits_for_the_first_schedule(monkeypatch):
    ring = Ring(8)
    thread = threading.Timer(0.2, ring.write, (0, np.arange(4)))
    thread.start()
    assert ring.read(3) == 3
    thread.join()
    monkeypatch.setattr(positions, "_PATIENCE", 0.05)
    with pytest.raises(DataError, match="each virtual pipeline stage"):
        Ring(8).read(0)


class Conversations(Dataset):
    """As long as it is told to be, like Megatron-LM's dataset for --sft; rows are padded."""

    unique_description_hash = "c"

    def __init__(self, dataset, dataset_path, indices, num_samples, index_split, config):
        self.dataset, self.dataset_path, self.indices = dataset, dataset_path, indices
        self.num_samples, self.index_split, self.config = num_samples, index_split, config

    def __len__(self):
        return self.num_samples

    def __getitem__(self, i):
        text = self.dataset[self.indices[i % len(self.indices)]]
        return {"tokens": torch.tensor([*text, *[9] * (8 - len(text))]), "cu_seqlens": torch.tensor([0, 8])}


def test_megatron_conversations_are_each_once_in_the_corpus_and_without_their_padding():
    rows = [[1, 2, 3], [4, 9, 5, 6, 9], [7] * 8, [9, 9]]
    corpus = one_epoch(Conversations(rows, None, np.array([3, 1, 0, 2]), 100, "train", None), True, lambda: None)
    assert len(corpus) == 4
    assert [Texts(corpus)[i]["input_ids"].tolist() for i in range(4)] == [[9], [4, 9, 5, 6, 9], [1, 2, 3, 9], [7]]


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
