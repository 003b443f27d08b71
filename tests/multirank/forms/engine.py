"""How the engine is made and used."""

from __future__ import annotations

from typing import Any

import torch

from tests.multirank.forms.job import ROWS, Job, Net, Samples, trained
from tests.multirank.forms.registry import REFUSED, form

ENGINES = "The engine"


@form(ENGINES, "ZeRO 1")
def engine_zero1() -> dict[str, Any]:
    return trained(stage=1)


@form(ENGINES, "ZeRO 2")
def engine_zero2() -> dict[str, Any]:
    return trained(stage=2)


@form(ENGINES, "ZeRO 3")
def engine_zero3() -> dict[str, Any]:
    return trained(stage=3)


@form(ENGINES, "bf16")
def engine_bf16() -> dict[str, Any]:
    return trained(bf16={"enabled": True})


@form(ENGINES, "accumulation over 3 micro-batches")
def engine_accumulation() -> dict[str, Any]:
    return trained(accumulation=3)


@form(ENGINES, "activation checkpointing")
def engine_checkpointing() -> dict[str, Any]:
    return trained(model=Net(again=True))


@form(ENGINES, "`engine.compile()`")
def engine_compiled() -> dict[str, Any]:
    job = Job()
    job.engine.compile(backend="eager")
    job.train(10)
    return job.found()


@form(ENGINES, "a module from `torch.compile`")
def engine_of_compiled() -> dict[str, Any]:
    return trained(model=torch.compile(Net(), backend="eager"))  # type: ignore[arg-type]


@form(ENGINES, "`module.compile()`")
def engine_compiled_in_place() -> dict[str, Any]:
    model = Net()
    model.compile(backend="eager")
    return trained(model=model)


@form(ENGINES, "two at once, each with GRACE")
def engine_two() -> dict[str, Any]:
    first, second = Job(), Job(data=Samples(n=90))
    a, b = first.batches(), second.batches()
    for _ in range(9):
        for job, batches in ((first, a), (second, b)):
            job.engine.backward(job.engine(next(batches)))
            job.engine.step()
    other = second.found()
    return first.found(other=other)


@form(ENGINES, "destroyed and made anew")
def engine_anew() -> dict[str, Any]:
    job = Job()
    job.train(5)
    job.engine.grace_ds.detach()
    job.engine.destroy()
    return trained()


@form(ENGINES, "evaluation between the steps")
def engine_evaluation() -> dict[str, Any]:
    job, held = Job(), Samples(n=40)
    for _ in range(5):
        job.train(2)
        job.engine.eval()
        with torch.no_grad():
            job.engine(torch.stack([held[j]["input_ids"] for j in range(ROWS)]))
        job.engine.train()
    return job.found()


@form(ENGINES, "a batch that is ramped up (`set_train_batch_size`)")
def engine_ramp() -> dict[str, Any]:
    job = Job()
    ranks = job.controller.geometry.ranks
    job.train(4)
    job.engine.set_train_batch_size(3 * ROWS * ranks)
    job.train(6)  # the first of them ends where three divides the micro-batches so far
    return job.found(expected=(4 + 2 + 3 * 5) * ROWS * ranks)


@form(ENGINES, "a micro-batch that is changed in the middle", REFUSED, "set_train_batch_size")
def engine_micro() -> dict[str, Any]:
    job = Job()
    job.train(3)
    ranks = job.controller.geometry.ranks
    job.engine._config.train_micro_batch_size_per_gpu *= 2
    job.engine._config.train_batch_size = 2 * ROWS * ranks
    try:
        job.train(2)
    finally:
        job.engine.grace_ds.detach()
    return {}
