"""What the trusted set is like, and how it is probed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.multirank.forms.job import VOCAB, Job, Samples
from tests.multirank.forms.registry import LEFT_OUT, REFUSED, form

TRUSTED = "The trusted set"


def probed(forward: Callable[[Job, Any], Any] | None = None, **how: Any) -> dict[str, Any]:
    """A job with trusted samples, whose influences are measured by probes; as found, with the probes that were made."""
    job = Job(trusted=how.pop("trusted", None) or Samples(n=24), **how)
    job.train(14, None if forward is None else lambda batch: forward(job, batch))
    made = job.engine.grace_ds.metrics["probe_samples"]
    recipe = job.engine.grace_ds.config.recipe
    return job.found(probes=made, recipe=recipe)


@form(TRUSTED, "the module is called with the batch as it is")
def trusted_whole() -> dict[str, Any]:
    return probed()


@form(TRUSTED, "the module is called with cuts of the batch: a probe makes the same cuts")
def trusted_cut() -> dict[str, Any]:
    return probed(lambda job, b: job.engine(b["input_ids"][:, :-1], labels=b["input_ids"][:, 1:]))


@form(TRUSTED, "the module is called with something made of the batch, and `recipe: grace` is asked for", REFUSED, "loss_fn")
def trusted_made() -> dict[str, Any]:
    return probed(lambda job, b: job.engine(b["input_ids"], labels=(b["input_ids"] + 1) % VOCAB))


@form(TRUSTED, "the same with `recipe: auto`: it goes on as `content`", LEFT_OUT, "goes on as content")
def trusted_made_auto() -> dict[str, Any]:
    return probed(lambda job, b: job.engine(b["input_ids"], labels=(b["input_ids"] + 1) % VOCAB), grace={"recipe": "auto"})


@form(TRUSTED, "the same with a `loss_fn`")
def trusted_loss_fn() -> dict[str, Any]:
    def loss_fn(module: nn.Module, b: Any) -> torch.Tensor:
        loss: torch.Tensor = module(b["input_ids"], labels=(b["input_ids"] + 1) % VOCAB)
        return loss

    return probed(lambda job, b: loss_fn(job.engine, b), loss_fn=loss_fn)


@form(TRUSTED, "a token that the model has no embedding for, under ZeRO 3", REFUSED, "embedding")
def trusted_stray_token() -> dict[str, Any]:
    bad = Samples(n=24)
    bad.tokens[5, 7] = VOCAB + 7
    return probed(trusted=bad, stage=3)


@form(TRUSTED, "lengths that the collate function cannot join", REFUSED, "cannot join")
def trusted_lengths() -> dict[str, Any]:
    return probed(trusted=Samples(lambda t: {"input_ids": t[: 8 + int(t[0]) % 3]}, n=24))


@form(TRUSTED, "fewer samples than two halves need", REFUSED, "at least 4")
def trusted_few() -> dict[str, Any]:
    return probed(trusted=Samples(n=3))
