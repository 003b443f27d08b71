"""Positions of a run behind the indices that Megatron's ``cyclic`` sampler asks for.

That sampler draws the dataset's indices in a random order, seeded by the number of the pass.  A schedule is an order already,
so the draw is undone: the n-th sample that a rank is asked for is the one scheduled n-th there, as under ``single``.
"""

from __future__ import annotations

import torch

from grace_ds.data.sampler import Geometry
from grace_ds.errors import ConfigError


class CyclicPositions:
    """Position of the run of each index in the first pass; a call in any process.

    Args:
        length: of the dataset.
        geometry: of the job.
        sharded: whether each rank draws from a part of the dataset of its own (Megatron-LM's default; ``--no-data-sharding``).
        total: samples of the whole run; None: at most one pass.

    Raises:
        ConfigError: the run needs a second pass, in which an index would stand for two positions.
    """

    def __init__(self, length: int, geometry: Geometry, sharded: bool, total: int | None) -> None:
        one_pass = length - length % geometry.micro
        if total is not None and total > one_pass:
            raise ConfigError(
                f"--dataloader-type cyclic would pass {-(-total // max(one_pass, 1))} times over a dataset of {length} samples, "
                "and the schedule repeats samples by itself: use --dataloader-type single with a dataset as long as the run"
            )
        self.geometry, self.sharded = geometry, sharded
        self.drawn = one_pass // geometry.ranks if sharded else length // geometry.rows * geometry.rows
        order = torch.randperm(self.drawn, generator=torch.Generator().manual_seed(0))
        self._place = torch.empty_like(order)
        self._place[order] = torch.arange(self.drawn)
        self._place.share_memory_()  # type: ignore[no-untyped-call]

    def __call__(self, index: int) -> int:
        """Return the position of the run that ``index`` is asked for at."""
        ranks, rows, micro = self.geometry.ranks, self.geometry.rows, self.geometry.micro
        if self.sharded:
            rank, place = index // self.drawn, int(self._place[index % self.drawn])
        else:
            place, rank = divmod(int(self._place[index]), ranks)
        return place // rows * micro + rank * rows + place % rows
