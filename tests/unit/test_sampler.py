"""Tickets, batches and the recognition of the batch that a forward is about."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from grace_ds.errors import DataError
from grace_ds.records import Role, Schedule
from grace_ds.sampler import Geometry, Outstanding, StreamSampler, TicketedCollate, TicketedDataset, TicketedLoader
from grace_ds.schedule import ScheduleBook


class Numbers(Dataset[torch.Tensor]):
    """Item i holds i in every place."""

    def __init__(self, n: int = 100) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.full((4,), i)


class Batched(Numbers):
    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return [torch.full((4,), i) for i in indices]


def drop_odd(items: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([x for x in items if int(x[0]) % 2 == 0])


def pad_twice(items: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([*items, *items])


def book_of(n: int) -> ScheduleBook:
    ids = np.random.default_rng(0).permutation(n).astype(np.int64)
    return ScheduleBook([Schedule(0, 0, ids, np.full(n, Role.CORE, np.uint8), np.ones(n, np.float32), 0)])


def make_loader(
    rank: int = 0, ranks: int = 1, workers: int = 0, collate: Any = None, data: Any = None, rows: int = 4
) -> tuple[TicketedLoader, StreamSampler, Outstanding]:
    g = Geometry(ranks, rank, rows, 2)
    sampler = StreamSampler(book_of(100), g, 100 // g.micro, 100 // ranks)
    out = Outstanding(g)
    inner: Any = DataLoader(
        TicketedDataset(data or Numbers()),
        batch_size=rows,
        sampler=sampler,
        num_workers=workers,
        collate_fn=TicketedCollate(collate),
    )
    return TicketedLoader(inner, out), sampler, out


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("data", [Numbers(), Batched()])
def test_ids_are_those_of_the_rows(workers: int, data: Any) -> None:
    loader, _, out = make_loader(workers=workers, data=data)
    for batch in loader:
        issued = out.match(batch)
        assert issued is not None
        assert list(batch[:, 0]) == list(issued.ids)


def test_ranks_share_the_stream_in_order() -> None:
    loaders = [make_loader(rank=r, ranks=2)[0] for r in range(2)]
    stream = [x for pair in zip(*loaders, strict=True) for batch in pair for x in batch[:, 0].tolist()]
    assert stream == list(book_of(100).slots(0, len(stream)).ids)


def test_length_is_the_jobs() -> None:
    loader, _, _ = make_loader(ranks=2)
    assert len(loader) == 13
    assert loader.batch_size == 4


def test_a_new_iterator_issues_again_what_was_not_trained_on() -> None:
    loader, sampler, out = make_loader(workers=2)
    first = next(iter(loader))  # a peek
    again = iter(loader)
    assert torch.equal(next(again), first)
    issued = out.match(first)
    assert issued is not None
    sampler.frontier = issued.end
    assert sampler.issued > 1  # the workers were given more
    assert not torch.equal(next(iter(loader)), first)


def test_filtering_collate_keeps_the_right_ids() -> None:
    loader, _, out = make_loader(collate=drop_odd)
    for batch in loader:
        issued = out.match(batch)
        assert issued is not None
        assert list(issued.ids) == batch[:, 0].tolist()
        assert (issued.ids % 2 == 0).all()


def test_unaccountable_collate_gives_no_ids(caplog: pytest.LogCaptureFixture) -> None:
    loader, _, out = make_loader(collate=pad_twice)
    batch = next(iter(loader))
    issued = out.match(batch)
    assert issued is not None
    assert (issued.ids == -1).all()
    assert "cannot tell which" in caplog.text


def test_a_peeked_batch_is_not_the_one_trained_on() -> None:
    loader, _, out = make_loader()
    it = iter(loader)
    peeked, used = next(it), next(it)
    issued = out.match({"x": used[:, :-1]})  # a view, as language models take it
    assert issued is not None
    assert list(issued.ids) == used[:, 0].tolist() != peeked[:, 0].tolist()


def test_moved_batches_are_recognised_by_content() -> None:
    loader, _, out = make_loader()
    it = iter(loader)
    first, _ = next(it), next(it)
    issued = out.match((first.clone(),))
    assert issued is not None
    assert list(issued.ids) == first[:, 0].tolist()


def test_trained_batches_are_out_no_more() -> None:
    loader, _, out = make_loader()
    batch = next(iter(loader))
    issued = out.match(batch)
    assert issued is not None
    out.trained(issued)
    assert out.match(batch) is None


def test_iterable_datasets_are_refused() -> None:
    with pytest.raises(DataError, match="list_iterator"):
        TicketedDataset(iter([1, 2]))
