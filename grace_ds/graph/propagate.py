"""Propagate scores from the samples that the job has measured (anchors) along the k-NN graph, with a confidence in each.

Every hop gives each sample a mean of its neighbours' values, and a confidence in it:

    mean_i = sum_j w_ij c_j mean_j / e_i,   e_i = sum_j w_ij c_j,   c_i = e_i / (shrink + e_i),   w = max(cosine, 0)^4

where an anchor is held at its own value, with c = decay^age.  After the last hop

    value_i = (c_i v_i + e_i mean_i) / (shrink + c_i + e_i)

minimises, over the value, the confidence-weighted squared distance to the sample's own old value, to its neighbours' values
and (by ``shrink``) to zero, the mean of a centred signal.  So a weak anchor does not pass on its whole value, a sample
without any evidence gets the mean, and more than one hop reaches samples without an anchor among their neighbours.

Shapes: n = rows of this rank, k = neighbours, s = signals.  Pure functions of arrays.  A row's result depends only on the
rows that reach it, bit for bit, independent of how rows are spread over ranks.  Written on the array API
(https://data-apis.org/array-api): NumPy, torch and CuPy arrays are accepted on their own device; all arrays of one call
must come from one library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from array_api_compat import array_namespace, device

from grace_ds.errors import DataError
from grace_ds.records import Array, FloatArray, IntArray

FloatRows = npt.NDArray[np.float64]
Exchange = Callable[[Array], Array]
LEAST_DISAGREEMENT = 1e-3  # relative to the largest: if neighbours agree, staleness alone still orders the re-scoring


@dataclass(frozen=True)
class Propagated:
    """Propagated values of this rank's n samples.

    Attributes:
        values: (n, s) float32, the centred signals; a fresh row keeps its own measured values.
        reached: (n,) bool, rows that received any signal from other rows.
        disagreement: (n,) float32, weighted standard deviation of signal 0 among the neighbours, in its unit; NaN if no
            neighbour has a value.
    """

    values: FloatArray
    reached: Array
    disagreement: FloatArray


def propagate(
    own: FloatArray,
    own_ages: Array,
    place: IntArray,
    similarity: FloatArray,
    exchange: Exchange,
    *,
    hops: int,
    shrink: float,
    decay: float,
) -> Propagated:
    """Compute the values of this rank's rows from their own old ones and, over some hops, from those of others.

    Args:
        own: (n, s) float32, centred signals; NaN where unknown.
        own_ages: (n, s) float, refreshes since each was measured; 0 for this interval's anchors, inf if never measured.
        place: (n, k) integers, the row of each neighbour in the result of ``exchange``; at padding, a row of zeros.
        similarity: (n, k) float32, cosines; -inf at padding.
        exchange: (n, c) float64, facts of this rank's rows → (m, c) those of all neighbours.  One call per hop; collective.
        hops: 1 or more.
        shrink: weight of the prior value zero, in units of evidence, above 0.
        decay: confidence kept per refresh of age, in (0, 1].

    Raises:
        DataError: the shapes do not fit together.
    """
    _check(own, own_ages, place, similarity)
    xp = array_namespace(own, similarity)
    known = ~xp.isnan(own)
    value = _double(xp.where(known, own, 0.0))
    trust = xp.where(known, confidence(own_ages, decay), 0.0)
    mean, sure = value, trust
    for hop in range(hops):
        facts = exchange(xp.concat([mean, sure], axis=1))
        evidence, total = _around(facts, place, similarity)
        if hop + 1 < hops:
            there = evidence > 0
            mean = xp.where(known, value, xp.where(there, total / xp.where(there, evidence, 1.0), 0.0))
            sure = xp.where(known, trust, evidence / (shrink + evidence))
    values = (trust * value + total) / (shrink + trust + evidence)
    fresh = known & (_double(own_ages) == 0)
    values = xp.where(fresh, value, values)
    reached = xp.any(evidence > 0, axis=1)
    spread = _spread(facts, place, similarity, evidence, total)
    return Propagated(xp.astype(values, xp.float32), reached, xp.astype(spread, xp.float32))


def crowding(similarity: FloatArray) -> FloatArray:
    """Return the density of the graph at each row, (n,) float32: the sum over its (n, k) neighbours of max(cosine, 0)^4."""
    xp = array_namespace(similarity)
    total = _zeros(similarity)
    for j in range(similarity.shape[1]):  # in this order: a sum along an axis may be split differently for other shapes
        total = total + closeness(_column(similarity, j))
    result: FloatArray = xp.astype(total, xp.float32)
    return result


def priority(staleness: Array, disagreement: FloatArray, stalest: float | None = None, largest: float | None = None) -> FloatRows:
    """Return the re-scoring priority, staleness x disagreement; it is relative to the maxima over the rows of *all* ranks.

    Args:
        staleness: (n,) float, optimizer steps since the collection, 0 if just collected; inf if never collected, which
            counts as one step more than the stalest of the others.
        disagreement: (n,) float32, from :func:`propagate`; NaN (no neighbour has a value) counts as the largest.
        stalest, largest: the maxima of the finite values of all ranks, at least 0; None: these rows are all there are.

    Returns:
        (n,) float64, finite, not negative; 0 for just collected rows; rows with a higher value are re-scored first.
    """
    xp = array_namespace(staleness, disagreement)
    age, doubt = _double(staleness), _double(disagreement)
    never_collected, unknown = ~xp.isfinite(age), ~xp.isfinite(doubt)
    stalest = _largest(xp, xp.where(never_collected, 0.0, age)) if stalest is None else stalest
    largest = (_largest(xp, xp.where(unknown, 0.0, doubt)) if largest is None else largest) or 1.0
    age = xp.where(never_collected, stalest + 1.0, xp.where(age > 0, age, 0.0))
    floor = LEAST_DISAGREEMENT * largest
    doubt = xp.where(unknown, largest, xp.where(doubt > floor, doubt, floor))
    result: FloatRows = age * doubt
    return result


def confidence(age: Array, decay: float) -> FloatRows:
    """Return the weight of a value at its age in refreshes, decay ** age, (n,) or (n, s) float64.

    0 for a row that was never collected, even if decay is 1.
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


def closeness(similarity: FloatArray) -> FloatRows:
    """Return max(cosine, 0) ** 4 by repeated squaring, which rounds equally everywhere."""
    xp = array_namespace(similarity)
    weight = _double(similarity)
    weight = xp.where(weight > 0, weight, 0.0)
    for _ in range(2):
        weight = xp.square(weight)
    result: FloatRows = weight
    return result


def _column(x: Array, j: int) -> Any:
    """Return column ``j`` of ``x`` as a contiguous copy: gathering from it is twice as fast."""
    return array_namespace(x).asarray(x[:, j], copy=True)


def _zeros(similarity: FloatArray) -> FloatRows:
    """Return (n,) zeros for a sum over (n, k) neighbours."""
    xp = array_namespace(similarity)
    zeros: FloatRows = xp.zeros(similarity.shape[0], dtype=xp.float64, device=device(similarity))
    return zeros


def _around(facts: Array, place: IntArray, similarity: FloatArray) -> tuple[FloatRows, FloatRows]:
    """Return evidence and weighted sum of the neighbours' means, both (n, s).

    Args: ``facts`` (m, 2 s): means, then confidences.
    """
    xp = array_namespace(facts, similarity)
    s = facts.shape[1] // 2
    facts_of = [_column(facts, i) for i in range(2 * s)]
    evidence = [_zeros(similarity) for _ in range(s)]
    total = list(evidence)
    # One neighbour at a time: a sum along an axis may be split differently for other shapes, this one cannot.
    for j in range(similarity.shape[1]):
        near, w = _column(place, j), closeness(_column(similarity, j))
        for i in range(s):
            usable = w * facts_of[s + i][near]
            total[i] = total[i] + usable * facts_of[i][near]
            evidence[i] = evidence[i] + usable
    return xp.stack(evidence, axis=1), xp.stack(total, axis=1)


def _spread(facts: Array, place: IntArray, similarity: FloatArray, evidence: FloatRows, total: FloatRows) -> FloatRows:
    """Return the weighted standard deviation of signal 0 over the neighbours, (n,); NaN if none has a value.

    Args: ``evidence``, ``total`` (n, s) of :func:`_around`.
    """
    xp = array_namespace(facts, similarity)
    s = facts.shape[1] // 2
    first, trust = _column(facts, 0), _column(facts, s)
    seen = evidence[:, 0] > 0
    mass = xp.where(seen, evidence[:, 0], 1.0)
    mean = total[:, 0] / mass
    squares = xp.zeros_like(mean)
    for j in range(similarity.shape[1]):
        near = _column(place, j)
        squares = squares + closeness(_column(similarity, j)) * trust[near] * xp.square(first[near] - mean)
    result: FloatRows = xp.sqrt(xp.where(seen, squares / mass, float("nan")))
    return result


def _check(own: Array, own_ages: Array, place: Array, similarity: Array) -> None:
    n, s = own.shape
    k = similarity.shape[-1]
    want = {"own_ages": (n, s), "place": (n, k), "similarity": (n, k)}
    have = {"own_ages": tuple(own_ages.shape), "place": tuple(place.shape), "similarity": tuple(similarity.shape)}
    if want != have or s == 0:
        raise DataError(f"propagate: own is {own.shape}, so shapes must be {want}, not {have}")
