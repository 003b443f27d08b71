"""Make all ranks of one model measure influences along the same trusted basis."""

from __future__ import annotations

import numpy as np

from grace_ds.gradients.basis import TrustedBasis
from grace_ds.gradients.hooks import Sketcher
from grace_ds.integrations.megatron.model_ranks import ModelRanks, Word


class BasisOnRanks:
    """What the ranks of one model have been told of the sketcher's basis.

    Args:
        ranks: that hold the model together.
        sketcher: of this rank; on ranks with the dataset its basis is set by the refresh.
    """

    def __init__(self, ranks: ModelRanks, sketcher: Sketcher) -> None:
        self.ranks, self.sketcher = ranks, sketcher
        self._told: TrustedBasis | None = None

    def share(self) -> None:
        """Tell the other ranks if the basis has changed; on every rank with the dataset.  Collective over the model's ranks."""
        basis = self.sketcher.basis
        if basis is self._told:
            return
        self._told = basis
        if basis is None:
            self.ranks.tell("basis", rank=0)
            return
        self.ranks.tell("basis", rank=len(basis.factors[self.sketcher.names[0]][1]), version=basis.version)
        self.ranks.broadcast(np.concatenate([array.ravel() for name in self.sketcher.names for array in basis.factors[name]]))

    def take(self, word: Word) -> None:
        """Take the basis that the leader announces with ``word``; on a rank without the dataset."""
        rank, factors, start = int(word["rank"]), {}, 0
        if not rank:
            self.sketcher.set_basis(None)
            return
        packed = self.ranks.broadcast(None)
        for layer in self.sketcher.layers:
            parts = []
            for shape in ((layer.inputs, rank), (rank,), (layer.outputs, rank)):
                size = int(np.prod(shape))
                parts.append(packed[start : start + size].reshape(shape))
                start += size
            factors[layer.name] = (parts[0], parts[1], parts[2])
        self.sketcher.set_basis(TrustedBasis(int(word["version"]), factors))
