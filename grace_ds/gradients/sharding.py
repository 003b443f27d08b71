"""Describe which part of a layer this rank holds, if a model is split over ranks.

The sketch ``P_in G P_outᵀ`` of a weight's gradient is linear in it.  A rank that holds a block of the weight's inputs or
outputs multiplies by the same block of the seeded matrix; one that holds a share of the tokens adds up only those.  The
sum over the ranks is the sketch of the whole layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

Array = TypeVar("Array", bound=np.ndarray[Any, Any])


@dataclass(frozen=True, eq=False)
class Split:
    """This rank's part of one layer; the default is the whole layer.

    Attributes:
        side: "in" or "out", the weight's side of which the rank holds block ``rank`` of ``size`` equal ones; "" for neither.
        rank, size: see ``side`` and ``gather``.
        gather: the process group whose ranks, in order, hold consecutive shares of the *input's* tokens, though each
            output gradient has all of them (sequence parallelism of a column-parallel layer); None if both have the same tokens.
        counted: False on a rank that sees the same tokens and the same weight as another rank that counts them.
        time_major: the token axis is known to come before the sample axis, even if the shape suggests otherwise.
    """

    side: str = ""
    rank: int = 0
    size: int = 1
    gather: Any = None
    counted: bool = True
    time_major: bool = False

    def block(self, side: str, matrix: Array) -> Array:
        """Return the columns of ``matrix`` (rows, width of the whole side) that belong to this rank."""
        if side != self.side or self.size == 1:
            return matrix
        width = matrix.shape[1] // self.size
        return matrix[:, self.rank * width : (self.rank + 1) * width]  # type: ignore[return-value]

    def all_tokens(self, projected: torch.Tensor) -> torch.Tensor:
        """Gather (width, tokens of all ranks) from this rank's (width, tokens).  Collective over ``gather``."""
        if self.gather is None:
            return projected
        import torch.distributed as dist

        local = projected.contiguous()
        parts = [torch.empty_like(local) for _ in range(self.size)]
        dist.all_gather(parts, local, group=self.gather)
        return torch.cat(parts, 1)


WHOLE = Split()
