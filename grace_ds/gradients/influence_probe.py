"""Probe the trusted set at a refresh: one half fits the trusted basis, the other calibrates influences along it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from grace_ds.comm.all_ranks import run_on_all_ranks
from grace_ds.comm.base import Comm
from grace_ds.data.in_flight import IssuedBatch
from grace_ds.errors import DataError
from grace_ds.features.quality import robust_location
from grace_ds.gradients.basis import TrustedBasis
from grace_ds.gradients.hooks import Sketcher
from grace_ds.gradients.job_call import JobCall
from grace_ds.gradients.kfac import whiten
from grace_ds.gradients.losses import scalar_loss
from grace_ds.gradients.probe import LossFn, probe_basis, probe_losses, probe_rows
from grace_ds.gradients.probe_items import SampleForm
from grace_ds.records import FloatArray, IntArray
from grace_ds.utils.rng import undisturbed_rng

log = logging.getLogger("grace_ds")

_MOST, _LEAST = 768, 16  # maximum samples probed by a refresh in total; minimum in each of its three probes
_MEMORY = 0.8  # decay of the trusted gradient, from one basis to the next
FORWARDS = 64  # trusted samples whose losses a refresh reads, over all ranks: one forward pass each


@dataclass(frozen=True)
class Probes:
    """Numbers of samples of a refresh's three probes, summed over all ranks.

    Attributes:
        pool: pool samples, for the second moments that the trusted gradient is divided by.
        fit: samples of the fitting half of the trusted set, for the gradient.
        judge: samples of the other half.
    """

    pool: int
    fit: int
    judge: int

    @staticmethod
    def of(share: float, interval_steps: int, batch: int) -> Probes:
        """Return the sizes for ``share`` of the samples trained on in an interval.

        Most of them go to the gradient, because a mean over few samples is mostly noise.
        """
        total = min(_MOST, round(share * interval_steps * batch))
        pool, judge = max(_LEAST, round(total / 9)), max(_LEAST, round(total / 3))
        return Probes(pool, max(_LEAST, total - pool - judge), judge)


@dataclass(frozen=True)
class Fitted:
    """Result of a refresh's probes; equal on all ranks.

    Attributes:
        basis: to measure influences by.
        unit: of influences along the basis; 0 if they cannot be used.
        gradient: the trusted gradient behind the basis, earlier ones included with decay; the next fit continues from it.
    """

    basis: TrustedBasis
    unit: float
    gradient: TrustedBasis


def unit_of(influence: FloatArray) -> tuple[float, float]:
    """Return (unit, standard error) of trusted influences (n,).

    The unit is their median if it exceeds two of its standard errors, else 0.  Below that the two halves of the trusted set
    do not even agree on the sign, and influences cannot be used.
    """
    median, deviation = robust_location(influence)
    error = 1.2533 * deviation / np.sqrt(len(influence))  # of a median: sqrt(pi / 2) times a mean's
    return (median if median > 2 * error else 0.0), float(error)


class InfluenceProbe:
    """Fit the trusted basis on one half of the trusted set, and check its influences on the other half, which chooses nothing.

    A refresh probes few samples, different ones each time, and remembers the gradients of earlier ones.

    Args:
        module: ``engine.module``.
        sketcher: attached to it.
        dataset: trusted samples, items like those of the job's dataset.
        halves: two disjoint sets of positions in ``dataset``.
        pool: the job's own dataset; the trusted gradient is divided by its second moments.
        collate: the job's collate function.
        rows: samples per batch of a probe.
        device: of the module.
        loss_fn: (module, batch) → mean loss; default: call the module as the job does and take the loss from its output.
        comm: between the ranks.
        seed: of the run.
        count: sizes of the probes.
        form: what a sample must look like to be probed.

    Attributes:
        ready: whether probes can be made; equal on all ranks.  Without a ``loss_fn`` it is False until :meth:`settle` succeeds.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        sketcher: Sketcher,
        dataset: Any,
        halves: tuple[IntArray, IntArray],
        pool: Any,
        collate: Callable[[list[Any]], Any],
        rows: int,
        device: torch.device,
        loss_fn: LossFn | None,
        comm: Comm,
        seed: int,
        count: Probes,
        form: SampleForm | None = None,
    ) -> None:
        self.module, self.sketcher, self.dataset, self.halves, self.pool = module, sketcher, dataset, halves, pool
        self.collate, self.rows, self.device, self.comm, self.seed = collate, rows, device, comm, seed
        self.count, self.form = count, form or SampleForm()
        self.gradient: TrustedBasis | None = None  # behind the basis in force, earlier ones included
        self.probed = 0  # samples that this rank has run through the model in probes
        self.call = JobCall() if loss_fn is None else None
        self.loss_fn: LossFn = loss_fn or self._repeat
        self.ready = self._settled = loss_fn is not None
        self._steps = 0  # optimizer steps counted by :meth:`asks`

    # -- the job's call ------------------------------------------------------------------------------------------------

    def saw(self, args: tuple[Any, ...], kwargs: dict[str, Any], issued: IssuedBatch) -> None:
        """Learn from the start of a training forward: the job has called its module with the batch ``issued``."""
        if self.call is not None and self.call.watching:
            self.call.learn(args, kwargs, issued)

    def returned(self, output: Any) -> None:
        """Learn from the output of that forward."""
        if self.call is not None:
            self.call.returned(output)

    def asks(self, refresh: bool) -> bool:
        """Return whether to call :meth:`settle` after this optimizer step.

        Equal on all ranks.  Every rank calls it at every step.

        Args:
            refresh: whether a refresh follows.
        """
        if self.call is None:
            return False
        self._steps += 1
        return refresh or not (self._settled or self._steps & (self._steps - 1))  # at steps 1, 2, 4, 8, ...

    def settle(self) -> str:
        """Agree over all ranks on whether a probe can repeat the job's call.  Collective.

        Returns:
            The reason why it cannot; empty if it can.
        """
        assert self.call is not None
        # A gradient that exists already comes from a checkpoint: an earlier process of the run has proven the call.
        known = self.call.known(proven=self.gradient is not None)
        answer = [known, known and self.call.seen > 1, self.call.obstacle()]
        answers = [json.loads(x.tobytes()) for x in self.comm.allgather(np.frombuffer(json.dumps(answer).encode(), np.uint8))]
        self.ready, self._settled = all(known for known, _, _ in answers), all(seen_twice for _, seen_twice, _ in answers)
        self.call.look_again()
        why = next((f"{reason} (rank {rank})" for rank, (_, _, reason) in enumerate(answers) if reason), "")
        self.ready = self.ready and not why
        return why

    def _repeat(self, module: torch.nn.Module, batch: Any) -> torch.Tensor:
        """Return the loss of the job's own call of the module, made with another batch."""
        assert self.call is not None
        args, kwargs = self.call.rebuild(batch)
        output = module(*args, **kwargs)
        loss = scalar_loss(output)
        if loss is None:
            raise DataError(
                f"the model's output ({type(output).__name__}) holds no scalar loss, which the trusted probe needs; pass "
                f"loss_fn=lambda module, batch: ... to grace_ds.initialize, or set recipe: content"
            )
        return loss

    # -- the probes ----------------------------------------------------------------------------------------------------

    def fit(self, version: int, window: IntArray) -> Fitted:
        """Fit basis number ``version`` to the model as it is now; change no state yet.  Collective.

        Args:
            version: number of the fit within the run.
            window: (n,) int64, the pool samples that the next schedules choose from.

        Raises:
            DataError: no trusted sample has a finite gradient, or the probed pool samples have none.
        """
        fitting, judging = self.halves
        moments = self.sketcher.moments()
        batches = self._batches(self.pool, self._draw(window, version, 1, self.count.pool), "pool")
        probe_basis(self.module, batches, self.loss_fn, self.sketcher, moments)
        second = moments.fit(self.comm.allreduce(moments.pack()))
        target = self.sketcher.accumulator(self.sketcher.rank)
        batches = self._batches(self.dataset, self._draw(fitting, version, 2, self.count.fit))
        probe_basis(self.module, batches, self.loss_fn, self.sketcher, target)
        gradient = target.fit(self.comm.allreduce(target.pack()), version)
        if self.gradient is not None:
            gradient = gradient.plus(self.gradient, _MEMORY ** (version - self.gradient.version))
        scale = dict(zip(self.sketcher.names, self.sketcher.scale.sigma.tolist(), strict=True))
        basis = whiten(gradient, second, scale)
        return Fitted(basis, self._unit(basis, self._draw(judging, version, 3, self.count.judge)), gradient)

    def losses(self, version: int) -> FloatArray:
        """Return the losses of some trusted samples under the current model, (n,) float32, nats per token.  Collective.

        Equal on all ranks; each ``version`` takes other samples.  They come from the fitting half, because the other half chooses
        nothing.
        """
        ids = self._draw(self.halves[0], version, 0, FORWARDS)
        local = probe_losses(self.module, self._batches(self.dataset, ids), self.loss_fn)
        all_losses: FloatArray = np.concatenate(self.comm.allgather(local))
        return all_losses[np.isfinite(all_losses)]

    def _unit(self, basis: TrustedBasis, ids: IntArray) -> float:
        before = self.sketcher.basis
        self.sketcher.set_basis(basis)
        try:
            collected = probe_rows(self.module, self._batches(self.dataset, ids), self.loss_fn, self.sketcher)
        finally:
            self.sketcher.set_basis(before)
        local = np.concatenate([rows.influence * rows.norm for rows in collected]) if collected else np.empty(0, np.float32)
        influences = np.concatenate(self.comm.allgather(local.astype(np.float32)))
        influences = influences[np.isfinite(influences)]
        if not len(influences):
            raise DataError("no trusted sample has a finite gradient; check the trusted set, or set recipe: content")
        unit, error = unit_of(influences)
        if self.comm.rank == 0:
            use = "used" if unit else "left out: the trusted halves do not agree"
            message = "basis %d: median influence of the other trusted half %.3g, standard error %.2g: %s"
            log.info(message, basis.version, float(np.median(influences)), error, use)
        return unit

    def _draw(self, ids: IntArray, version: int, purpose: int, count: int) -> IntArray:
        """Return this rank's ids of a probe, equally many on every rank (ZeRO-3 gathers weights in step)."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, 4 * version + purpose]))
        chosen = rng.permutation(ids)[:count] if len(ids) < 4 * count else rng.choice(ids, count)
        each = max(1, len(chosen) // self.comm.size)
        at = (self.comm.rank * each + np.arange(each)) % len(chosen)
        return np.asarray(chosen[at], np.int64)

    def _batches(self, dataset: Any, ids: IntArray, which: str = "trusted") -> list[tuple[IntArray, Any]]:
        """Return this rank's batches of one probe.  Collective.

        All samples are read and checked before the probe begins.  ZeRO-3 gathers weights inside the probe, so a rank whose data
        fail in the middle would leave the others waiting in the job's own collective.

        Args:
            dataset: to read from.
            ids: (n,) int64, positions in ``dataset``.
            which: name of the samples in messages.

        Raises:
            DataError: a sample cannot be probed; raised on every rank.
        """
        parts = [ids[start : start + self.rows] for start in range(0, len(ids), self.rows)]

        def read() -> list[tuple[IntArray, Any]]:
            with undisturbed_rng():
                batches = [self.form.batch(dataset, part, self.collate, which) for part in parts]
            moved = [(part, _to(batch, self.device)) for part, batch in zip(parts, batches, strict=True)]
            if self.call is not None:
                for _, batch in moved:
                    self.call.rebuild(batch)
            return moved

        moved = run_on_all_ranks(self.comm, read)
        self.probed += len(ids)
        return moved


def _to(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {key: _to(value, device) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        moved = [_to(value, device) for value in tree]
        return type(tree)(*moved) if hasattr(tree, "_fields") else type(tree)(moved)
    return tree
