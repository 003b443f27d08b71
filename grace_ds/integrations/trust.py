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
        self.call = Call()
        self.loss_fn: LossFn = loss_fn or self.call.loss

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


class Call:
    """How the job puts a batch into its module, learned from one of its own calls; until then the batch goes in whole."""

    def __init__(self) -> None:
        self.known = False
        self._args: list[tuple[str, Any]] = [("whole", None)]
        self._kwargs: dict[str, tuple[str, Any]] = {}

    def learn(self, args: tuple[Any, ...], kwargs: dict[str, Any], batch: Any) -> None:
        """Takes over a call of the module with ``batch``, parts of it, or copies of either on another device."""
        self._args = [_source(x, batch) for x in args]
        self._kwargs = {name: _source(x, batch) for name, x in kwargs.items()}
        self.known = True

    def loss(self, module: torch.nn.Module, batch: Any) -> torch.Tensor:
        """The module's loss on another batch of the same form.

        Raises:
            DataError: the output holds no scalar loss.
        """
        args = [_fetch(source, batch) for source in self._args]
        output = module(*args, **{name: _fetch(source, batch) for name, source in self._kwargs.items()})
        loss = scalar_loss(output)
        if loss is None:
            raise DataError(
                f"the model's output ({type(output).__name__}) holds no scalar loss, which the trusted probe needs; pass "
                f"loss_fn=lambda module, batch: ... to grace_ds.initialize, or set selection.alignment: false"
            )
        return loss


def _source(x: Any, batch: Any) -> tuple[str, Any]:
    """Where an argument of the module comes from: the whole batch, one of its entries, or neither."""
    if x is batch or type(x) is type(batch):
        return "whole", None
    entries = batch.items() if isinstance(batch, Mapping) else enumerate(batch) if isinstance(batch, (list, tuple)) else ()
    for key, value in entries:
        if x is value or (isinstance(x, torch.Tensor) and isinstance(value, torch.Tensor) and _same(x, value)):
            return "entry", key
    return "constant", x


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.detach().cpu(), b.detach().cpu())


def _fetch(source: tuple[str, Any], batch: Any) -> Any:
    kind, what = source
    return batch if kind == "whole" else batch[what] if kind == "entry" else what


def _to(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {key: _to(value, device) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_to(value, device) for value in tree)
    return tree
