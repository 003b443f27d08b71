"""Draw a coreset by the name of an objective.  Every objective is a pure function of its arguments, on root."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from grace_ds import registry
from grace_ds.errors import ConfigError
from grace_ds.records import Array, Coreset, IntArray, Neighbours
from grace_ds.selection.facility_location import coverage, lazy_greedy
from grace_ds.selection.gumbel import check_log_p, largest, mean_one, random_words, sample_without_replacement

_RS2 = 2  # ``purpose`` of the random words of rs2; 1 is the Gumbel noise


@dataclass(frozen=True)
class Request:
    """Input of an objective.

    Attributes:
        ids: (n,) int64, sorted: ids that may be chosen.
        log_p: (n,) float64, unnormalised.
        k: ids wanted.
        seed, version: of the run and of the coreset.
        first: sorted ids among ``ids`` that must be chosen; objectives other than ``facility_location`` may ignore it.
        window: (w,) int64, sorted: all samples of the window; ``neighbours`` has a row for each.
        neighbours: k-NN graph of the window; None unless the objective needs it.
        weights: (w,) float64 importance of each sample of the window.
    """

    ids: IntArray
    log_p: Array
    k: int
    seed: int
    version: int
    first: IntArray
    window: IntArray
    neighbours: Neighbours | None
    weights: Array


Draw = Callable[[Request], Coreset]


@dataclass(frozen=True)
class Objective:
    """How a coreset is drawn.

    Attributes:
        draw: the function that draws it.
        weighs: whether it reads the importance of the samples; if not, nothing is collected for it, and nothing explored.
        covers: whether it draws along the k-NN graph of the whole window, and handles ``first`` itself.
    """

    draw: Draw
    weighs: bool = True
    covers: bool = False


def register(name: str, *, weighs: bool = True, covers: bool = False) -> Callable[[Draw], Draw]:
    """Decorate a function to register it as an objective under ``name``; see :class:`Objective`."""

    def add(draw: Draw) -> Draw:
        registry.objectives.register(name)(Objective(draw, weighs, covers))
        return draw

    return add


def select(
    name: str,
    ids: IntArray,
    log_p: Array,
    k: int,
    *,
    seed: int,
    version: int,
    neighbours: Neighbours | None = None,
    include: IntArray | None = None,
    exclude: IntArray | None = None,
) -> Coreset:
    """Draw a coreset of ``k`` samples of the window.

    Args:
        name: sample | facility_location | topk | rs2 | uniform, or a registered one.
        ids: (n,) int64, sorted, unique, the whole window.
        log_p: (n,) float64, unnormalised log-probabilities; -inf for never.
        k: its size; smaller if fewer can be chosen.
        seed, version: of the run and of the coreset.
        neighbours: k-NN graph over ``ids``, in their order; for facility_location.
        include: sorted ids that are always in (ids outside of the window are ignored); they count towards ``k``.
        exclude: sorted ids that are never in.

    Raises:
        ConfigError: the name is unknown, or more than ``k`` ids must be in.
        DataError: ids or log-probabilities are malformed.
    """
    objective: Objective = registry.objectives.get(name)
    log_p = check_log_p(ids, log_p)
    inside = _places(ids, include)
    first = ids[inside]
    check_included(len(first), k)
    eligible = np.isfinite(log_p)
    eligible[_places(ids, exclude)] = False
    covers = objective.covers
    if not covers:
        eligible[inside] = False
    weights = np.exp(log_p - log_p[eligible].max()) if eligible.any() else np.zeros(len(ids))
    wanted = k if covers else k - len(first)
    drawn = objective.draw(Request(ids[eligible], log_p[eligible], wanted, seed, version, first, ids, neighbours, weights))
    if covers or not len(first):
        return drawn
    joined = np.concatenate([first, drawn.ids])
    order = np.argsort(joined)
    weight = np.concatenate([np.ones(len(first), np.float32), drawn.weights])
    return Coreset(joined[order], mean_one(weight[order]))


def _places(ids: IntArray, few: IntArray | None) -> IntArray:
    """Return the positions in the sorted ``ids`` (n,) of those of ``few`` that are among them, ascending.

    The window is not sorted again.
    """
    if few is None or not len(few) or not len(ids):
        return np.empty(0, np.int64)
    position = np.minimum(np.searchsorted(ids, few), len(ids) - 1)
    return np.unique(position[ids[position] == few])


def check_included(included: int, k: int) -> None:
    """Check that the included ids fit into the coreset.

    Raises:
        ConfigError: there are more than ``k``.
    """
    if included > k:
        raise ConfigError(
            f"selection.include holds {included} samples of the window, the coreset {k}; raise budget, or list fewer"
        )


def _flat(ids: IntArray) -> Coreset:
    return Coreset(np.sort(ids), np.ones(len(ids), np.float32))


@register("sample")
def _sample(request: Request) -> Coreset:
    """Draw by Gumbel top-k: without replacement, in proportion to p; inverse-probability weights."""
    return sample_without_replacement(request.ids, request.log_p, request.k, request.seed, request.version)


@register("uniform", weighs=False)
def _uniform(request: Request) -> Coreset:
    """Draw with equal chances, again for each version."""
    return sample_without_replacement(request.ids, np.zeros(len(request.ids)), request.k, request.seed, request.version)


@register("topk")
def _topk(request: Request) -> Coreset:
    """Take the most probable ids; the lower ids of equal ones."""
    return _flat(request.ids[largest(np.asarray(request.log_p), request.k)])


@register("rs2", weighs=False)
def _rs2(request: Request) -> Coreset:
    """Take repeated random subsets (arXiv 2305.18424): a seeded order in steps of k, and a new order after its end."""
    n = len(request.ids)
    k = min(request.k, n)
    chosen = np.empty(0, np.int64)
    lap, offset = divmod(request.version * k, n) if n else (0, 0)
    while len(chosen) < k:
        order = np.argsort(random_words(request.seed, lap, _RS2, request.ids), kind="stable")
        rest = order[~np.isin(order, chosen)] if len(chosen) else order[offset:]
        chosen = np.concatenate([chosen, rest[: k - len(chosen)]])
        lap += 1
    return _flat(request.ids[chosen])


@register("facility_location", covers=True)
def _facility_location(request: Request) -> Coreset:
    """Cover the window's importance greedily along the graph; a member's weight is the importance that it covers."""
    if request.neighbours is None:
        raise ConfigError("selection.objective = 'facility_location' needs the content graph; set features.enabled: true")
    graph = coverage(request.window, request.neighbours)
    candidates = np.isin(request.window, request.ids)
    order = lazy_greedy(graph, request.weights, request.k, candidates, np.searchsorted(request.window, request.first))
    best, owner = np.zeros(len(request.window)), np.full(len(request.window), -1, np.int64)
    for j in order:
        part = slice(graph.start[j], graph.start[j + 1])
        rows, sim = graph.rows[part], graph.sim[part]
        better = sim > best[rows]
        best[rows[better]], owner[rows[better]] = sim[better], j
    share = np.bincount(owner[owner >= 0], request.weights[owner >= 0], len(request.window))[order]
    by_id = np.argsort(order)
    return Coreset(request.window[order][by_id], mean_one(share[by_id]))
