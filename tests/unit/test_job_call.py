"""What a probe makes of the job's own call: the same call with another batch, or a refusal, never a guess."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from grace_ds.comm.local import LocalComm
from grace_ds.config.schema import CollectConfig
from grace_ds.data.in_flight import IssuedBatch
from grace_ds.errors import ConfigError, DataError
from grace_ds.gradients.collector import GradientCollector
from grace_ds.gradients.hooks import Sketcher
from grace_ds.gradients.job_call import JobCall, refuse
from grace_ds.gradients.layers import select_layers
from grace_ds.gradients.passes import ModulePasses
from tests.unit.narrow import NAMES, Narrow

pytestmark = pytest.mark.timeout(60)

ROWS, LENGTH = 4, 6
Made = tuple[tuple[Any, ...], dict[str, Any]]


class Pair(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


class Encoding(UserDict[str, torch.Tensor]):
    """A batch of a kind of its own that moves as a whole, like transformers' BatchEncoding."""

    def to(self) -> Encoding:
        return Encoding({key: value.clone() for key, value in self.items()})


def tokens(seed: int, length: int = LENGTH, rows: int = ROWS) -> torch.Tensor:
    return torch.randint(0, 1000, (rows, length), generator=torch.Generator().manual_seed(seed))


def batch(seed: int, **more: Any) -> dict[str, Any]:
    ids = tokens(seed)
    return {"input_ids": ids, "mask": (ids % 3 > 0).long(), "labels": ids.masked_fill(ids % 5 == 0, -100), **more}


def learned(make: Callable[[Any], Made], *batches: Any) -> JobCall:
    call = JobCall()
    for b in batches:
        issued = IssuedBatch.of(np.arange(ROWS), 1, b)
        args, kwargs = make(b)
        call.learn(args, kwargs, issued)
    return call


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict | UserDict):
        return type(a) is type(b) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def moved(tree: Any) -> Any:
    """A copy, as a move to a device makes."""
    if isinstance(tree, torch.Tensor):
        return tree.clone()
    return {key: moved(value) for key, value in tree.items()}


CALLS: dict[str, tuple[Callable[[int], Any], Callable[[Any], Made]]] = {
    "whole": (batch, lambda b: ((b,), {})),
    "whole tensor": (tokens, lambda b: ((b,), {})),
    "whole, moved": (batch, lambda b: ((moved(b),), {})),
    "a kind of its own": (lambda s: Encoding(batch(s)), lambda b: ((b,), {})),
    "a kind of its own, moved": (lambda s: Encoding(batch(s)), lambda b: ((b.to(),), {})),
    "entries by keyword": (batch, lambda b: ((), {"input_ids": b["input_ids"], "y": b["labels"]})),
    "entries by keyword, moved": (batch, lambda b: ((), moved(b))),
    "entries by position, moved": (batch, lambda b: ((moved(b["input_ids"]), moved(b["labels"])), {})),
    "a pair": (lambda s: Pair(tokens(s), tokens(s + 9)), lambda b: ((b.a,), {"y": b.b})),
    "a list": (lambda s: [tokens(s), tokens(s + 9)], lambda b: ((b[1], b[0]), {})),
    "a new container": (batch, lambda b: (({"x": b["input_ids"], "more": [b["labels"]]},), {})),
    "nested": (lambda s: {"inner": batch(s)}, lambda b: ((b["inner"],), {})),
    "next tokens": (tokens, lambda b: ((b[:, :-1], b[:, 1:]), {})),
    "next tokens of an entry": (batch, lambda b: ((b["input_ids"][:, :-1],), {"targets": b["input_ids"][:, 1:]})),
    "next tokens, moved": (tokens, lambda b: ((moved(b[:, :-1]), moved(b[:, 1:])), {})),
    "moved, then cut": (tokens, lambda b: ((moved(b)[:, :-1], moved(b)[:, 1:]), {})),
    "the last few": (tokens, lambda b: ((b[:, -3:],), {})),
    "cut and contiguous": (tokens, lambda b: ((b[:, 1:-1].contiguous(),), {})),
    "cast": (lambda s: {"x": tokens(s).to(torch.int16)}, lambda b: ((b["x"].long(),), {})),
    "floats in half": (lambda s: {"x": tokens(s).float()}, lambda b: (({"x": b["x"].half()},), {})),
    "constants": (batch, lambda b: ((b["input_ids"], 0.5, None), {"mode": "train", "scale": torch.tensor(2.0)})),
    "a causal mask": (batch, lambda b: ((b["input_ids"],), {"mask": torch.ones(LENGTH, LENGTH).tril()})),
    "replaced after it was read": (batch, lambda b: ((b.pop("input_ids"),), {})),
}


@pytest.mark.parametrize("name", list(CALLS))
def test_a_call_is_repeated_with_another_batch(name: str) -> None:
    made, make = CALLS[name]
    call = learned(make, made(1), made(2))
    assert not call.obstacle() and call.known()
    wanted = make(made(77))
    args, kwargs = call.rebuild(made(77))
    assert same(args, wanted[0]) and same(kwargs, wanted[1])
    assert not same(args, make(made(1))[0]) or not same(kwargs, make(made(1))[1])


def in_place(b: dict[str, Any]) -> Made:
    b["input_ids"][:, 0] = 0
    return (b["input_ids"],), {}


def adds_labels(b: dict[str, Any]) -> Made:
    b["labels"] = b["input_ids"].masked_fill(b["input_ids"] % 7 == 0, -100)
    return (b,), {}


REFUSED: dict[str, tuple[Callable[[int], Any], Callable[[Any], Made], str]] = {
    "labels that the script makes": (
        batch,
        lambda b: ((b["input_ids"],), {"labels": b["input_ids"].masked_fill(b["input_ids"] % 7 == 0, -100)}),
        r"argument labels, a tensor of shape \(4, 6\) with a row for each sample",
    ),
    "the same rows for any batch": (batch, lambda b: ((b["input_ids"], torch.arange(LENGTH).expand(ROWS, -1)), {}), "argument 1"),
    "added to the batch": (lambda s: {"input_ids": tokens(s)}, adds_labels, r"argument 0\.labels"),
    "changed in place": (batch, in_place, "argument 0, a tensor"),
    "samples left out": (batch, lambda b: ((b["input_ids"][:2],), {}), "argument 0 changes from call to call"),
    "other order of axes": (batch, lambda b: ((b["input_ids"].t(),), {}), "argument 0 changes from call to call"),
    "a number of the batch": (batch, lambda b: ((b["input_ids"], int(b["input_ids"].sum())), {}), "argument 1 changes"),
    "a list of the samples' lengths": (
        batch,
        lambda b: ((b["input_ids"], [5, 5, 5, 5]), {}),
        "argument 1 is a list with an entry for",
    ),
    "all of it made anew": (batch, lambda b: ((b["input_ids"].roll(1, 1),), {}), "hold nothing of the batch"),
    "now so, now otherwise": (
        batch,
        lambda b: ((b["input_ids"],), {"labels": b["labels"]} if int(b["input_ids"][0, 0]) == int(tokens(1)[0, 0]) else {}),
        "more than one way",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_rebuilt_is_refused(name: str) -> None:
    made, make, says = REFUSED[name]
    call = learned(make, made(1), made(2))
    assert not call.known()
    with pytest.raises(ConfigError, match=says) as refused:
        refuse("grace", call.obstacle())
    assert "loss_fn=lambda module, batch" in str(refused.value) and "recipe: content" in str(refused.value)
    with pytest.raises(DataError, match="a probe cannot repeat the job's call"):
        call.rebuild(made(3))


def test_a_copy_is_proven_by_two_different_batches_and_a_view_by_one() -> None:
    for make in (lambda b: ((moved(b),), {}), lambda b: ((moved(b[:, 1:]),), {})):
        assert not learned(make, tokens(1)).known()
        assert not learned(make, tokens(1), tokens(1)).known()  # the job has shown the same batch twice
        assert learned(make, tokens(1), tokens(2)).known()
        assert learned(make, tokens(1)).known(proven=True)  # by an earlier process of the run
    assert learned(lambda b: ((b,), {}), tokens(1)).known()
    assert learned(lambda b: ((b[:, :-1], b[:, 1:]), {}), tokens(1)).known()


def test_entries_that_were_alike_so_far_must_be_alike_in_the_probe() -> None:
    """Two entries of equal values, moved and passed by position: which is which only matters where they differ."""
    call = learned(lambda b: ((moved(b["a"]),), {}), *({"a": tokens(s), "b": tokens(s)} for s in (1, 2)))
    assert same(call.rebuild({"a": tokens(3), "b": tokens(3)})[0], (tokens(3),))
    with pytest.raises(DataError, match="argument 0 of the job's call may be entry a or entry b, .*loss_fn"):
        call.rebuild({"a": tokens(3), "b": tokens(4)})


def test_a_mask_of_ones_may_be_the_jobs_own() -> None:
    def ones(s: int) -> dict[str, Any]:
        return {"input_ids": tokens(s), "mask": torch.ones(ROWS, LENGTH)}

    padded = {"input_ids": tokens(3, rows=2), "mask": torch.zeros(2, LENGTH)}
    by_position = learned(lambda b: ((b["input_ids"], moved(b["mask"])), {}), ones(1), ones(2))
    assert same(by_position.rebuild({**padded, "mask": torch.ones(2, LENGTH)})[0][1], torch.ones(2, LENGTH))
    with pytest.raises(DataError, match="may be entry mask or a constant"):
        by_position.rebuild(padded)
    by_name = learned(lambda b: ((b["input_ids"],), {"mask": moved(b["mask"])}), ones(1), ones(2))
    assert same(by_name.rebuild(padded)[1]["mask"], padded["mask"])


def test_a_cut_is_told_from_another_by_batches_of_two_lengths() -> None:
    def make(b: torch.Tensor) -> Made:
        return (b[:, :-1],), {}

    with pytest.raises(DataError, match=r"may be entry \(the batch\)\[:, 0:-1\] or entry \(the batch\)\[:, 0:5\]"):
        learned(make, tokens(1), tokens(2)).rebuild(tokens(3, 9))
    assert same(learned(make, tokens(1), tokens(2, 8)).rebuild(tokens(3, 9))[0], (tokens(3, 9)[:, :-1],))


def test_a_batch_without_what_the_call_takes_says_so() -> None:
    call = learned(lambda b: ((b["labels"],), {}), batch(1), batch(2))
    with pytest.raises(DataError, match="no entry labels"):
        call.rebuild({"input_ids": tokens(3)})
    with pytest.raises(DataError, match=r"entry labels of a probed batch is \(4,\), 2 axes"):
        call.rebuild({"labels": torch.zeros(4)})


def test_a_forward_of_other_data_is_passed_over() -> None:
    call = learned(lambda b: ((b["input_ids"],), {}), batch(1))
    call.learn((tokens(8),), {}, IssuedBatch.of(np.arange(ROWS), 1, batch(2)))
    assert call.seen == 1 and not call.obstacle() and call.known()


def test_an_output_without_a_loss_is_refused() -> None:
    call = learned(lambda b: ((b,), {}), tokens(1))
    call.returned({"loss": torch.tensor(1.0)})
    assert not call.obstacle()
    call.returned(torch.zeros(3))
    assert "output (Tensor) holds no scalar loss" in call.obstacle()


def test_the_ranks_are_asked_ever_more_rarely_and_before_each_refresh() -> None:
    model, device = Narrow(), torch.device("cpu")
    collector = GradientCollector(Sketcher(select_layers(model, NAMES), 7, rank=16, dim=64), CollectConfig())
    passes = ModulePasses(model, collector, list, 4, device, None, LocalComm(5.0))
    assert [step for step in range(1, 20) if passes.asks(refresh=step == 13)] == [1, 2, 4, 8, 13, 16]


@pytest.mark.parametrize("rank", range(4))
def test_a_ranks_share_of_the_sequence_is_cut_from_another_batch_too(rank: int) -> None:
    """As a copy on the rank's own device; labels are one token ahead."""
    width, length = 24, 97

    def make(b: torch.Tensor) -> Made:
        start = rank * width
        share = b[:, start : start + width].clone(), b[:, start + 1 : start + width + 1].clone()
        return share, {"start": start}

    call, other = learned(make, tokens(1, length), tokens(2, length)), tokens(3, length)
    assert call.known() and same(call.rebuild(other), make(other))
