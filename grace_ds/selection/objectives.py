"""Draw a coreset by the name of an objective.

The samples stay with the ranks that own them: a built-in objective is called on every rank with the samples of that rank, and
returns the members among them.  What it needs of the others are sums, thresholds (:mod:`grace_ds.comm.statistics`) and, for
facility location, single edges.  The draw is the same for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from grace_ds import registry
from grace_ds.comm.base import Comm
from grace_ds.comm.statistics import by_lower_id, float_keys, highest, top, total
from grace_ds.errors import ConfigError
from grace_ds.records import Array, Coreset, IntArray, Neighbours
from grace_ds.selection.gumbel import ALONE, check_log_p, mean_one, random_words, sample_without_replacement
from grace_ds.selection.sharded_greedy import sharded_greedy

_RS2 = 2  # ``purpose`` of the random words of rs2; 1 is the Gumbel noise


@dataclass(frozen=True)
class Request:
    """Input of an objective: the samples of this rank, or all of them for an objective that is not ``sharded``.

    Attributes:
        ids: (n,) int64, sorted: ids that may be chosen.
        log_p: (n,) float64, unnormalised.
        k: ids wanted, over all ranks.
        seed, version: of the run and of the coreset.
        first: sorted ids among ``window`` that must be chosen; objectives other than ``facility_location`` may ignore it.
        window: (w,) int64, sorted: all samples of the window; ``neighbours`` has a row for each.
        neighbours: k-NN graph of the window; None unless the objective needs it.
        weights: (w,) float64 importance of each sample of the window.
        comm: of all ranks.
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
    comm: Comm = field(default=ALONE)


Draw = Callable[[Request], Coreset]


@dataclass(frozen=True)
class Objective:
    """How a coreset is drawn.

    Attributes:
        draw: the function that draws it.
        weighs: whether it reads the importance of the samples; if not, nothing is collected for it, and nothing explored.
        covers: whether it draws along the k-NN graph of the whole window, and handles ``first`` itself.
        sharded: whether it is called on every rank with the samples of that rank, and returns the members among them.  If not,
            all samples go to rank 0, which must have the memory for the window.
    """

    draw: Draw
    weighs: bool = True
    covers: bool = False
    sharded: bool = False


def register(name: str, *, weighs: bool = True, covers: bool = False, sharded: bool = False) -> Callable[[Draw], Draw]:
    """Decorate a function to register it as an objective under ``name``; see :class:`Objective`."""

    def add(draw: Draw) -> Draw:
        registry.objectives.register(name)(Objective(draw, weighs, covers, sharded))
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
    comm: Comm = ALONE,
) -> Coreset:
    """Draw a coreset of ``k`` samples of the window; return the members that this rank owns.  Collective.

    Args:
        name: sample | facility_location | topk | rs2 | uniform, or a registered one.
        ids: (n,) int64, sorted, unique, the samples of the window that this rank owns.
        log_p: (n,) float64, unnormalised log-probabilities; -inf for never.
        k: its size over all ranks; smaller if fewer can be chosen.
        seed, version: of the run and of the coreset.
        neighbours: k-NN graph over the window, a row for each of ``ids``, in their order; for facility_location.
        include: sorted ids that are always in (ids outside of the window are ignored); they count towards ``k``.
        exclude: sorted ids that are never in.
        comm: of all ranks; without it this rank owns all samples.

    Raises:
        ConfigError: the name is unknown, or more than ``k`` ids must be in.
        DataError: ids or log-probabilities are malformed.
    """
    objective: Objective = registry.objectives.get(name)
    log_p = check_log_p(ids, log_p)
    inside = _places(ids, include)
    first = ids[inside]
    (forced,) = total(comm, len(first))
    check_included(forced, k)
    eligible = np.isfinite(log_p)
    eligible[_places(ids, exclude)] = False
    covers = objective.covers
    if not covers:
        eligible[inside] = False
    most = highest(comm, log_p[eligible])
    weights = np.exp(log_p - most) if np.isfinite(most) else np.zeros(len(ids))
    wanted = k if covers else k - forced
    request = Request(ids[eligible], log_p[eligible], wanted, seed, version, first, ids, neighbours, weights, comm)
    drawn = objective.draw(request) if objective.sharded else _on_root(objective, request)
    if covers or not forced:
        return drawn
    joined = np.concatenate([first, drawn.ids])
    order = np.argsort(joined)
    weight = np.concatenate([np.ones(len(first), np.float32), drawn.weights])
    return Coreset(joined[order], mean_one(weight[order], comm))


def _on_root(objective: Objective, request: Request) -> Coreset:
    """Draw on rank 0, from the samples of all ranks; return the members that this rank owns.  Collective."""
    comm = request.comm
    if comm.size == 1:
        return objective.draw(request)
    by_ids = [_gathered(comm, request.ids, request.ids), _gathered(comm, request.ids, np.asarray(request.log_p))]
    first, window = _gathered(comm, request.first, request.first), _gathered(comm, request.window, request.window)
    weights, neighbours = _gathered(comm, request.window, np.asarray(request.weights)), None
    if request.neighbours is not None:
        edges = (request.neighbours.ids, request.neighbours.similarity)
        neighbours = Neighbours(*(_gathered(comm, request.window, array) for array in edges))
    drawn = Coreset(np.empty(0, np.int64), np.empty(0, np.float32))
    if comm.rank == 0:
        whole = replace(request, ids=by_ids[0], log_p=by_ids[1], first=first, window=window, weights=weights, comm=ALONE)
        drawn = objective.draw(replace(whole, neighbours=neighbours))
    ids, chosen = comm.broadcast(drawn.ids), comm.broadcast(drawn.weights)
    own = np.isin(ids, request.window)
    return Coreset(ids[own], chosen[own])


def _gathered(comm: Comm, ids: IntArray, values: Array) -> Array:
    """Return all ranks' ``values`` (n, ...) in the order of their ``ids`` (n,), on rank 0; none on the others.  Collective."""
    parts, every = comm.gather(values), comm.gather(ids)
    if parts is None or every is None:
        return values[:0]
    return np.concatenate(parts)[np.argsort(np.concatenate(every), kind="stable")]


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
    return Coreset(ids, np.ones(len(ids), np.float32))


@register("sample", sharded=True)
def _sample(request: Request) -> Coreset:
    """Draw by Gumbel top-k: without replacement, in proportion to p; inverse-probability weights."""
    return sample_without_replacement(request.ids, request.log_p, request.k, request.seed, request.version, request.comm)


@register("uniform", weighs=False, sharded=True)
def _uniform(request: Request) -> Coreset:
    """Draw with equal chances, again for each version."""
    return _sample(replace(request, log_p=np.zeros(len(request.ids))))


@register("topk", sharded=True)
def _topk(request: Request) -> Coreset:
    """Take the most probable ids; the lower ids of equal ones."""
    return _flat(request.ids[top(request.comm, request.k, float_keys(request.log_p), by_lower_id(request.ids))])


@register("rs2", weighs=False, sharded=True)
def _rs2(request: Request) -> Coreset:
    """Take repeated random subsets (arXiv 2305.18424): a seeded order in steps of k, and a new order after its end."""
    (n,) = total(request.comm, len(request.ids))
    k = min(request.k, n)
    chosen, count = np.zeros(len(request.ids), bool), 0
    lap, offset = divmod(request.version * k, n) if n else (0, 0)
    while count < k:
        rest = np.flatnonzero(~chosen)
        ids = request.ids[rest]
        words = ~random_words(request.seed, lap, _RS2, ids)  # the order of the lap is that of the words, the lowest first
        taken = top(request.comm, offset + k - count, words, by_lower_id(ids))
        if offset:
            taken &= ~top(request.comm, offset, words, by_lower_id(ids))
        chosen[rest[taken]] = True
        (count,) = total(request.comm, int(chosen.sum()))
        lap, offset = lap + 1, 0
    return _flat(request.ids[chosen])


@register("facility_location", covers=True, sharded=True)
def _facility_location(request: Request) -> Coreset:
    """Cover the window's importance greedily along the graph; a member's weight is the importance that it covers."""
    if request.neighbours is None:
        raise ConfigError("selection.objective = 'facility_location' needs the content graph; set features.enabled: true")
    candidates, first = np.isin(request.window, request.ids), np.searchsorted(request.window, request.first)
    weights = np.asarray(request.weights, np.float64)
    found = sharded_greedy(request.comm, request.window, request.neighbours, weights, request.k, candidates, first)
    return Coreset(request.window[found.positions], mean_one(found.share, request.comm))
