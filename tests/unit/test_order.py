"""The job's own order, against the samplers that it is said to be of."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch.utils.data import DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from grace_ds.data import order
from grace_ds.data.order import Permutation, SamplerOrder, SeededOrder, order_of
from grace_ds.errors import ConfigError, DataError
from grace_ds.integrations.deepspeed import attach
from tests.extras import needs

N, ROWS = 96, 4


class Items:
    def __len__(self) -> int:
        return N


def epochs(n: int, count: int) -> np.ndarray:
    return np.arange(n * count, dtype=np.int64)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_micro_batch_holds_what_distributed_samplers_give_the_ranks(ranks: int, shuffle: bool) -> None:
    samplers = [DistributedSampler(Items(), ranks, rank, shuffle=shuffle, seed=7) for rank in range(ranks)]
    ours = order_of(samplers[-1], N, seed=1)
    assert ours is not None
    for epoch in (0, 1):
        given = []
        for sampler in samplers:
            sampler.set_epoch(epoch)
            given.append(list(sampler))
        ids = ours(epoch * N + np.arange(N))
        micro = ROWS * ranks
        for q in range(N // micro):
            theirs = [i for rank in given for i in rank[q * ROWS : (q + 1) * ROWS]]
            assert sorted(theirs) == np.sort(ids[q * micro : (q + 1) * micro]).tolist()
        if ranks == 1:
            assert ids.tolist() == given[0]


def test_accelerates_seeded_sampler_is_known_epoch_by_epoch() -> None:
    needs("huggingface", "accelerate")
    from accelerate.data_loader import SeedableRandomSampler

    sampler = SeedableRandomSampler(Items(), data_seed=11, generator=torch.Generator())
    ours = order_of(sampler, N, seed=1)
    assert ours is not None
    assert ours(epochs(N, 2)).tolist() == [*sampler, *sampler]  # it sets its next epoch itself


def test_a_sequential_sampler_leaves_the_corpus_as_it_stands() -> None:
    ours = order_of(SequentialSampler(Items()), N, seed=1)
    assert ours is not None
    assert ours(epochs(N, 2)).tolist() == [*range(N), *range(N)]


@pytest.mark.parametrize("sampler", [None, RandomSampler(Items()), iter([1, 2])])
def test_what_draws_from_a_state_has_no_order_by_position(sampler: object) -> None:
    assert order_of(sampler, N, seed=1) is None


@pytest.mark.parametrize("made", [SamplerOrder(N, 3), SeededOrder(N, 3)])
def test_an_epoch_is_every_sample_once_and_the_next_another_order(made: order.Order) -> None:
    first, second = made(epochs(N, 2)).reshape(2, N)
    assert sorted(first) == sorted(second) == list(range(N))
    assert (first != second).mean() > 0.5
    some = np.array([5, N - 1, N, 2 * N - 1])
    assert made(some).tolist() == np.concatenate([first, second])[some].tolist()  # by position, however it is cut


def test_a_corpus_whose_order_would_not_fit_gets_one_in_constant_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "MOST", N - 1)
    made = order_of(DistributedSampler(Items(), 1, 0), N, seed=5)
    assert isinstance(made, SeededOrder)
    assert made(np.arange(N)).tolist() == Permutation(N, 5)(np.arange(N)).tolist()


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield 1


def test_attach_says_what_cannot_be_used_before_it_asks_for_a_length() -> None:
    engine = DeepSpeedEngine.__new__(DeepSpeedEngine)  # not looked at any further
    torch.nn.Module.__init__(engine)
    with pytest.raises(DataError, match="cannot be started again"):
        attach(engine, iter(Stream()), {"recipe": "content"})
    with pytest.raises(ConfigError, match="SequentialSampler cannot draw from an iterable dataset"):
        attach(engine, Stream(), {"recipe": "content"}, sampler=SequentialSampler(Items()))
