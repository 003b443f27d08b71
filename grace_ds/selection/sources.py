"""Choose how many samples of each source of a blend a coreset holds, and draw that many of each.

A filter shifts a blend: text like the trusted set gains, and a small source of another style may be gone after one refresh.
If there are labels, a coreset is therefore drawn source by source, each from its own quota.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from grace_ds.records import Array, Coreset, IntArray
from grace_ds.selection.gumbel import mean_one
from grace_ds.selection.objectives import check_included

FLOOR = 0.5  # fraction of its share of the window that policy ``floor`` guarantees to a source

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
) -> Coreset:
    """Draw a coreset of ``k`` of ``ids`` in which the sources have the shares that ``policy`` requires.

    Args:
        draw: (ids, log_p, k, include, exclude) → coreset, ignoring sources.
        policy: keep: each source has its share of the window; floor: at least half of it, the rest by the samples' chances.
        labels: (n,) int64, source of each of ``ids``.
        ids, log_p: (n,), the window, sorted by id, and unnormalised log-probabilities.
        include, exclude: sorted ids that must and must not be in.
        whole: give ``draw`` the whole window each time, with the other sources excluded.

    Raises:
        ConfigError: more than ``k`` ids must be in.

    Returns:
        The coreset; weights of mean 1, with which a weighted mean over it estimates that over the window, sources included.
    """
    _, source = np.unique(labels, return_inverse=True)
    window_counts, required, eligible = np.bincount(source), np.isin(ids, include), np.isfinite(log_p) & ~np.isin(ids, exclude)
    check_included(int(required.sum()), k)
    parts: list[Coreset] = []
    for label, quota in enumerate(_quotas(policy, source, window_counts, log_p, required, eligible, k)):
        if quota:
            of_source = source == label
            pool = (ids, log_p) if whole else (ids[of_source], log_p[of_source])
            excluded = np.union1d(exclude, ids[~of_source]) if whole else exclude
            drawn = draw(pool[0], pool[1], int(quota), ids[of_source & required], excluded)
            parts.append(Coreset(drawn.ids, drawn.weights * np.float32(window_counts[label] / max(len(drawn.ids), 1))))
    joined = np.concatenate([ids[:0], *(part.ids for part in parts)])
    weights = np.concatenate([np.empty(0, np.float32), *(part.weights for part in parts)])
    order = np.argsort(joined)
    return Coreset(joined[order], mean_one(weights[order]))


def _quotas(
    policy: str, source: IntArray, window_counts: IntArray, log_p: Array, required: Array, eligible: Array, k: int
) -> IntArray:
    """Return the number of samples of each source that the coreset holds, (sources,)."""
    count = len(window_counts)
    least = np.bincount(source[required & eligible], minlength=count)
    most = np.bincount(source[eligible], minlength=count)
    if policy == "keep":
        return allocate(window_counts.astype(np.float64), least, most, k)
    chance = np.exp(log_p - np.max(log_p[eligible], initial=-np.inf), where=eligible, out=np.zeros(len(log_p)))
    low = np.minimum(np.maximum(least, np.floor(FLOOR * k * window_counts / max(len(source), 1)).astype(np.int64)), most)
    return allocate(np.bincount(source, chance, count).astype(np.float64), low, most, k)


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
