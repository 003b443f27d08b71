"""Search one shard: a back end proposes candidates, exact arithmetic decides.

The back end works in float32 and is asked for a few more candidates than wanted.  Their similarity is computed again, exactly
(:mod:`grace_ds.utils.grid`), and ordered by similarity and then by id.  Equal rows are searched for once and counted by their
ids.  If a back end's last candidate might tie with the k-th neighbour, more candidates are requested.  So in large groups of
near-duplicates it is not chance that decides which ones are listed.
"""

from __future__ import annotations

import numpy as np

from grace_ds.graph.backends import Backend
from grace_ds.graph.merge import GRID, PAD, merge, pack, unpack
from grace_ds.graph.rows import Shard
from grace_ds.records import Array, FloatArray, IntArray

SLACK = 8  # candidates beyond k, so that float32 rounding in a backend rarely matters at the boundary
BLOCK = 1 << 17  # float64 numbers of one block of exact similarities: 1 MiB, so that it stays in the cache
SMALL = 1 << 19  # float64 numbers of a shard that is converted as a whole: 4 MiB
WIDE = 1 << 24  # candidates held at once while searching more widely


def search(Q: FloatArray, shard: Shard, k: int, backend: Backend) -> IntArray:
    """Search one shard; return (n, k) int64 keys (:mod:`grace_ds.graph.merge`) of the ids nearest to each query.

    Args:
        Q: (n, d) float32, distinct rows on the grid.
        shard: the index rows.
        k: ids wanted.
        backend: proposes candidates; with an exact one the result is that of an exact search, ties by the lower id.
    """
    m, d = shard.X.shape
    if not m or not len(Q):
        return np.full((len(Q), k), PAD)
    index = backend.build(shard.X, np.arange(m))
    start = np.searchsorted(shard.members[:, 0], np.arange(m + 1))
    margin = rounding(d)
    if not backend.is_exact(m):  # it misses more than rounding could, and more candidates would not repair that
        position, _ = backend.search(index, Q, min(k, m))
        return _exact(Q, shard, start, position, k)
    width = min(k + SLACK, m)
    position, approximate = backend.search(index, Q, width)
    keys = _exact(Q, shard, start, position, k)
    undecided = np.flatnonzero(_undecided(keys, approximate[:, -1], margin)) if width < m else np.empty(0, np.int64)
    while len(undecided):
        width, remaining = min(4 * width, m), []
        for part in np.array_split(undecided, -(-len(undecided) * width // WIDE)):
            position, approximate = backend.search(index, Q[part], width)
            keys[part] = _exact(Q[part], shard, start, position, k)
            remaining.append(part[_undecided(keys[part], approximate[:, -1], margin)])
        undecided = np.concatenate(remaining) if width < m else undecided[:0]
    return keys


def rounding(width: int) -> float:
    """Return how far below the k-th neighbour, in float32, a row may be and still belong in the list.

    The margin covers the rounding of both inner products.
    """
    return 2 * (width + 2) * 2.0**-24 + 2 / GRID


def _undecided(keys: IntArray, last: Array, margin: float) -> Array:
    """Return whether a row below the back end's last candidate could still be among the nearest, (n,) bool."""
    kth = unpack(keys[:, -1:]).similarity[:, 0].astype(np.float64)
    return np.isfinite(last) & (last >= kth - margin)


def _exact(Q: FloatArray, shard: Shard, start: IntArray, position: IntArray, k: int) -> IntArray:
    """Return (n, k) keys of the ids behind the candidate rows, by exact similarity.

    Args:
        Q: (n, d) float32 on the grid.
        shard: the rows that ``position`` refers to.
        start: (m + 1,) index of each row's first member.
        position: (n, j) int64, candidate rows; -1 for none.
        k: columns wanted.
    """
    count = np.diff(start)
    keys = np.empty((len(Q), k), np.int64)
    step = max(1, BLOCK // max(1, position.shape[1] * Q.shape[1]))
    X = shard.X.astype(np.float64) if shard.X.size <= min(SMALL, position.size * Q.shape[1]) else shard.X
    for lo in range(0, len(Q), step):
        at = position[lo : lo + step]
        rows = np.take(X, at, axis=0, mode="wrap").astype(np.float64, copy=False)
        similarity = np.matmul(rows, Q[lo : lo + step, :, None].astype(np.float64))
        similarity[at < 0] = -np.inf
        spread = int(count[at].max(initial=1))
        slot = start[at][:, :, None] + np.arange(spread)
        held = np.arange(spread) < count[at][:, :, None]
        ids = np.where(held, shard.members[np.where(held, slot, 0), 1], -1)
        found = pack(similarity, ids).reshape(len(at), -1)
        keys[lo : lo + step] = merge(found, found[:, :0], k)
    return keys
