"""The trusted set at a refresh: fits the trusted basis on one half, measures its unit on the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from grace_ds.comm.base import Comm
from grace_ds.errors import DataError
from grace_ds.features.tokens import undisturbed_rng
from grace_ds.records import IntArray
from grace_ds.sketch.basis import TrustedBasis
from grace_ds.sketch.losses import scalar_loss
from grace_ds.sketch.probe import LossFn, probe_basis, probe_rows
from grace_ds.sketch.sketcher import Sketcher

_PROBED = 256  # trusted samples a refresh looks at, in each half: the cost of the alignment


class TrustedProbe:
    """Callable: basis version → (basis, median alignment of the held-out half).  Collective.

    Args:
        module: ``engine.module``.
        sketcher: attached to it.
        dataset: trusted samples, items like those of the job's dataset.
        halves: (fit, calibrate), disjoint positions in ``dataset``.
        collate: the job's.
        rows: samples of a probe's batch.
        device: of the module.
        loss_fn: (module, batch) → mean loss; default: calls the module with the batch and takes the loss from its output.
        comm: between the ranks.
        seed: of the run.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        sketcher: Sketcher,
        dataset: Any,
        halves: tuple[IntArray, IntArray],
        collate: Callable[[list[Any]], Any],
        rows: int,
        device: torch.device,
        loss_fn: LossFn | None,
        comm: Comm,
        seed: int,
    ) -> None:
        self.module, self.sketcher, self.dataset, self.halves = module, sketcher, dataset, halves
        self.collate, self.rows, self.device, self.comm, self.seed = collate, rows, device, comm, seed
        self.style = "whole"  # how the job calls its module; kept up to date by observe()
        self.loss_fn: LossFn = loss_fn or (lambda m, batch: loss_as_called(m, batch, self.style))

    def observe(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Learns from one of the job's own calls how a batch goes into the module."""
        self.style = "keywords" if kwargs and not args else "positional" if len(args) > 1 else "whole"

    def __call__(self, version: int) -> tuple[TrustedBasis, float]:
        """The basis of number ``version`` and its unit, equal on all ranks.  Collective."""
        fit, calibrate = (self._draw(half, version) for half in self.halves)
        target = self.sketcher.accumulator(self.sketcher.rank)
        probe_basis(self.module, self._batches(fit), self.loss_fn, self.sketcher, target)
        basis = target.fit(self.comm.allreduce(target.pack()), version)
        previous = self.sketcher.basis
        self.sketcher.set_basis(basis)
        try:
            found = probe_rows(self.module, self._batches(calibrate), self.loss_fn, self.sketcher)
        finally:
            self.sketcher.set_basis(previous)
        mine = np.concatenate([h.align for h in found]) if found else np.empty(0, np.float32)
        everyone = np.concatenate(self.comm.allgather(mine))
        finite = everyone[np.isfinite(everyone)]
        if not len(finite):
            raise DataError("no trusted sample has a finite gradient; check the trusted set, or set trusted: null")
        return basis, float(np.median(finite))

    def _draw(self, half: IntArray, version: int) -> IntArray:
        """This rank's share of a half, equally many on every rank (ZeRO-3 gathers weights in step)."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, version]))
        chosen = half[rng.permutation(len(half))[:_PROBED]]
        each = max(1, len(chosen) // self.comm.size)
        at = (self.comm.rank * each + np.arange(each)) % len(chosen)
        return chosen[at]

    def _batches(self, ids: IntArray) -> Iterator[tuple[IntArray, Any]]:
        for start in range(0, len(ids), self.rows):
            part = ids[start : start + self.rows]
            with undisturbed_rng():
                batch = self.collate([self.dataset[int(i)] for i in part])
            yield part, _to(batch, self.device)


def loss_as_called(module: torch.nn.Module, batch: Any, style: str) -> torch.Tensor:
    """The loss of one batch, the module called as the job calls it: "keywords", "positional" or "whole".

    Raises:
        DataError: the output holds no scalar loss.
    """
    if style == "keywords" and isinstance(batch, Mapping):
        output = module(**batch)
    elif style == "positional" and isinstance(batch, (list, tuple)):
        output = module(*batch)
    else:
        output = module(batch)
    loss = scalar_loss(output)
    if loss is None:
        raise DataError(
            f"the model's output ({type(output).__name__}) holds no scalar loss, which the trusted probe needs; pass "
            f"loss_fn=lambda module, batch: ... to grace_ds.initialize, or set selection.alignment: false"
        )
    return loss


def _to(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {key: _to(value, device) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_to(value, device) for value in tree)
    return tree
