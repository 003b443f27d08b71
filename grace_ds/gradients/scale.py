"""Keep the per-layer scale: measured over the first collected batches, then frozen, so that old and new sketches compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from grace_ds.errors import CheckpointError, ConfigError

Sums = npt.NDArray[np.float64]


class LayerScale:
    """The scale sigma of each layer, 1 until frozen, and the sums it is computed from.

    Attributes:
        sigma: (layers,) float64, equal on all ranks.
        frozen: whether ``sigma`` is final.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.sigma = np.ones(len(self.names))
        self.frozen = False
        self._sums: Sums = np.zeros(len(self.names) + 1)

    def by_name(self) -> dict[str, float]:
        """Return the scale keyed by the layer's global name."""
        return dict(zip(self.names, self.sigma.tolist(), strict=True))

    def add(self, squares: npt.NDArray[np.float64]) -> None:
        """Add the squared layer lengths (n, layers) of n samples; ignore samples without a finite gradient."""
        if not self.frozen:
            usable = np.isfinite(squares).all(1) & (squares.sum(1) > 0)
            self._sums += np.append(squares[usable].sum(0), usable.sum())

    def sums(self) -> npt.NDArray[np.float64]:
        """Return this rank's sums of squared layer lengths, then its number of samples, (layers + 1,) float64."""
        return np.array(self._sums)

    def freeze(self, sums: npt.NDArray[np.float64]) -> None:
        """Fix sigma from ``sums`` (layers + 1,), already summed over the ranks.

        A layer whose gradient was zero throughout (such as one before a zero-initialised layer) takes the median sigma.
        """
        count = float(sums[-1]) if len(sums) else 0.0
        if len(sums) != len(self.names) + 1 or count < 1:
            raise ConfigError(
                f"a scale for {len(self.names)} layers needs a sum for each and at least one sample; got "
                f"{len(sums) - 1} sums and {count:g} samples: collect some batches before freezing"
            )
        rms = np.sqrt(np.asarray(sums[:-1], np.float64) / count)
        usable = np.isfinite(rms) & (rms > 0)
        fallback = float(np.median(rms[usable])) if usable.any() else 1.0
        self.sigma = np.where(usable, rms, fallback)
        self.frozen = True
        self._sums = np.array(sums, np.float64)  # equal on all ranks, as a checkpoint's shared part must be

    def state_dict(self) -> dict[str, Any]:
        """Return the state as primitives (JSON-able).

        It is equal on all ranks once frozen; before that the sums are this rank's.
        """
        return {"sigma": self.by_name(), "frozen": self.frozen, "sums": self.sums().tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved scale.

        Raises:
            CheckpointError: as :meth:`read`.
        """
        self.sigma, self.frozen, self._sums = self.read(state)

    def read(self, state: Mapping[str, Any]) -> tuple[Sums, bool, Sums]:
        """Return ``sigma``, ``frozen`` and the sums of a saved scale in this scale's order of layers; change nothing.

        Raises:
            CheckpointError: ``state`` belongs to other layers, or is not a scale.
        """
        try:
            saved, frozen, sums = dict(state["sigma"]), bool(state["frozen"]), list(state["sums"])
            by_name = dict(zip(saved, sums, strict=False))
            if sorted(saved) != sorted(self.names):
                odd = sorted(set(saved) ^ set(self.names))
                raise CheckpointError(
                    f"the checkpoint sketched other layers than this run ({len(odd)} differ, e.g. {odd[0]}); restore the "
                    "old collect.layers, or start without the old GRACE state"
                )
            sigma = np.array([saved[name] for name in self.names], np.float64)
            return sigma, frozen, np.array([by_name[name] for name in self.names] + [sums[-1]], np.float64)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"the checkpoint's layer scale cannot be read ({error!r}); use another checkpoint") from error
