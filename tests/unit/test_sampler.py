"""Ids that travel, batches and the recognition of the batch that a forward is about."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from grace_ds.data.dataset import IdCollate, IdDataset, IdLoader
from grace_ds.data.in_flight import InFlightBatches
from grace_ds.data.sampler import Geometry, StreamSampler
from grace_ds.data.schedule import ScheduleBook
from grace_ds.errors import DataError
from grace_ds.records import Role, Schedule


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
) -> tuple[IdLoader, StreamSampler, InFlightBatches]:
    g = Geometry(ranks, rank, rows, 2)
    sampler = StreamSampler(book_of(100), g, 100 // g.micro, 100 // ranks)
    out = InFlightBatches(g)
    inner: Any = DataLoader(
        IdDataset(data or Numbers()),
        batch_size=rows,
        sampler=sampler,
        num_workers=workers,
        collate_fn=IdCollate(collate),
    )
    return IdLoader(inner, out), sampler, out


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


def test_an_epoch_is_issued_whole_and_the_count_of_what_was_issued_begins_where_training_stands() -> None:
    loader, sampler, _ = make_loader()
    ids = [i for batch in loader for i in batch[:, 0].tolist()]
    assert ids == book_of(100).slots(0, 100).ids.tolist() and sampler.issued == 25
    for frontier in (0, 3):
        sampler.frontier = frontier
        iterator = iter(loader)
        for count in (1, 2):
            assert next(iterator)[:, 0].tolist() == book_of(100).slots(4 * (frontier + count - 1), 4).ids.tolist()
            assert sampler.issued == frontier + count


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


class Masked(Numbers):
    """Items with a mask that is the same for all of them, positions, and a number of their own."""

    def __getitem__(self, index: int) -> Any:
        return {"x": 10 * index + torch.arange(5), "mask": torch.ones(5, dtype=torch.int64), "position": torch.arange(5)}


def test_batches_of_another_source_are_not_taken_for_one_that_is_out() -> None:
    loader, _, out = make_loader(data=Masked(), collate=None)
    it = iter(loader)
    for out_at_once in (1, 2):  # also where only one could be meant
        own = next(it)
        other = {"x": own["x"] + 7, "mask": own["mask"].clone(), "position": own["position"].clone()}
        assert out.match(other) is None
        assert (out.unrecognised, out.recognised) == (out_at_once, False)
    issued = out.match({name: value.clone() for name, value in own.items()})
    assert issued is not None and list(10 * issued.ids) == own["x"][:, 0].tolist() and out.recognised


def test_cut_flattened_and_converted_copies_are_recognised() -> None:
    loader, _, out = make_loader(data=Masked())
    it = iter(loader)
    first, _ = next(it), next(it)
    x = first["x"]
    for changed in (x[:, :-1].clone(), x[:, 1:].clone(), x.reshape(-1).clone(), x.to(torch.int32), x[:, 1:4].clone()):
        issued = out.match([changed])
        assert issued is not None and list(10 * issued.ids) == x[:, 0].tolist()
    for foreign in (x[:2].clone(), x.T.clone(), x.float(), x[:, :-1] + 3):
        assert out.match([foreign]) is None


def test_a_tensor_that_all_batches_share_tells_none_of_them() -> None:
    shared = torch.arange(20).reshape(4, 5)
    loader, _, out = make_loader(collate=lambda items: {"x": torch.stack(items), "shared": shared})
    it = iter(loader)
    first, second = next(it), next(it)
    for own in (first, second):
        issued = out.match(own)
        assert issued is not None and list(issued.ids) == own["x"][:, 0].tolist()
    assert out.match({"shared": shared, "x": torch.rand(4, 2)}) is None


def test_trained_batches_are_out_no_more() -> None:
    loader, _, out = make_loader()
    batch = next(iter(loader))
    issued = out.match(batch)
    assert issued is not None
    out.trained(issued)
    assert out.match(batch) is None


def test_iterable_datasets_are_refused() -> None:
    with pytest.raises(DataError, match="list_iterator"):
        IdDataset(iter([1, 2]))


def test_asking_a_filtering_collate_about_single_samples_draws_nothing_of_the_jobs() -> None:
    def collate(items: list[int]) -> torch.Tensor:
        torch.rand(3)  # an augmentation, say
        return torch.tensor([[item] for item in items if item % 2])

    items = [(position, sample, sample) for position, sample in enumerate((4, 7, 9))]
    torch.manual_seed(5)
    collate([sample for _, _, sample in items])
    expected = torch.rand(1)
    torch.manual_seed(5)
    _, ids, _ = IdCollate(collate)(items)
    assert ids.tolist() == [7, 9] and torch.equal(torch.rand(1), expected)


def test_a_ranks_share_of_the_columns_is_recognised_and_of_another_batch_not() -> None:
    flight = InFlightBatches(Geometry(1, 0, 4, 1))
    batches = [torch.arange(4 * 97).reshape(4, 97) * factor for factor in (3, 5)]
    for number, batch in enumerate(batches):
        flight.issue(torch.arange(4) + 4 * number, torch.arange(4) + 4 * number, batch)
    for rank, shift in itertools.product(range(4), (0, 1)):
        start = 24 * rank + shift
        for number, batch in enumerate(batches):
            found = flight.match((batch[:, start : start + 24].clone(),))
            assert found is not None and found.ids[0] == 4 * number
    assert flight.match((batches[0][:, 12:36].clone() + 1,)) is None
