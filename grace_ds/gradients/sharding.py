"""Describe which part of a layer this rank holds, if a model is split over ranks, and which of its sums are this rank's.

The sketch ``P_in G P_outᵀ`` of a weight's gradient is linear in it.  A rank that holds a block of the weight's inputs or
outputs multiplies by the same block of the seeded matrix; one that holds a share of the tokens adds up only those.  The
sum over the ranks is the sketch of the whole layer.  The same holds for both sketches of the trusted gradient, ``G Ω`` and
``Ψ G``.

A second moment is not linear.  Its sketch ``A Ω = Σ_t a_t (aᵀ_t Ω)`` needs, on the side that lies in blocks, the product of
every token with the *whole* Ω: the sum of the ranks' (r, tokens) products, r numbers a token (:meth:`Split.whole`).  With it
each rank has exactly its block of the rows of A Ω.  Without it, the pairs of features that lie on different ranks are lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from grace_ds.records import IntArray

Array = TypeVar("Array", bound=np.ndarray[Any, Any])


@dataclass(frozen=True, eq=False)
class Split:
    """This rank's part of one layer; the default is the whole layer.

    Attributes:
        side: "in" or "out", the weight's side of which the rank holds block ``rank`` of ``size``; "" for neither.
        rank, size: see ``side``.
        group: the process group of the ranks that hold the blocks, in their order; None if ``size`` is 1.
        scattered: the ranks of ``group``, in order, hold consecutive shares of the *input's* tokens, though each output
            gradient has all of them (sequence parallelism of a column-parallel layer).
        counted: False on a rank that sees the same tokens and the same weight as another rank that counts them.
        time_major: the token axis is known to come before the sample axis, even if the shape suggests otherwise.
        held: (w,) int64, the features of ``side`` in this rank's block, in its order; None: equal blocks, one after another.
    """

    side: str = ""
    rank: int = 0
    size: int = 1
    group: Any = None
    scattered: bool = False
    counted: bool = True
    time_major: bool = False
    held: IntArray | None = None

    def columns(self, side: str, width: int) -> slice | IntArray:
        """Return which of a side's ``width`` features this rank holds."""
        if side != self.side or self.size == 1:
            return slice(0, width)
        if self.held is not None:
            return self.held
        block = width // self.size
        return slice(self.rank * block, (self.rank + 1) * block)

    def block(self, side: str, matrix: Array) -> Array:
        """Return the columns of ``matrix`` (rows, width of the whole side) that belong to this rank."""
        return matrix[:, self.columns(side, matrix.shape[1])]  # type: ignore[return-value]

    def adds(self, side: str) -> bool:
        """Return whether this rank's tokens on ``side`` are its own: no other rank of ``group`` adds the same products."""
        return side == self.side or self.rank == 0 or (self.scattered and side == "in")

    @property
    def of_mean(self) -> float:
        """Factor of this rank's mean over the input's tokens, such that the sum over ``group`` is the mean over all tokens."""
        return 1 / self.size if self.scattered else float(self.rank == 0)

    def whole(self, side: str, projected: torch.Tensor) -> torch.Tensor:
        """Return the projections (k, tokens) of whole features from those of each rank's block.  Collective over ``group``.

        It is ``projected`` itself, without a collective, where this rank holds all features of ``side``.
        """
        if side != self.side or self.size == 1:
            return projected
        import torch.distributed as dist

        total = projected.to(torch.float32, copy=True).contiguous()
        dist.all_reduce(total, group=self.group)
        return total.to(projected.dtype)

    def all_tokens(self, projected: torch.Tensor) -> torch.Tensor:
        """Gather (k, tokens of all ranks) from this rank's (k, tokens) of the input.  Collective over ``group`` if scattered."""
        if not self.scattered:
            return projected
        import torch.distributed as dist

        local = projected.contiguous()
        parts = [torch.empty_like(local) for _ in range(self.size)]
        dist.all_gather(parts, local, group=self.group)
        return torch.cat(parts, 1)

    def own_tokens(self, projected: torch.Tensor) -> torch.Tensor:
        """Return the columns of ``projected`` (k, tokens of all ranks) for the tokens of this rank's input."""
        return projected.chunk(self.size, 1)[self.rank] if self.scattered else projected


WHOLE = Split()
