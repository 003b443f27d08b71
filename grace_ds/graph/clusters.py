"""Assign rows to clusters: balanced spherical k-means on a sample, and the clusters nearest to each row.

All arithmetic is exact on the grid of :mod:`grace_ds.utils.grid`, and the sample depends on ids alone.  So any number of
ranks makes the same clusters and puts every row into the same ones.
"""

from __future__ import annotations

import numpy as np
import torch

from grace_ds.comm.base import Comm
from grace_ds.records import Array, FloatArray, IntArray
from grace_ds.utils.grid import ROW_GRID
from grace_ds.utils.hashing import splitmix64

SAMPLE_ROWS = 20  # per centroid: twice as many cost twice as much, and overlap compensates for it
ROUNDS = 10
SETTLING = 3  # last rounds, in which no centroid moves to another cluster
BALANCE = 2.0  # times the mean size: a larger cluster is split with a centroid that has less than a quarter of the mean
_BLOCK = 1 << 18  # float64 numbers of one block of similarities: 2 MiB


def draw(comm: Comm, ids: IntArray, wanted: int, *columns: Array) -> list[Array]:
    """Draw about ``wanted`` samples of all ranks by a hash of their ids, in order of id; equal on every rank.  Collective.

    Args:
        comm: of all ranks.
        ids: (n,) int64, this rank's, each on one rank only.
        wanted: expected number of samples.
        columns: (n, ...) each, values to return with the ids.

    Returns:
        The drawn ids and their columns.
    """
    total = int(comm.allreduce(np.array([len(ids)], np.int64))[0])
    share = min(1.0, wanted / max(total, 1))
    drawn = splitmix64(ids.view(np.uint64) ^ np.uint64(0x5A17_B0DD_C0DE)) <= np.uint64(min(share * 2.0**64, 2.0**64 - 2048))
    parts = [np.concatenate(comm.allgather(np.ascontiguousarray(a[drawn]))) for a in (ids, *columns)]
    order = np.argsort(parts[0], kind="stable")
    return [np.ascontiguousarray(a[order]) for a in parts]


def fit(X: FloatArray, clusters: int) -> FloatArray:
    """Return the centroids of ``X``, (c, d) float32, on the grid, distinct.

    Lloyd's rounds on the sphere; c is at most ``clusters``, and less if the sample has fewer distinct rows.

    Args:
        X: (s, d) float32, prepared rows in an order that all ranks share.
        clusters: number of centroids wanted.
    """
    rows = torch.from_numpy(X[X.any(axis=1)].astype(np.float64))
    start = np.argsort(splitmix64(np.arange(len(rows))), kind="stable")[:clusters]
    centroids = torch.unique(rows[torch.from_numpy(np.sort(start))], dim=0)
    for round_index in range(ROUNDS):
        if len(centroids) < 2:
            break
        best, assigned = _nearest_one(rows, centroids)
        centroids = _means(rows, assigned, centroids)
        if round_index < ROUNDS - SETTLING:
            _spread_out(rows, best, assigned, centroids)
    return np.ascontiguousarray(torch.unique(centroids, dim=0).numpy().astype(np.float32))


def nearest_centroids(X: FloatArray, centroids: FloatArray, overlap: int) -> Array:
    """Return the centroids nearest to each prepared row, nearest first, (n, overlap) int32.

    A row of zeros is equally far from all; it goes to the first ones.

    """
    out = np.empty((len(X), overlap), np.int32)
    table = torch.from_numpy(centroids.astype(np.float64)).T
    step = max(1, _BLOCK // len(centroids))
    for lo in range(0, len(X), step):
        block = X[lo : lo + step]
        found = (torch.from_numpy(block.astype(np.float64)) @ table).topk(overlap, dim=1).indices.numpy()
        out[lo : lo + step] = np.where(block.any(axis=1, keepdims=True), found, np.arange(overlap))
    return out


def _nearest_one(rows: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [(part @ centroids.T).max(dim=1) for part in torch.split(rows, max(1, _BLOCK // len(centroids)))]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def _means(rows: torch.Tensor, where: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Return the unit means of the clusters, on the grid; a cluster without rows keeps its centroid."""
    total = torch.zeros_like(centroids).index_add_(0, where, rows)  # exact: multiples of 2**-25 below 2**25
    count = torch.bincount(where, minlength=len(centroids))[:, None]
    mean = torch.round(total / count.clamp(min=1) * ROW_GRID) / ROW_GRID
    length = mean.square().sum(dim=1, keepdim=True).sqrt()  # exact up to the root, which rounds equally on all machines
    unit = torch.round(mean / length.clamp(min=1 / ROW_GRID) * ROW_GRID) / ROW_GRID
    return torch.where((count > 0) & (length > 0), unit, centroids)


def _spread_out(rows: torch.Tensor, best: torch.Tensor, where: torch.Tensor, centroids: torch.Tensor) -> None:
    """Move centroids of nearly empty clusters onto the middle rows of the largest ones, in place."""
    count = torch.bincount(where, minlength=len(centroids)).numpy()
    mean = len(rows) / len(centroids)
    large = [c for c in np.argsort(-count, kind="stable") if count[c] > BALANCE * mean]
    small = [c for c in np.argsort(count, kind="stable") if count[c] < mean / 4]
    similarity, cluster = best.numpy(), where.numpy()
    for c, free in zip(large, small, strict=False):
        members = np.flatnonzero(cluster == c)
        middle = members[np.argsort(similarity[members], kind="stable")[len(members) // 2]]
        centroids[free] = rows[middle]
