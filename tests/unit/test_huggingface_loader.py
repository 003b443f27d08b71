"""The Trainer's loader with ids: what travels in a batch, and what is dropped and never read after a resume."""

from __future__ import annotations

import importlib
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from grace_ds.data.sampler import Geometry, StreamSampler
from grace_ds.data.schedule import ScheduleBook
from grace_ds.errors import DataError, GraceError
from grace_ds.integrations.huggingface.loader import KEY, ScheduleBatches, TrainerCollate, TrainerDataset, take_ids
from grace_ds.records import Role, Schedule
from tests.extras import needs

N = 24


def rows() -> list[dict[str, torch.Tensor]]:
    return [{"x": torch.tensor([i])} for i in range(N)]


def book() -> ScheduleBook:
    out = ScheduleBook()
    ids = np.arange(N)[::-1].copy()
    roles = np.full(N, int(Role.CORE), np.uint8)
    out.publish(Schedule(version=0, start=0, ids=ids, weights=np.ones(N, np.float32), roles=roles, seed=1))
    return out


def batches(geometry: Geometry, frontier: int = 0, skipped: int = 0) -> ScheduleBatches:
    per_rank = N // geometry.micro
    out = ScheduleBatches(BatchSampler(SequentialSampler(range(per_rank * geometry.rows)), geometry.rows, False))
    out.stream = StreamSampler(book(), geometry, per_rank, N)
    out.stream.frontier, out.skipped = frontier, skipped
    return out


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_carries_its_ids_through_a_loader(workers: int) -> None:
    sampler = batches(Geometry(ranks=2, rank=1, rows=3, accumulation=1))
    loader = DataLoader(
        TrainerDataset(rows()),
        batch_sampler=sampler,
        collate_fn=TrainerCollate(torch.utils.data.default_collate),
        num_workers=workers,
    )
    assert len(loader) == 4
    for q, batch in enumerate(loader):
        assert batch["x"].flatten().tolist() == [N - 1 - (6 * q + 3 + row) for row in range(3)]
        found = take_ids(batch)
        assert found is not None
        assert int(found[0]) == 6 * q + 3
        assert found[1].tolist() == batch["x"].flatten().tolist()
        assert set(batch) == {"x"}
        assert take_ids(batch) is None


def test_before_there_is_an_engine_the_order_is_the_jobs_own() -> None:
    sampler = batches(Geometry(1, 0, 4, 1))
    sampler.stream = None
    loader = DataLoader(
        TrainerDataset(rows()), batch_sampler=sampler, collate_fn=TrainerCollate(torch.utils.data.default_collate)
    )
    seen: list[Any] = [(int(b["x"][0]), b[KEY].first) for b in loader]
    assert seen == [(4 * q, -1) for q in range(6)]


def test_what_the_trainer_drops_after_a_resume_is_never_read_and_the_rest_begins_where_training_stood() -> None:
    sampler = batches(Geometry(1, 0, 4, 1), frontier=2, skipped=2)
    given = list(sampler)
    assert len(given) == len(sampler) == 6
    data = TrainerDataset(rows())
    for dropped in given[:2]:
        with pytest.raises(GraceError, match="ignore_data_skip"):
            data[dropped[0]]
    assert [batch[0] for batch in given[2:]] == [(8 + 4 * q, N - 1 - (8 + 4 * q) % N) for q in range(4)]
    assert next(iter(sampler))[0] == (8, N - 1 - 8)  # an epoch later nothing is dropped


def test_ids_survive_what_happens_to_a_batch_on_its_way() -> None:
    needs("huggingface", "transformers", "accelerate")
    transformers, operations = (importlib.import_module(name) for name in ("transformers", "accelerate.utils.operations"))
    batch = transformers.BatchEncoding({"input_ids": torch.arange(6).reshape(2, 3)})
    collated = TrainerCollate(lambda _: batch)([(4, 7, None), (5, 9, None)])
    for moved in (collated, pickle.loads(pickle.dumps(collated)), operations.send_to_device(collated, "cpu")):
        found = take_ids(type(moved)(moved))
        assert found is not None
        assert (int(found[0]), found[1].tolist()) == (4, [7, 9])


def test_a_batch_that_is_no_dict_is_refused() -> None:
    with pytest.raises(DataError, match="data_collator returned a Tensor"):
        TrainerCollate(lambda items: torch.zeros(len(items)))([(0, 0, None)])
