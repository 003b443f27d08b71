"""A plugin, as somebody else would write it: one of each kind, from outside of the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from grace_ds import registry
from grace_ds.comm.torch_dist import TorchComm
from grace_ds.gradients.layers import LinearRule, register_rule
from grace_ds.graph.backends.torch_backend import TorchBackend
from grace_ds.recipes.base import Recipe, register
from grace_ds.records import Array, Coreset, FloatArray, IntArray, Signals
from grace_ds.selection.objectives import Request
from grace_ds.selection.objectives import register as register_objective


def even(signals: Signals, parts: frozenset[str]) -> Mapping[str, Array]:
    """Samples of even ids alone."""
    return {"even": np.where(signals.ids % 2 == 0, 1.0, 1e-30)}


register(Recipe("evens", frozenset(), content=True, trusted=False, fallback="uniform", factors=even))


@register_objective("newest")
def newest(request: Request) -> Coreset:
    """The highest ids that may be chosen."""
    ids = request.ids[-request.k :]
    return Coreset(ids, np.ones(len(ids), np.float32))


class Dense(TorchBackend):
    """Says that it was asked."""

    name = "dense"

    def build(self, X: FloatArray, ids: IntArray) -> Any:
        print(f"dense: {len(ids)} rows", flush=True)
        return super().build(X, ids)


@registry.backends.register("dense")
def dense(recall: float) -> Dense:
    """Whatever the recall, it is exact."""
    return Dense()


class Named(TorchComm):
    """torch's, by another name."""

    name = "named"


@registry.transports.register("named")
def named(members: Sequence[int], timeout: float) -> Named:
    """All ranks are in one group here."""
    return Named([members], timeout)


@registry.transports.register("upside-down")
def upside_down(members: Sequence[int], timeout: float) -> Named:
    """One whose ranks are not the job's."""
    comm = Named([members], timeout)
    comm.rank = comm.size - 1 - comm.rank
    return comm


@register_rule(nn.Linear)
class Counted(LinearRule):
    """The last rule for a class counts."""

    def features(self, module: nn.Module) -> tuple[int, int]:
        print("own rule", flush=True)
        return super().features(module)
