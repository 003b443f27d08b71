"""How the batch comes to the module."""

from __future__ import annotations

from typing import Any

import torch

from tests.multirank.forms.job import ROWS, SAMPLES, Job, Samples, trained
from tests.multirank.forms.registry import COUNTED, LEFT_OUT, form

CALLS = "How the batch comes to the module"


@form(CALLS, "by keyword")
def call_keyword() -> dict[str, Any]:
    return trained(lambda job, b: job.engine(input_ids=b["input_ids"]))


@form(CALLS, "cut into inputs and labels, as views")
def call_views() -> dict[str, Any]:
    return trained(lambda job, b: job.engine(b["input_ids"][:, :-1], labels=b["input_ids"][:, 1:]))


@form(CALLS, "cut into inputs and labels, as copies")
def call_copies() -> dict[str, Any]:
    return trained(lambda job, b: job.engine(b["input_ids"][:, :-1].clone(), labels=b["input_ids"][:, 1:].clone()))


@form(CALLS, "as a copy of the batch, as a move to a device makes one")
def call_moved() -> dict[str, Any]:
    return trained(lambda job, b: job.engine({name: value.clone() for name, value in b.items()}))


@form(CALLS, "in another integer type")
def call_converted() -> dict[str, Any]:
    return trained(lambda job, b: job.engine(b["input_ids"].to(torch.int32)))


@form(CALLS, "with tokens masked at random after the loader", COUNTED, "not recognised as the loader's")
def call_masked() -> dict[str, Any]:
    def forward(job: Job, batch: Any) -> torch.Tensor:
        tokens = batch["input_ids"].clone()
        tokens[:, 2:][torch.rand(tokens[:, 2:].shape) < 0.3] = 2
        return job.engine(tokens)

    return trained(forward)


@form(CALLS, "to `engine.module`, past the engine")
def call_module() -> dict[str, Any]:
    return trained(lambda job, b: job.engine.module(b))


@form(CALLS, "two batches ahead of training")
def call_lookahead() -> dict[str, Any]:
    job = Job()
    batches = job.batches()
    held = [next(batches), next(batches)]
    for _ in range(10):
        held.append(next(batches))
        job.engine.backward(job.engine(held.pop(0)))
        job.engine.step()
    return job.found()


@form(CALLS, "twice in a step, with one backward of the sum")
def call_twice() -> dict[str, Any]:
    return trained(lambda job, b: job.engine(b) + job.engine(b))


@form(CALLS, "after a look at it without gradients")
def call_after_a_look() -> dict[str, Any]:
    def forward(job: Job, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            job.engine(batch)
        return job.engine(batch)

    return trained(forward)


@form(CALLS, "a second time in a step of its own", LEFT_OUT)
def call_two_steps() -> dict[str, Any]:
    job = Job()
    batches = job.batches()
    for _ in range(6):
        batch = next(batches)
        for _ in range(2):
            job.engine.backward(job.engine(batch))
            job.engine.step()
    return job.found(expected=6 * job.controller.geometry.batch)


@form(CALLS, "beside batches of another source, in steps of their own", LEFT_OUT)
def call_rehearsal() -> dict[str, Any]:
    job, other = Job(), Samples(n=SAMPLES + 1)
    batches = job.batches()
    for k in range(8):
        rows = torch.stack([other[(ROWS * k + j) % SAMPLES]["input_ids"].flip(0) for j in range(ROWS)])
        for batch in (next(batches), {"input_ids": rows})[:: 1 if k % 2 else -1]:
            job.engine.backward(job.engine(batch))
            job.engine.step()
    return job.found(expected=8 * job.controller.geometry.batch)


@form(CALLS, "joined with rows of another source", COUNTED, "not recognised as the loader's")
def call_joined() -> dict[str, Any]:
    other = Samples(n=SAMPLES + 1)[5]["input_ids"]
    return trained(lambda job, b: job.engine(torch.cat([b["input_ids"], other[None]])))


@form(CALLS, "with one batch in four passed over", LEFT_OUT, "was not trained on")
def call_skips() -> dict[str, Any]:
    job = Job()
    batches = job.batches()
    for k in range(8):
        batch = next(batches)
        if k % 4 == 2:
            batch = next(batches)
        job.engine.backward(job.engine(batch))
        job.engine.step()
    return job.found(expected=10 * job.controller.geometry.batch)
