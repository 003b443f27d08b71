"""Assign each sample to a virtual bucket, and each bucket to the rank that owns it.

The bucket depends only on the sample's id; the owner of a bucket depends on the number of ranks as well.  So a change of
the world size re-assigns whole buckets and never has to look into one.
"""

from __future__ import annotations

import numpy as np

from grace_ds.records import Array, IntArray
from grace_ds.utils.hashing import splitmix64

N_BUCKETS = 4096


def bucket_of(ids: Array) -> IntArray:
    """Return the bucket of each id: (n,) int64 in [0, N_BUCKETS)."""
    return np.asarray(splitmix64(ids) & np.uint64(N_BUCKETS - 1), np.int64)


def owner_of(ids: Array, world: int) -> IntArray:
    """Return the rank that owns each id among ``world`` ranks: (n,) int64."""
    return bucket_of(ids) * world // N_BUCKETS


def buckets_of(rank: int, world: int) -> range:
    """Return the consecutive buckets that ``rank`` of ``world`` owns; empty for some ranks if ``world`` > N_BUCKETS."""
    return range(-(-rank * N_BUCKETS // world), -(-(rank + 1) * N_BUCKETS // world))


def positions_of(ids: IntArray, ids_here: IntArray) -> IntArray:
    """Return the position of each of ``ids`` (q,) in ``ids_here`` (n,), which is sorted: (q,) int64, -1 if it is not there."""
    if not len(ids_here):
        return np.full(len(ids), -1, np.int64)
    position = np.minimum(np.searchsorted(ids_here, ids), len(ids_here) - 1)
    return np.where(ids_here[position] == ids, position, -1).astype(np.int64)
