"""What the module returns."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tests.multirank.forms.job import Job, Net, trained
from tests.multirank.forms.registry import form

OUTPUTS = "What the module returns"
Named = namedtuple("Named", "loss logits")


@dataclass
class Answer:
    loss: torch.Tensor
    logits: torch.Tensor | None = None


class Plain:
    def __init__(self, loss: torch.Tensor, logits: torch.Tensor) -> None:
        self.loss, self.logits = loss, logits


class Opaque:
    """An output that shows no tensor to who looks for one."""

    __slots__ = ("hidden",)

    def __init__(self, loss: torch.Tensor) -> None:
        self.hidden = lambda: loss


@form(OUTPUTS, "the loss, a tensor")
def output_tensor() -> dict[str, Any]:
    return trained()


@form(OUTPUTS, "a tuple of loss and logits")
def output_tuple() -> dict[str, Any]:
    return trained(lambda job, b: job.engine(b)[0], model=Net(lambda loss, logits: (loss, logits)))


@form(OUTPUTS, "a named tuple")
def output_namedtuple() -> dict[str, Any]:
    return trained(lambda job, b: job.engine(b).loss, model=Net(Named))


@form(OUTPUTS, "a list")
def output_list() -> dict[str, Any]:
    return trained(lambda job, b: job.engine(b)[0], model=Net(lambda loss, logits: [loss, logits]))


@form(OUTPUTS, "a dict with `loss`")
def output_dict() -> dict[str, Any]:
    return trained(lambda job, b: job.engine(b)["loss"], model=Net(lambda loss, logits: {"loss": loss, "logits": logits}))


@form(OUTPUTS, "a nested dict")
def output_nested() -> dict[str, Any]:
    return trained(lambda job, b: job.engine(b)["out"]["loss"], model=Net(lambda loss, logits: {"out": {"loss": loss}}))


@form(OUTPUTS, "a dataclass")
def output_dataclass() -> dict[str, Any]:
    return trained(lambda job, b: job.engine(b).loss, model=Net(Answer))


@form(OUTPUTS, "an object with `.loss`")
def output_object() -> dict[str, Any]:
    return trained(lambda job, b: job.engine(b).loss, model=Net(Plain))


@form(OUTPUTS, "`ModelOutput` of transformers")
def output_modeloutput() -> dict[str, Any]:
    from transformers.modeling_outputs import CausalLMOutput

    return trained(lambda job, b: job.engine(b).loss, model=Net(lambda loss, logits: CausalLMOutput(loss=loss, logits=logits)))


@form(OUTPUTS, "logits; the loss is computed outside of the module")
def output_logits() -> dict[str, Any]:
    def forward(job: Job, batch: Any) -> torch.Tensor:
        logits = job.engine(batch)
        return F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    return trained(forward, model=Net(lambda loss, logits: logits))


@form(OUTPUTS, "an object that shows no tensor")
def output_opaque() -> dict[str, Any]:
    return trained(lambda job, b: job.engine(b).hidden(), model=Net(lambda loss, logits: Opaque(loss)))
