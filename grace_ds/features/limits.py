"""How unlike trusted text a sample may be: limits on a few statistics, each to one side, joined to one number.

What is normal is learned from held-out trusted samples alone.  Deviations are taken from the tail that is judged by, not from
the bulk: a trusted set of several kinds of text (code and tables, say) has a wide bulk, and junk would lie within it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from grace_ds.recipes.weights import soft_pass
from grace_ds.records import Array

Float64Array = npt.NDArray[np.float64]

CUT, SOFTNESS = -1.5, 0.2  # a filter's threshold and width, in deviations
TAIL, SHOULDER = 0.0668, 0.3085  # of a normal distribution beyond CUT, and beyond one deviation less
REJECTED = 0.12  # of held-out trusted samples that fail one of the limits
FEWEST = 8  # values needed to fit limits to both sides of one statistic
MIN_SPREAD = 0.01  # of a statistic (the score's in nats per token), below which trusted samples say nothing about its spread


def tail_location(values: Array, side: int = -1, least: float = MIN_SPREAD) -> tuple[float, float]:
    """Mean and standard deviation of the normal distribution that has the tail of finite ``values`` (n,), n at least 1.

    Args:
        side: -1: the lower tail, 1: the upper one.
        least: what the deviation is at the least.
    """
    tail, shoulder = np.quantile(values, [TAIL, SHOULDER] if side < 0 else [1 - TAIL, 1 - SHOULDER])
    deviation = float(abs(shoulder - tail))
    return float(tail) + side * CUT * deviation, max(deviation, least)


@dataclass(frozen=True)
class Limits:
    """Fitted limits.

    Attributes:
        sides: (statistic, -1 too little | 1 too much) of each limit.
        middle, deviation: of each, from :func:`tail_location`.
        cut: what the worst of a sample's limits may be, in deviations.
    """

    sides: tuple[tuple[int, int], ...]
    middle: tuple[float, ...]
    deviation: tuple[float, ...]
    cut: float

    @staticmethod
    def around(values: Array) -> Limits | None:
        """Fit to both sides of one statistic by its finite values (n,) for trusted samples; None for fewer than ``FEWEST``."""
        return Limits.fit(np.asarray(values, np.float64)[:, None], ((0, -1), (0, 1))) if len(values) >= FEWEST else None

    @staticmethod
    def fit(held_out: Float64Array, sides: tuple[tuple[int, int], ...]) -> Limits:
        """Such that ``REJECTED`` of the (n, s) statistics of held-out trusted samples lie beyond."""
        location = [tail_location(held_out[:, statistic], side) for statistic, side in sides]
        middle, deviation = zip(*location, strict=True)
        free = Limits(sides, middle, deviation, CUT)
        return Limits(sides, middle, deviation, float(np.quantile(free.worst(held_out), REJECTED)))

    def worst(self, raw: Float64Array) -> Float64Array:
        """(n,) deviations from the middle, negative towards the limit: of each row of (n, s) statistics the least over all."""
        found = [
            -side * (raw[:, statistic] - middle) / deviation
            for (statistic, side), middle, deviation in zip(self.sides, self.middle, self.deviation, strict=True)
        ]
        lowest: Float64Array = np.min(found, axis=0)
        return lowest

    def quality(self, raw: Float64Array) -> Float64Array:
        """(n,) float64 in [0.02, 1]: pass of the filter."""
        return soft_pass(self.worst(raw), self.cut, SOFTNESS)
