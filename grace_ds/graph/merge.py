"""Encode neighbours as sortable integers, so that merging is sorting and does not depend on the order of merging.

A neighbour is packed into one int64: its distance (how far its similarity is below the largest possible, in grid steps)
above its id.  So ascending keys are nearest first with ties by the lower id, and equal keys are the same neighbour.
"""

from __future__ import annotations

import numpy as np

from grace_ds.errors import DataError
from grace_ds.records import Array, IntArray, Neighbours

GRID = 1 << 20  # steps of similarity per unit: a finer grid would exceed the float32 resolution of the record near 1
ID_BITS = 40
_TOP = 2 * GRID  # similarity 2: above what rows of nearly unit norm can reach, so that no distance is negative
ROWS = 8192  # rows at a time where processing all at once would need a second copy
PAD = np.iinfo(np.int64).max


def pack(similarity: Array, ids: Array) -> IntArray:
    """Return the keys of neighbours.

    Args:
        similarity: float64, any shape, within [-2, 2]; -inf for padding.
        ids: int64, broadcastable against it, in [0, 2**40); negative for padding.

    Raises:
        DataError: an id is 2**40 or above.
    """
    if ids.size and int(ids.max()) >= 1 << ID_BITS:
        raise DataError(f"dataset id {int(ids.max())} is too large for the graph: ids must be below 2**{ID_BITS}")
    empty = np.isneginf(similarity) | (ids < 0)
    distance = _TOP - np.rint(np.where(empty, 0.0, similarity) * GRID).astype(np.int64)
    return np.where(empty, PAD, (distance << ID_BITS) | np.where(empty, 0, ids))


def merge(a: IntArray, b: IntArray, k: int) -> IntArray:
    """Return the k nearest of two sets of neighbours of the same queries.

    Args:
        a: (n, j) int64 keys, this rank; in any order.
        b: (n, l) int64 keys.
        k: columns wanted.

    Returns:
        (n, k) int64 keys, ascending in a row, each neighbour once, padded by :data:`PAD`.
    """
    keys = np.concatenate([a, b], axis=1)
    keys.sort(axis=1)
    repeated = keys[:, 1:] == keys[:, :-1]
    if repeated[keys[:, 1:] != PAD].any():
        keys[:, 1:][repeated] = PAD
        keys.sort(axis=1)
    return _columns(keys, k)


def without_self(keys: IntArray, ids: IntArray, k: int) -> IntArray:
    """Return (n, k) keys with each row's own id dropped, at whatever position it is.

    Args:
        keys: (n, j) int64.
        ids: (n,) int64, the queries' own ids.
        k: columns wanted.
    """
    own = (keys & ((1 << ID_BITS) - 1)) == ids[:, None]
    keys = np.where(own & (keys != PAD), PAD, keys)
    keys.sort(axis=1)
    return _columns(keys, k)


def unpack(keys: IntArray) -> Neighbours:
    """Decode (n, k) keys that ascend in each row."""
    empty = keys == PAD
    similarity = (_TOP - (keys >> ID_BITS)) / GRID
    return Neighbours(
        ids=np.where(empty, -1, keys & ((1 << ID_BITS) - 1)),
        similarity=np.where(empty, -np.inf, similarity).astype(np.float32),
    )


def finished(keys: IntArray, ids: IntArray, k: int, exclude_self: bool) -> Neighbours:
    """Decode the collected keys (n, j), block by block; drop each row's own id first if ``exclude_self``."""
    neighbours = Neighbours(np.empty((len(keys), k), np.int64), np.empty((len(keys), k), np.float32))
    for start in range(0, len(keys), ROWS):
        part = slice(start, start + ROWS)
        decoded = unpack(without_self(keys[part], ids[part], k) if exclude_self else _columns(keys[part], k))
        neighbours.ids[part], neighbours.similarity[part] = decoded.ids, decoded.similarity
    return neighbours


def _columns(keys: IntArray, k: int) -> IntArray:
    missing = k - keys.shape[1]
    if missing > 0:
        keys = np.concatenate([keys, np.full((len(keys), missing), PAD)], axis=1)
    return np.ascontiguousarray(keys[:, :k])
