"""Choose how many samples of each source of a blend a coreset holds, and draw that many of each.

A filter shifts a blend: text like the trusted set gains, and a small source of another style may be gone after one refresh.
If there are labels, a coreset is therefore drawn source by source, each from its own quota.

With policy ``adapt`` the quotas are learned: by how much the samples that were chosen from a source and trained on have helped.
At each refresh, for source s with its n_s influences measured since the last one, of mean m_s,

    log r_s ← (1 - ρ) log r_s + η κ_s (m_s - m) / σ                κ_s = τ² / (τ² + σ² / n_s)
    share_s = min(max(c given_s r_s, a given_s), b given_s)        r_s ← share_s / given_s

with m the mean of all, σ their standard deviation within the sources, c such that the shares add up, and a and b the bounds.  τ²
is the variance between the sources' true means as DerSimonian and Laird (1986, doi:10.1016/0197-2456(86)90046-2) estimate it
from Q = Σ n_s (m_s - m)² / σ², but 0 until Q is two standard deviations above what it is among equal sources.  So noise changes
nothing, and sources that are alike move alike however many of their samples were measured.

This is the multiplicative update of exponentiated gradient (Kivinen and Warmuth 1997, doi:10.1006/inco.1996.2612) by which
DoReMi weighs domains (Xie et al. 2023, arXiv 2305.10429, algorithm 1), with mean influence in the place of excess loss, as
MATES scores samples (Yu et al. 2024, arXiv 2406.06046); κ, the decay to the given shares and the bounds are this project's.
Only the core is averaged: samples drawn uniformly or for exploration are another selection, whose part differs between sources
of different shares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from grace_ds.comm.base import Comm
from grace_ds.comm.statistics import exact_sums, highest, total
from grace_ds.records import Array, Coreset, IntArray
from grace_ds.selection.gumbel import ALONE, mean_one
from grace_ds.selection.objectives import check_included

FLOOR = 0.5  # fraction of its share of the window that policy ``floor`` guarantees to a source
STEP = 0.5  # η: change of the logarithm of a share by a difference of one standard deviation
CERTAIN = 2.0  # standard deviations of Q that count as noise
FORGET = 0.1  # ρ: part of what was learned that is forgotten at each refresh
LEAST_MEASURED = 8  # influences of a source from which on its mean is used

Floats = npt.NDArray[np.float64]
Draw = Callable[[IntArray, Array, int, IntArray, IntArray], Coreset]


def by_source(
    draw: Draw,
    policy: str,
    labels: IntArray,
    ids: IntArray,
    log_p: Array,
    k: int,
    include: IntArray,
    exclude: IntArray,
    whole: bool = False,
    learned: Learned | None = None,
    comm: Comm = ALONE,
) -> Coreset:
    """Draw a coreset of ``k`` of all ranks' ``ids`` in which the sources have the shares that ``policy`` requires.  Collective.

    Args:
        draw: (ids, log_p, k, include, exclude) → this rank's part of a coreset, ignoring sources; called once for each source
            that is to have any, in the same order on all ranks.
        policy: keep: each source has its share of the window; floor: at least half of it, the rest by the samples' chances;
            adapt: its share times what ``learned`` says.
        labels: (n,) int64, source of each of ``ids``.
        ids, log_p: (n,), this rank's samples of the window, sorted by id, and unnormalised log-probabilities.
        k: members over all ranks.
        include, exclude: sorted ids that must and must not be in.
        whole: give ``draw`` all of this rank's samples each time, with the other sources excluded.
        learned: for policy adapt.
        comm: of all ranks; without it this rank owns all samples.

    Raises:
        ConfigError: more than ``k`` ids must be in.

    Returns:
        This rank's part; weights of mean 1 over all ranks, with which a weighted mean over the coreset estimates that over the
        window, sources included.
    """
    names, window_counts = source_counts(comm, labels)
    source = np.searchsorted(names, labels)
    required, eligible = np.isin(ids, include), np.isfinite(log_p) & ~np.isin(ids, exclude)
    check_included(total(comm, int(required.sum()))[0], k)
    bounds = [np.bincount(source[which], minlength=len(names)) for which in (required & eligible, eligible)]
    least, most = comm.allreduce(np.stack(bounds).astype(np.int64))
    wanted = window_counts.astype(np.float64)
    if policy == "floor":
        most_likely = highest(comm, log_p[eligible])
        wanted = exact_sums(comm, np.exp(log_p - most_likely, where=eligible, out=np.zeros(len(log_p))), source, len(names))
    quotas = comm.broadcast(_quotas(policy, names, window_counts, wanted, least, most, k, learned or Learned()))
    parts: list[Coreset] = []
    for label, quota in enumerate(quotas):
        if quota:
            of_source = source == label
            pool = (ids, log_p) if whole else (ids[of_source], log_p[of_source])
            excluded = np.union1d(exclude, ids[~of_source]) if whole else exclude
            drawn = draw(pool[0], pool[1], int(quota), ids[of_source & required], excluded)
            (members,) = total(comm, len(drawn.ids))
            parts.append(Coreset(drawn.ids, drawn.weights * np.float32(window_counts[label] / max(members, 1))))
    joined = np.concatenate([ids[:0], *(part.ids for part in parts)])
    weights = np.concatenate([np.empty(0, np.float32), *(part.weights for part in parts)])
    order = np.argsort(joined)
    return Coreset(joined[order], mean_one(weights[order], comm))


def _quotas(
    policy: str, names: IntArray, window: IntArray, wanted: Floats, least: IntArray, most: IntArray, k: int, learned: Learned
) -> IntArray:
    """Return the number of samples of each source that the coreset holds, (sources,).

    Args:
        names, window: (sources,) of each source, and its number of samples in the window.
        wanted: (sources,) what the quotas are proportional to within their bounds; for policy adapt it is ``learned``.
        least, most: (sources,) samples that must and that may be chosen.
    """
    if policy == "keep":
        return allocate(wanted, least, most, k)
    given = k * window / max(int(window.sum()), 1)
    if policy == "floor":
        return allocate(wanted, np.minimum(np.maximum(least, np.floor(FLOOR * given).astype(np.int64)), most), most, k)
    low = np.minimum(np.maximum(least, np.ceil(learned.least * given - 1e-9).astype(np.int64)), most)
    high = np.maximum(low, np.minimum(most, np.floor(learned.most * given + 1e-9).astype(np.int64)))
    return allocate(given * np.exp([learned.factors.get(int(name), 0.0) for name in names]), low, high, k)


def source_counts(comm: Comm, labels: IntArray) -> tuple[IntArray, IntArray]:
    """Return the sources of all ranks' ``labels`` (n,), sorted, and the number of samples of each.  Collective."""
    own, counts = np.unique(labels, return_counts=True)
    names = np.unique(np.concatenate(comm.allgather(own.astype(np.int64))))
    every = np.zeros(len(names), np.int64)
    every[np.searchsorted(names, own)] = counts
    return names, comm.allreduce(every)


@dataclass(frozen=True)
class Learned:
    """What policy ``adapt`` has learned so far; see the top of this file.

    Attributes:
        factors: source → log r, the logarithm of its share over the one given; 0 for others.
        least, most: bounds of a source's share, in multiples of its share of the window.
    """

    factors: Mapping[int, float] = field(default_factory=dict)
    least: float = 0.5
    most: float = 2.0

    def after(self, given: Mapping[int, float], source: IntArray, influence: Array) -> Learned:
        """Return what is known after a refresh.

        Args:
            given: source → its share of the window.
            source: (n,) source of each sample of the core whose influence was measured since the last one.
            influence: (n,), in any unit; NaN: not known.
        """
        factors = {name: (1 - FORGET) * self.factors.get(name, 0.0) for name in given}
        for name, gain in _gains(source, influence).items():
            if name in factors:
                factors[name] += STEP * gain
        names = list(factors)
        weight = np.array([given[name] for name in names])
        share = _bounded(weight * np.exp([factors[name] for name in names]), self.least * weight, self.most * weight)
        ratio = np.log(np.maximum(share, 1e-9 * weight) / weight)
        return replace(self, factors=dict(zip(names, ratio.tolist(), strict=True)))

    def meta(self) -> dict[str, float]:
        """Return the factors as JSON-able entries."""
        return {str(name): factor for name, factor in self.factors.items()}

    @staticmethod
    def of(meta: Mapping[str, float], least: float, most: float) -> Learned:
        """Read what :meth:`meta` has returned."""
        return Learned({int(name): float(factor) for name, factor in meta.items()}, least, most)


def _gains(source: IntArray, influence: Array) -> dict[int, float]:
    """Return κ_s (m_s - m) / σ of each source with enough known influences; none if they do not differ beyond noise."""
    known = np.isfinite(influence)
    names, index, counts = np.unique(source[known], return_inverse=True, return_counts=True)
    value = np.asarray(influence, np.float64)[known]
    enough = counts >= LEAST_MEASURED
    if enough.sum() < 2:
        return {}
    # Influences have long tails, and one of them must not decide: beyond 3 robust deviations they count as 3.
    middle = np.median(value)
    spread = 3 * 1.4826 * float(np.median(np.abs(value - middle)))
    value = np.clip(value, middle - spread, middle + spread) if spread > 0 else value
    means = np.bincount(index, value) / counts
    deviation = float(np.sqrt(((value - means[index]) ** 2).sum() / max(len(value) - len(names), 1)))
    if deviation == 0:
        return {}
    size, mean = counts[enough].astype(np.float64), means[enough]
    distance = (mean - np.average(mean, weights=size)) / deviation
    free = len(size) - 1
    excess = float((size * distance**2).sum()) - free
    if excess <= CERTAIN * np.sqrt(2 * free):  # of a chi-square with as many degrees of freedom
        return {}
    between = excess / (size.sum() - (size**2).sum() / size.sum())
    gain = distance * between / (between + 1 / size)
    return dict(zip(names[enough].tolist(), gain.tolist(), strict=True))


def _bounded(wanted: Floats, low: Floats, high: Floats) -> Floats:
    """Return c ``wanted`` clipped to [low, high], with c such that the entries add up to 1; low adds up to at most 1 ≤ high."""
    below, above = 0.0, 1.0
    while np.clip(above * wanted, low, high).sum() < 1 - 1e-12 and above < 1e300:
        above *= 2
    for _ in range(200):
        middle = (below + above) / 2
        below, above = (middle, above) if np.clip(middle * wanted, low, high).sum() < 1 else (below, middle)
    bounded: Floats = np.clip(above * wanted, low, high)
    return bounded


def allocate(wanted: Floats, low: IntArray, high: IntArray, k: int) -> IntArray:
    """Return integers between ``low`` and ``high`` that sum to ``k`` and are otherwise proportional to ``wanted``.

    Args:
        wanted: (s,) float64, not negative.
        low, high: (s,) int64, low <= high.
        k: the sum.

    Returns:
        (s,) int64; their sum is k, or the nearest value to it that the bounds allow.
    """
    k = int(min(max(k, low.sum()), high.sum()))

    def at(scale: float) -> Floats:
        return np.clip(scale * wanted, low, high)

    # If the wanted sources cannot take k, the others share the rest within their bounds.
    if at(1e300).sum() < k:
        wanted = wanted + 1e-9 * max(float(wanted.sum()), 1.0)
    below, above = 0.0, 1.0
    while at(above).sum() < k:
        above *= 2
    for _ in range(200):
        middle = (below + above) / 2
        below, above = (middle, above) if at(middle).sum() < k else (below, middle)
    share = at(above)
    whole = np.floor(share + 1e-9).astype(np.int64)
    while (rest := k - int(whole.sum())) > 0:
        room = np.flatnonzero(whole < high)
        first = room[np.argsort(-(share - whole)[room], kind="stable")][:rest]
        whole[first] += 1
    while (rest := int(whole.sum()) - k) > 0:
        room = np.flatnonzero(whole > low)
        first = room[np.argsort((share - whole)[room], kind="stable")][:rest]
        whole[first] -= 1
    return whole
