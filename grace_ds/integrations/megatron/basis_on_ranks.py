"""Make all ranks of one model measure influences along the same trusted basis."""

from __future__ import annotations

import numpy as np

from grace_ds.gradients.basis import TrustedBasis
from grace_ds.gradients.hooks import Sketcher
from grace_ds.integrations.megatron.model_ranks import Command, ModelRanks


class BasisOnRanks:
    """The basis that the ranks of one model share.

    Args:
        ranks: that hold the model together.
        sketcher: of this rank; on ranks with the dataset its basis is set by the refresh.
    """

    def __init__(self, ranks: ModelRanks, sketcher: Sketcher) -> None:
        self.ranks, self.sketcher = ranks, sketcher
        self._sent: TrustedBasis | None = None

    def share(self) -> None:
        """Send the basis to the other ranks if it has changed; on every rank with the dataset.  Collective over the model."""
        basis = self.sketcher.basis
        if basis is self._sent:
            return
        self._sent = basis
        if basis is None:
            self.ranks.send("basis", rank=0)
            return
        self.ranks.send("basis", rank=len(basis.factors[self.sketcher.names[0]][1]), version=basis.version)
        self.ranks.broadcast(np.concatenate([array.ravel() for name in self.sketcher.names for array in basis.factors[name]]))

    def take(self, command: Command) -> None:
        """Take the basis that the leader announces with ``command``; on a rank without the dataset."""
        rank, factors, start = int(command["rank"]), {}, 0
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
        self.sketcher.set_basis(TrustedBasis(int(command["version"]), factors))
