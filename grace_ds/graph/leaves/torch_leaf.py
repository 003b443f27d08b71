"""The exact leaf that needs nothing but torch: a blocked matrix product and a running top-k, on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from grace_ds.graph.leaves import padded
from grace_ds.records import FloatArray, IntArray

QUERY_BLOCK = 256  # rows of a similarity block; with INDEX_BLOCK columns it is 32 MiB, whatever the sizes of the shards
INDEX_BLOCK = 32_768


@dataclass(frozen=True)
class TorchIndex:
    """Attributes: X (m, d) float32, and ids (m,) int64, both as given, not copied."""

    X: torch.Tensor
    ids: IntArray


class TorchLeaf:
    """Compares every query with every index row."""

    name = "torch"

    def build(self, X: FloatArray, ids: IntArray) -> TorchIndex:
        """See :class:`grace_ds.graph.leaves.Leaf`."""
        return TorchIndex(torch.from_numpy(np.ascontiguousarray(X, np.float32)), ids)

    def is_exact(self, rows: int) -> bool:
        """Always."""
        return True

    def search(self, index: TorchIndex, Q: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
        """See :class:`grace_ds.graph.leaves.Leaf`."""
        m, kept = len(index.ids), min(k, len(index.ids))
        position = np.empty((len(Q), kept), np.int64)
        similarity = np.empty((len(Q), kept), np.float32)
        if kept:
            queries = torch.from_numpy(np.ascontiguousarray(Q, np.float32))
            # One scratch block for all products: allocating it anew costs more than the product itself.
            scratch = torch.empty(min(QUERY_BLOCK, len(Q)) * min(INDEX_BLOCK, m))
            for lo in range(0, len(Q), QUERY_BLOCK):
                best, where = _block(queries[lo : lo + QUERY_BLOCK], index.X, kept, scratch)
                similarity[lo : lo + QUERY_BLOCK] = best.numpy()
                position[lo : lo + QUERY_BLOCK] = where.numpy()
        return padded(index.ids[position] if kept else position, similarity, k)


def _block(Q: torch.Tensor, X: torch.Tensor, k: int, scratch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Top k of Q @ X.T as (values, positions), both (len(Q), k), walking over blocks of X."""
    best = torch.empty((len(Q), 0))
    where = torch.empty((len(Q), 0), dtype=torch.int64)
    for lo in range(0, len(X), INDEX_BLOCK):
        block = X[lo : lo + INDEX_BLOCK]
        product = torch.mm(Q, block.T, out=scratch[: len(Q) * len(block)].view(len(Q), len(block)))
        value, column = product.topk(min(k, len(block)), dim=1)
        best, where = torch.cat([best, value], 1), torch.cat([where, column + lo], 1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        where = where.gather(1, order)
    return best, where
