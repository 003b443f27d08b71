"""The trusted set at a refresh: one half fits the trusted basis, the other says what alignments with it are worth."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from grace_ds.comm.base import Comm
from grace_ds.errors import DataError
from grace_ds.features.tokens import undisturbed_rng
from grace_ds.records import FloatArray, IntArray
from grace_ds.selection.prior import robust_location
from grace_ds.sketch.basis import TrustedBasis
from grace_ds.sketch.losses import scalar_loss
from grace_ds.sketch.probe import LossFn, probe_basis, probe_rows
from grace_ds.sketch.sketcher import Sketcher

log = logging.getLogger("grace_ds")

_MOST, _LEAST = 256, 16  # trusted samples that a refresh looks at, in each half


def probed(share: float, interval_steps: int, batch: int) -> int:
    """Trusted samples of each half that a refresh runs through the model: ``share`` of those trained on in between."""
    return min(_MOST, max(_LEAST, round(share * interval_steps * batch / 2)))


def unit_of(align: FloatArray) -> tuple[float, float]:
    """(unit, deviation) of trusted alignments (n,): their median where it exceeds their own robust deviation, else 0.

    A filter cuts at half the median.  Where trusted samples scatter more than that, it would drop them by chance: the
    mean gradient, which the basis is fitted to, is what a few optimizer steps take away.
    """
    median, deviation = robust_location(align)
    return (median if median > deviation else 0.0), deviation


class TrustedProbe:
    """Fits the trusted basis to one half of the trusted set, and judges by the other what the last basis has measured.

    The unit belongs to the end of a basis' use, not to its beginning: right after the fit trusted samples align well, and
    within a few steps the model has moved along that direction.

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
        count: samples of each half that a refresh looks at, over all ranks.
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
        count: int,
    ) -> None:
        self.module, self.sketcher, self.dataset, self.halves = module, sketcher, dataset, halves
        self.collate, self.rows, self.device, self.comm, self.seed = collate, rows, device, comm, seed
        self.count = count
        self.call = Call()
        self.loss_fn: LossFn = loss_fn or self.call.loss

    def fit(self, version: int) -> TrustedBasis:
        """The basis number ``version`` of the trusted gradient as it is now, equal on all ranks.  Collective."""
        target = self.sketcher.accumulator(self.sketcher.rank)
        probe_basis(self.module, self._batches(self.halves[0], version), self.loss_fn, self.sketcher, target)
        return target.fit(self.comm.allreduce(target.pack()), version)

    def units(self) -> dict[int, float]:
        """Version of the basis in force → unit of the alignments harvested with it, by the model as it is now.  Collective.

        0 where they cannot be judged by, no entry without a basis.  Equal on all ranks.

        Raises:
            DataError: no trusted sample has a finite gradient.
        """
        if self.sketcher.basis is None:
            return {}
        version = self.sketcher.basis.version
        found = probe_rows(self.module, self._batches(self.halves[1], version), self.loss_fn, self.sketcher)
        mine = np.concatenate([h.align for h in found]) if found else np.empty(0, np.float32)
        everyone = np.concatenate(self.comm.allgather(mine))
        everyone = everyone[np.isfinite(everyone)]
        if not len(everyone):
            raise DataError("no trusted sample has a finite gradient; check the trusted set, or set trusted: null")
        unit, deviation = unit_of(everyone)
        if self.comm.rank == 0:
            median = float(np.median(everyone))
            verdict = "used" if unit else "left out, as a single sample cannot be told from chance"
            log.info("alignment with basis %d: trusted median %.3f, deviation %.3f: %s", version, median, deviation, verdict)
        return {version: unit}

    def _draw(self, half: IntArray, version: int) -> IntArray:
        """This rank's share of a half, equally many on every rank (ZeRO-3 gathers weights in step)."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, version]))
        chosen = half[rng.permutation(len(half))[: self.count]]
        each = max(1, len(chosen) // self.comm.size)
        at = (self.comm.rank * each + np.arange(each)) % len(chosen)
        return chosen[at]

    def _batches(self, half: IntArray, version: int) -> list[tuple[IntArray, Any]]:
        """This rank's batches of a half for one probe.  Collective.

        All are read before the probe begins: ZeRO-3 gathers weights inside of it, so a rank whose data fail in the middle
        would leave the others waiting in the job's own collective.
        """
        ids = self._draw(half, version)
        parts = [ids[start : start + self.rows] for start in range(0, len(ids), self.rows)]
        with undisturbed_rng():
            batches = [self.collate([self.dataset[int(i)] for i in part]) for part in parts]
        moved = [(part, _to(batch, self.device)) for part, batch in zip(parts, batches, strict=True)]
        self.comm.agree()
        return moved


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
