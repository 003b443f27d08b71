"""The sources of a blend: how many samples of each a coreset holds, and drawing that many of each.

A filter shifts a blend: what reads like the trusted set gains, and a small source of another style may be gone after one
refresh.  With labels at hand a coreset is therefore drawn source by source, each from its own quota.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from grace_ds.records import Array, Coreset, IntArray
from grace_ds.selection.gumbel import mean_one
from grace_ds.selection.objectives import check_included

FLOOR = 0.5  # of its share of the window that policy ``floor`` leaves to a source

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
    """A coreset of ``k`` of ``ids`` whose sources have the shares that ``policy`` asks for.

    Args:
        draw: (ids, log_p, k, include, exclude) → coreset, without regard to sources.
        policy: keep: each source has its share of the window; floor: at least half of it, the rest by the samples' chances.
        labels: (n,) int64, source of each of ``ids``.
        ids, log_p: (n,), the window, sorted by id, and unnormalised log-probabilities.
        include, exclude: sorted ids that must and must not be in.
        whole: ``draw`` is to be given the whole window each time, with the other sources excluded.

    Raises:
        ConfigError: more ids must be in than ``k``.

    Returns:
        The coreset; weights of mean 1, by which a weighted mean over it stands for one over the window, sources included.
    """
    _, which = np.unique(labels, return_inverse=True)
    within, must, may = np.bincount(which), np.isin(ids, include), np.isfinite(log_p) & ~np.isin(ids, exclude)
    check_included(int(must.sum()), k)
    parts: list[Coreset] = []
    for s, quota in enumerate(_quotas(policy, which, within, log_p, must, may, k)):
        if quota:
            here = which == s
            asked = (ids, log_p) if whole else (ids[here], log_p[here])
            never = np.union1d(exclude, ids[~here]) if whole else exclude
            drawn = draw(asked[0], asked[1], int(quota), ids[here & must], never)
            parts.append(Coreset(drawn.ids, drawn.weights * np.float32(within[s] / max(len(drawn.ids), 1))))
    joined = np.concatenate([ids[:0], *(part.ids for part in parts)])
    weights = np.concatenate([np.empty(0, np.float32), *(part.weights for part in parts)])
    order = np.argsort(joined)
    return Coreset(joined[order], mean_one(weights[order]))


def _quotas(policy: str, which: IntArray, within: IntArray, log_p: Array, must: Array, may: Array, k: int) -> IntArray:
    """(sources,) samples of each that the coreset holds."""
    count = len(within)
    least = np.bincount(which[must & may], minlength=count)
    most = np.bincount(which[may], minlength=count)
    if policy == "keep":
        return allocate(within.astype(np.float64), least, most, k)
    chance = np.exp(log_p - np.max(log_p[may], initial=-np.inf), where=may, out=np.zeros(len(log_p)))
    low = np.minimum(np.maximum(least, np.floor(FLOOR * k * within / max(len(which), 1)).astype(np.int64)), most)
    return allocate(np.bincount(which, chance, count).astype(np.float64), low, most, k)


def allocate(wanted: Floats, low: IntArray, high: IntArray, k: int) -> IntArray:
    """Integers within ``low`` and ``high`` that add up to ``k`` and are otherwise in proportion to ``wanted``.

    Args:
        wanted: (s,) float64, not negative.
        low, high: (s,) int64, low <= high.

    Returns:
        (s,) int64; their sum is k, or the nearest to it that the bounds allow.
    """
    k = int(min(max(k, low.sum()), high.sum()))

    def at(scale: float) -> Floats:
        return np.clip(scale * wanted, low, high)

    # Where nothing is wanted, what is left over goes to whoever has room.
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
