"""Search exactly with torch alone: a blocked matrix product and a running selection, on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from grace_ds.graph.backends import padded
from grace_ds.records import FloatArray, IntArray

INDEX_BLOCK = 4096
QUERY_BLOCK = 128  # minimum rows of a similarity block: with INDEX_BLOCK columns it is 2 MiB, and the selection twice that
SCRATCH = 1 << 18  # numbers in a block of fewer columns


@dataclass(frozen=True)
class TorchIndex:
    """Attributes: X (m, d) float32, and ids (m,) int64, both as given, not copied."""

    X: torch.Tensor
    ids: IntArray


class TorchBackend:
    """Back end that compares every query with every index row."""

    name = "torch"

    def build(self, X: FloatArray, ids: IntArray) -> TorchIndex:
        """See :class:`grace_ds.graph.backends.Backend`."""
        return TorchIndex(torch.from_numpy(np.ascontiguousarray(X, np.float32)), ids)

    def is_exact(self, rows: int) -> bool:
        """Return True."""
        return True

    def search(self, index: TorchIndex, Q: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
        """See :class:`grace_ds.graph.backends.Backend`."""
        m, kept = len(index.ids), min(k, len(index.ids))
        position = np.empty((len(Q), kept), np.int64)
        similarity = np.empty((len(Q), kept), np.float32)
        if kept:
            queries = torch.from_numpy(np.ascontiguousarray(Q, np.float32))
            # One scratch block for all products: allocating it each time costs more than the product itself.
            step = min(len(Q), max(QUERY_BLOCK, SCRATCH // m))
            scratch = torch.empty(step * min(INDEX_BLOCK, m))
            for lo in range(0, len(Q), step):
                best, where = _block(queries[lo : lo + step], index.X, kept, scratch)
                similarity[lo : lo + step] = best
                position[lo : lo + step] = where
        return padded(index.ids[position] if kept else position, similarity, k)


def _block(Q: torch.Tensor, X: torch.Tensor, k: int, scratch: torch.Tensor) -> tuple[FloatArray, IntArray]:
    """Return the top k of Q @ X.T as (values, positions), both (len(Q), k), nearest first, block by block over X."""
    best, where = np.empty((len(Q), 0), np.float32), np.empty((len(Q), 0), np.int64)
    for lo in range(0, len(X), INDEX_BLOCK):
        block = X[lo : lo + INDEX_BLOCK]
        product = torch.mm(Q, block.T, out=scratch[: len(Q) * len(block)].view(len(Q), len(block))).numpy()
        found, column = _above(product, best.min(axis=1)) if best.shape[1] == k else _best(product, k)
        best, where = np.concatenate([best, found], 1), np.concatenate([where, column + lo], 1)
        if best.shape[1] > k:
            best, kept = _best(best, k)
            where = np.take_along_axis(where, kept, 1)
    order = np.argsort(-best, axis=1)
    return np.take_along_axis(best, order, 1), np.take_along_axis(where, order, 1)


def _best(x: FloatArray, k: int) -> tuple[FloatArray, IntArray]:
    """Return the k largest of each row of ``x`` (n, m) and their positions, both (n, min(k, m)), in any order.

    NumPy selects them several times faster than torch's topk, which took two thirds of this back end's time.
    """
    n, m = x.shape
    if m <= k:
        return x.copy(), np.broadcast_to(np.arange(m), (n, m))  # a copy: x is scratch
    at = np.argpartition(x, m - k, axis=1)[:, m - k :]
    return np.take_along_axis(x, at, 1), at


def _above(x: FloatArray, threshold: FloatArray) -> tuple[FloatArray, IntArray]:
    """Return the numbers of each row of ``x`` (n, m) above that row's ``threshold`` (n,), and their positions.

    Both are (n, j), padded by -inf.  Once k are found, few numbers of a block are larger, and finding those is several times
    faster than selecting the k largest.
    """
    n, m = x.shape
    row, column = np.divmod(np.flatnonzero(x > threshold[:, None]), m)
    count = np.bincount(row, minlength=n)
    most = int(count.max(initial=0))
    values, positions = np.full((n, most), -np.inf, np.float32), np.zeros((n, most), np.int64)
    place = np.arange(len(row)) - (np.cumsum(count) - count)[row]
    values[row, place], positions[row, place] = x[row, column], column
    return values, positions
