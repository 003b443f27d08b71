"""Scores spread from harvested samples (anchors) to the others along the k-NN graph, and say how much they are worth.

    value_i = (c_i v_i + sum_j w_ij c_j v_j) / (shrink + c_i + sum_j w_ij c_j),   w = max(cosine, 0)^4,   c = decay^age

over the anchors j among i's neighbours.  It minimises, over v, the confidence-weighted squared distance to the row's own
old value, to its neighbours' values and (by ``shrink``) to zero, the mean of a centred signal.  So one weak anchor does
not carry its whole value over, and a sample that nothing is known of gets the mean.

Shapes: n = rows of this rank, k = neighbours, s = signals.  Pure functions of arrays; a row's result depends on that row
only, bit for bit, however rows are spread over ranks.  Written on the array API (https://data-apis.org/array-api): NumPy,
torch and CuPy arrays are taken alike, where they lie; all arrays of a call are of one library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from array_api_compat import array_namespace

from grace_ds.errors import ConfigError, DataError
from grace_ds.records import Array, FloatArray

FloatRows = npt.NDArray[np.float64]
LEAST_DISAGREEMENT = 1e-3  # of the largest: where neighbours agree, staleness alone still orders the re-scoring


@dataclass(frozen=True)
class Propagated:
    """What is believed of this rank's n samples.

    Attributes:
        values: (n, s) float32, the centred signals; a fresh row's own values where it has them.
        confidence: (n,) float32 in [0, 1), evidence / (shrink + evidence) of signal 0; 1 where its own value is fresh.
        disagreement: (n,) float32, weighted standard deviation of signal 0 among the neighbours, in its unit; NaN where
            no neighbour has a value.
    """

    values: FloatArray
    confidence: FloatArray
    disagreement: FloatArray


def propagate(
    own: FloatArray,
    own_age: Array,
    nbr_values: FloatArray,
    nbr_age: Array,
    similarity: FloatArray,
    shrink: float,
    decay: float,
) -> Propagated:
    """Values of this rank's rows from their own old ones and from their neighbours'.

    Args:
        own: (n, s) float32, centred signals; NaN where unknown.
        own_age: (n,) float, refreshes since the row's harvest; 0 for this window's anchors, inf when never harvested.
        nbr_values: (n, k, s) float32, the neighbours' centred signals; NaN where unknown, at padding too.
        nbr_age: (n, k) float, the neighbours' ages in refreshes; anything at padding.
        similarity: (n, k) float32, cosines; -inf at padding.
        shrink: evidence that counts as much as no evidence, above 0.
        decay: confidence kept per refresh of age, in (0, 1].

    Raises:
        ConfigError: ``shrink`` or ``decay`` is out of range.
        DataError: the shapes do not fit together.
    """
    _check(own, own_age, nbr_values, nbr_age, similarity, shrink, decay)
    xp = array_namespace(own, nbr_values, similarity)
    weight = confidence(nbr_age, decay) * _closeness(similarity)
    known = ~xp.isnan(own)
    evidence = xp.where(known, confidence(own_age, decay)[:, None], 0.0)
    total = evidence * _double(xp.where(known, own, 0.0))
    # Neighbour by neighbour: a sum along an axis may be split differently for other shapes, this one cannot.
    for j in range(similarity.shape[1]):
        value, usable = _column(nbr_values, weight, j)
        total += usable * value
        evidence += usable
    values = total / (shrink + evidence)
    fresh = known & (_double(own_age) == 0)[:, None]
    values = xp.where(fresh, _double(own), values)
    sure = xp.where(fresh[:, 0], 1.0, evidence[:, 0] / (shrink + evidence[:, 0]))
    disagreement = _spread(nbr_values[:, :, :1], weight)
    return Propagated(*(xp.astype(x, xp.float32) for x in (values, sure, disagreement)))


def priority(staleness: Array, disagreement: FloatArray) -> FloatRows:
    """Re-scoring priority = staleness x disagreement, for the rows of *all* ranks at once (it is relative to their top).

    Args:
        staleness: (n,) float, optimizer steps since the harvest, 0 when just harvested; inf when never harvested, which
            counts as one step more than the stalest of the others.
        disagreement: (n,) float32, from :func:`propagate`; NaN, nothing known around, counts as the largest.

    Returns:
        (n,) float64, finite, not negative; 0 for just harvested rows, and the higher the sooner to be re-scored.
    """
    xp = array_namespace(staleness, disagreement)
    age = _double(staleness)
    never = ~xp.isfinite(age)
    age = xp.where(never, _largest(xp, xp.where(never, 0.0, age)) + 1.0, xp.where(age > 0, age, 0.0))
    doubt = _double(disagreement)
    unknown = ~xp.isfinite(doubt)
    largest = _largest(xp, xp.where(unknown, 0.0, doubt)) or 1.0
    floor = LEAST_DISAGREEMENT * largest
    doubt = xp.where(unknown, largest, xp.where(doubt > floor, doubt, floor))
    result: FloatRows = age * doubt
    return result


def confidence(age: Array, decay: float) -> FloatRows:
    """(n,) or (n, k) float64, what a value is worth at its age in refreshes: decay ** age.

    0 for a row that was never harvested, also where decay is 1.
    """
    xp = array_namespace(age)
    age = _double(age)
    there = xp.isfinite(age)
    result: FloatRows = xp.where(there, decay ** xp.where(there, age, 0.0), 0.0)
    return result


def _double(x: Array) -> Any:
    xp = array_namespace(x)
    return xp.astype(x, xp.float64, copy=False)


def _largest(xp: Any, x: Array) -> float:
    return max(0.0, float(xp.max(x))) if x.shape[0] else 0.0


def _closeness(similarity: FloatArray) -> FloatRows:
    """max(cosine, 0) ** 4, by products: they round alike everywhere."""
    xp = array_namespace(similarity)
    cosine = _double(similarity)
    square = xp.square(xp.where(cosine > 0, cosine, 0.0))
    result: FloatRows = xp.square(square)
    return result


def _column(nbr_values: FloatArray, weight: FloatRows, j: int) -> tuple[FloatRows, FloatRows]:
    """Neighbour j's values and weights, both (n, s) float64; 0 and 0 where a value is unknown."""
    xp = array_namespace(nbr_values)
    value = _double(nbr_values[:, j, :])
    unknown = xp.isnan(value)
    return xp.where(unknown, 0.0, value), xp.where(unknown, 0.0, weight[:, j, None])


def _spread(nbr_values: FloatArray, weight: FloatRows) -> FloatRows:
    """(n,) weighted standard deviation over the neighbours of the one signal in ``nbr_values`` (n, k, 1)."""
    xp = array_namespace(nbr_values)
    evidence, total, squares = (xp.zeros_like(weight[:, :1]) for _ in range(3))
    for j in range(weight.shape[1]):
        value, usable = _column(nbr_values, weight, j)
        evidence += usable
        total += usable * value
    seen = evidence > 0
    mass = xp.where(seen, evidence, 1.0)
    mean = total / mass
    for j in range(weight.shape[1]):
        value, usable = _column(nbr_values, weight, j)
        squares += usable * xp.square(value - mean)
    result: FloatRows = xp.sqrt(xp.where(seen, squares / mass, float("nan")))[:, 0]
    return result


def _check(own: Array, own_age: Array, nbr_values: Array, nbr_age: Array, similarity: Array, shrink: float, decay: float) -> None:
    if not shrink > 0:
        raise ConfigError(f"graph.shrink is {shrink}: it must be above 0, or a row without evidence has no value")
    if not 0 < decay <= 1:
        raise ConfigError(f"graph.decay is {decay}: it is the confidence kept per refresh, above 0 and at most 1")
    n, s = own.shape
    k = similarity.shape[-1]
    want = {"own_age": (n,), "nbr_values": (n, k, s), "nbr_age": (n, k), "similarity": (n, k)}
    have = {
        "own_age": np.shape(own_age),
        "nbr_values": nbr_values.shape,
        "nbr_age": np.shape(nbr_age),
        "similarity": similarity.shape,
    }
    if want != have or s == 0:
        raise DataError(f"propagate: own is {own.shape}, so shapes must be {want}, not {have}")
