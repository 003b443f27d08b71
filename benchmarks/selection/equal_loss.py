"""How many steps of uniform training reach a loss, and what those would have cost.

Uniform runs of several lengths, each with its own learning-rate schedule, give one point each; between two of them the loss is
straight in the logarithm of the steps. Nothing is extrapolated: beyond the longest run its length is a lower bound.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class EqualLoss:
    """Steps of uniform training to a loss.

    Attributes:
        steps: the number; where ``bound`` is set, the nearest that was measured.
        bound: "" for interpolated, ">" where even the longest run stays above the loss, "<" where the shortest is below it.
    """

    steps: float
    bound: str = ""


def equal_loss_steps(points: Sequence[tuple[float, float]], loss: float) -> EqualLoss:
    """Where uniform training first reaches ``loss``.

    Args:
        points: (steps, final loss) of the uniform runs, at least one.
        loss: nats per token.
    """
    ordered = sorted(points)
    if ordered[0][1] <= loss:
        return EqualLoss(ordered[0][0], "" if ordered[0][1] == loss else "<")
    for (a, above), (b, below) in itertools.pairwise(ordered):
        if below <= loss:
            share = (above - loss) / (above - below)
            return EqualLoss(float(a * (b / a) ** share))
    return EqualLoss(ordered[-1][0], ">")


@dataclass(frozen=True)
class Ratios:
    """An arm's run against the uniform training of equal loss; above 1 the arm is ahead.

    Attributes:
        steps: uniform's steps / the arm's.
        cpu, flops: the same for CPU seconds and FLOPs, the arm's selection counted in.
        bound: of :class:`EqualLoss`; holds for all three.
    """

    steps: float
    cpu: float
    flops: float
    bound: str


def ratios(run: dict[str, Any], uniform: Sequence[dict[str, Any]], metric: str) -> Ratios:
    """An arm's run against the uniform runs of its seed, by the loss called ``metric``."""
    ordered = sorted(uniform, key=lambda r: int(r["settings"]["steps"]))
    counts = [float(r["settings"]["steps"]) for r in ordered]
    found = equal_loss_steps([(n, float(r[metric])) for n, r in zip(counts, ordered, strict=True)], float(run[metric]))
    cpu, flops = (float(np.interp(found.steps, counts, [r[key] for r in ordered])) for key in ("cpu_total", "flops_total"))
    steps = found.steps / float(run["settings"]["steps"])
    return Ratios(steps, cpu / float(run["cpu_total"]), flops / float(run["flops_total"]), found.bound)


def joint_bound(bounds: Sequence[str]) -> str:
    """What a mean over ratios with these bounds is: exact (""), a lower (">") or an upper bound ("<"), or neither ("?")."""
    kinds = {bound for bound in bounds if bound}
    return kinds.pop() if len(kinds) == 1 else "?" if kinds else ""
