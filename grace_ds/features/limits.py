"""Limit how much a sample may differ from trusted text: one-sided limits on a few statistics, combined to one number.

The limits are learned from held-out trusted samples alone.  Deviations are measured at the tail that is judged, not from
the bulk: a trusted set of several kinds of text (code and tables, say) has a wide bulk, and junk would lie within it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from grace_ds.recipes.weights import soft_pass
from grace_ds.records import Array

Float64Array = npt.NDArray[np.float64]

CUT, SOFTNESS = -1.5, 0.2  # threshold and width of a filter, in deviations
TAIL, SHOULDER = 0.0668, 0.3085  # mass of a normal distribution beyond CUT, and beyond one deviation less
REJECTED = 0.12  # share of held-out trusted samples that fail one of the limits
FEWEST = 8  # values needed to fit limits to both sides of one statistic
MIN_SPREAD = 0.01  # minimum deviation of a statistic (the score's in nats per token)


def tail_location(values: Array, side: int = -1, least: float = MIN_SPREAD) -> tuple[float, float]:
    """Return the mean and standard deviation of the normal distribution with the same tail as ``values``.

    Args:
        values: (n,) finite, n at least 1.
        side: -1: the lower tail, 1: the upper one.
        least: lower bound of the deviation.
    """
    tail, shoulder = np.quantile(values, [TAIL, SHOULDER] if side < 0 else [1 - TAIL, 1 - SHOULDER])
    deviation = float(abs(shoulder - tail))
    return float(tail) + side * CUT * deviation, max(deviation, least)


@dataclass(frozen=True)
class Limits:
    """Fitted limits.

    Attributes:
        sides: (statistic, -1 too little | 1 too much) of each limit.
        middle, deviation: of each limit, from :func:`tail_location`.
        cut: threshold for the worst deviation of a sample, in deviations.
    """

    sides: tuple[tuple[int, int], ...]
    middle: tuple[float, ...]
    deviation: tuple[float, ...]
    cut: float

    @staticmethod
    def around(values: Array) -> Limits | None:
        """Fit to both sides of one statistic, from its finite values (n,) for trusted samples; None for fewer than ``FEWEST``."""
        return Limits.fit(np.asarray(values, np.float64)[:, None], ((0, -1), (0, 1))) if len(values) >= FEWEST else None

    @staticmethod
    def fit(held_out: Float64Array, sides: tuple[tuple[int, int], ...]) -> Limits:
        """Fit so that a share ``REJECTED`` of the (n, s) statistics of held-out trusted samples lies beyond the limits."""
        location = [tail_location(held_out[:, statistic], side) for statistic, side in sides]
        middle, deviation = zip(*location, strict=True)
        free = Limits(sides, middle, deviation, CUT)
        return Limits(sides, middle, deviation, float(np.quantile(free.worst(held_out), REJECTED)))

    def worst(self, raw: Float64Array) -> Float64Array:
        """Return the smallest deviation from the middle over all limits, for each row of (n, s) statistics, (n,).

        Deviations towards a limit are negative.
        """
        deviations = [
            -side * (raw[:, statistic] - middle) / deviation
            for (statistic, side), middle, deviation in zip(self.sides, self.middle, self.deviation, strict=True)
        ]
        lowest: Float64Array = np.min(deviations, axis=0)
        return lowest

    def quality(self, raw: Float64Array) -> Float64Array:
        """Return the pass of the filter, (n,) float64 in [0.02, 1]."""
        return soft_pass(self.worst(raw), self.cut, SOFTNESS)
