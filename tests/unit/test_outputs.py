"""The tensors of a module's output, in whatever it holds them."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grace_ds.integrations.engine import outputs

LOSS, LOGITS = torch.tensor(1.0), torch.rand(2, 3)
Named = namedtuple("Named", "loss logits")


@dataclass
class Answer:
    loss: torch.Tensor
    logits: Any = None
    name: str = "answer"


@dataclass
class Slotted:
    __slots__ = ("loss", "missing")
    loss: torch.Tensor
    missing: Any


def without_a_field() -> Slotted:
    made = Slotted(LOSS, 0)
    del made.missing
    return made


class Opaque:
    __slots__ = ("hidden",)

    def __init__(self) -> None:
        self.hidden = LOSS


FORMS: dict[str, tuple[Any, list[torch.Tensor]]] = {
    "tensor": (LOSS, [LOSS]),
    "tuple": ((LOSS, LOGITS), [LOSS, LOGITS]),
    "named tuple": (Named(LOSS, LOGITS), [LOSS, LOGITS]),
    "list": ([None, LOGITS, 3], [LOGITS]),
    "mapping": (OrderedDict(loss=LOSS, name="x"), [LOSS]),
    "dataclass": (Answer(LOSS, LOGITS), [LOSS, LOGITS]),
    "dataclass with slots": (Slotted(LOSS, [LOGITS]), [LOSS, LOGITS]),
    "dataclass without one of its fields": (without_a_field(), [LOSS]),
    "object": (SimpleNamespace(loss=LOSS, logits=LOGITS), [LOSS, LOGITS]),
    "nested": ({"out": [Answer(LOSS, {"logits": LOGITS})]}, [LOSS, LOGITS]),
    "four deep": ([{"out": SimpleNamespace(answer=(LOSS,))}], [LOSS]),
    "deeper": ([[[[[LOSS]]]]], []),
    "module": (torch.nn.Linear(2, 2), []),
    "class": (Answer, []),
    "opaque": (Opaque(), []),
    "nothing": (None, []),
}


@pytest.mark.parametrize("name", list(FORMS))
def test_the_tensors_of_an_output_are_found_in(name: str) -> None:
    tree, tensors = FORMS[name]
    found = outputs(tree)
    assert [id(tensor) for tensor in found] == [id(tensor) for tensor in tensors]


def test_an_output_that_holds_itself_comes_to_an_end() -> None:
    tree: dict[str, Any] = {"loss": LOSS}
    tree["self"] = tree
    assert {id(tensor) for tensor in outputs(tree)} == {id(LOSS)}
