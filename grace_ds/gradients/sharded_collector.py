"""Collect rows of a model that is spread over several ranks: each rank keeps its part, and one sum per window joins them.

Everything that a rank has of a row is a sum over the ranks' parts: the folded sketch, the inner product with the trusted
gradient, the sum of the tokens' losses and their number, the hidden state.  So one all-reduce over the ranks that hold the
model together, at the end of the window, gives the rows.  Only their lengths, cosines and means are computed afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from grace_ds.comm.base import Comm
from grace_ds.config.schema import CollectConfig
from grace_ds.gradients.capture import CollectedRows, LossCapture, MicroBatchCapture, Plan, row_factor
from grace_ds.gradients.collector import CollectedInterval, GradientCollector
from grace_ds.gradients.hooks import Sketcher
from grace_ds.records import HIDDEN, Array, FloatArray, IntArray, Losses, SampleRecords

_BESIDE = 3  # columns between sketch and hidden state: inner product, sum of losses, number of tokens


@dataclass(frozen=True)
class Part:
    """This rank's part of the rows of one micro-batch.

    Attributes:
        ids: (n,) int64.
        step: optimizer step.
        values: (n, dim + 3 + HIDDEN) float32; see the module.  All NaN if this rank failed, so that the sum is dropped.
        plan: the projections in force.
        grad_scale: accumulation steps divided by the loss scale, of the step.
    """

    ids: IntArray
    step: int
    values: npt.NDArray[np.float32]
    plan: Plan
    grad_scale: float


class Peers(Protocol):
    """What sums over the ranks that hold one model together: a transport of their own, or a part of another."""

    @property
    def size(self) -> int:
        """Number of these ranks."""

    def allreduce(self, array: Array) -> Array:
        """Return the sum over these ranks, the same bits on all of them."""


class ShardedGradientCollector(GradientCollector):
    """Collector on each rank that holds a part of the model.

    Args:
        sketcher: over all layers of the model, those of other ranks included.
        config: what to collect.
        peers: the ranks that hold one model together; they commit the same micro-batches in the same order.
        leader: whether this rank passes the rows on; exactly one of the peers does.
        counts_losses: whether this rank's losses count: tensor-parallel peers all have the same ones.
    """

    def __init__(self, sketcher: Sketcher, config: CollectConfig, peers: Peers, leader: bool, counts_losses: bool = True) -> None:
        super().__init__(sketcher, config)
        self.peers, self.leader, self.counts_losses = peers, leader, counts_losses
        self.summed_bytes = 0  # bytes given to all-reduces over the peers so far, on this rank
        self._parts: list[Part] = []

    def commit(self, captures: Sequence[MicroBatchCapture], step: int, grad_scale: float, comm: Comm | None) -> int:
        """Keep this rank's parts of the rows of an optimizer step that was applied; return of how many rows they are whole.

        The first collected step only gives the layers' scale and no rows.  It costs one sum of the unfolded sketches.

        Args:
            captures: of the step's micro-batches.
            step: number of the optimizer step.
            grad_scale: accumulation steps divided by the loss scale.
            comm: between the data-parallel replicas, on the leaders at least; None elsewhere.
        """
        started, whole = time.perf_counter(), 0
        if self.sketcher.scale.frozen:
            parts = [self._part(capture, step, grad_scale) for capture in captures]
            whole = sum(len(part.ids) for part in parts if np.isfinite(part.values).all())
            self._parts += parts
        else:
            self._measure(captures, grad_scale, comm)
        self.discard(captures)
        self.seconds += time.perf_counter() - started
        return whole

    def read(self, readings: Sequence[LossCapture], step: int) -> None:
        """Keep the losses of an optimizer step that was applied and whose gradients were not collected."""
        self._read += [(step, reading) for reading in readings]  # the peers must agree on which: this rank may have seen none

    def _losses_read(self) -> Losses:
        """Return the losses that were read and not drained yet; only the leader has any.  Collective over the peers."""
        found = super()._losses_read()
        return found if self.leader else Losses.empty()

    def losses(self, captures: Sequence[LossCapture]) -> FloatArray:
        """Return the losses of all samples of ``captures``, (n,) float32, NaN where no peer has one.

        Collective over the peers.
        """
        # Even for no capture: another model's ranks may have some, and the sums of all models may be one exchange.
        sums, tokens = self._sum(
            np.concatenate([np.empty((2, 0), np.float32), *[np.stack(self._sums_of(c)) for c in captures]], 1)
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(sums / tokens, np.float32)

    def finish(self, capture: MicroBatchCapture, grad_scale: float, reduction: str | None = None) -> CollectedRows | None:
        """Return the rows of a capture, on all peers.  Collective over the peers."""
        if not self.sketcher.scale.frozen:
            self._add_to_scale([capture], grad_scale, reduction or self.config.reduction)
        part = self._part(capture, 0, grad_scale)
        self.sketcher.discard(capture)
        return self._rows(part, self._sum(part.values), reduction or self.config.reduction)

    def pending(self, comm: Comm | None) -> CollectedInterval:
        """Return the interval as :meth:`GradientCollector.pending` does; only the leader has rows.  Collective over the peers."""
        found = self.collect()
        for step in sorted({step for step, _ in found}):
            self._keep([rows for row_step, rows in found if row_step == step], step)
        if comm is None:
            self._losses_read()
            return CollectedInterval(SampleRecords.empty(self.sketcher.dim), Losses.empty(), self.running_mean)
        return super().pending(comm)

    def collect(self) -> list[tuple[int, CollectedRows]]:
        """Return (step, rows) of every micro-batch committed since the last call; empty except on the leader.

        Collective over the peers.
        """
        parts, self._parts = self._parts, []
        none = np.empty((0, self.sketcher.dim + _BESIDE + HIDDEN), np.float32)
        total, start, found = self._sum(np.concatenate([none, *[p.values for p in parts]])), 0, []
        for part in parts if self.leader else ():
            rows = self._rows(part, total[start : start + len(part.ids)], self.config.reduction)
            found.append((part.step, rows))
            start += len(part.ids)
        return found

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _part(self, capture: MicroBatchCapture, step: int, grad_scale: float) -> Part:
        losses, tokens = self._sums_of(capture)
        try:
            linear, hidden = capture.linear(self.sketcher.scale.sigma), capture.pooled()
            values = np.concatenate([linear, losses[:, None], tokens[:, None], hidden], 1)
            if not self._whole(capture):
                values = np.full_like(values, np.nan)
        except Exception:  # the peers will add up this micro-batch: it must be present, and marked as invalid
            self.sketcher.failures += 1
            values = np.full((len(capture.ids), self.sketcher.dim + _BESIDE + HIDDEN), np.nan, np.float32)
        return Part(capture.ids, step, values.astype(np.float32), capture.plan, grad_scale)

    def _whole(self, capture: MicroBatchCapture) -> bool:
        """Return whether every layer that is sketched on this rank has received its gradient."""
        here = {i for i, layer in enumerate(self.sketcher.layers) if layer.here}
        return not capture.spoiled and not capture.closed and here <= capture.seen

    def _rows(self, part: Part, values: npt.NDArray[np.float32], reduction: str) -> CollectedRows:
        dim = self.sketcher.dim
        tokens = values[:, dim + 2]
        known = np.isfinite(tokens).all() and (tokens > 0).any()
        counts = np.rint(tokens).astype(np.int64) if known else None
        factor = row_factor(len(part.ids), part.grad_scale, reduction, counts)
        with np.errstate(invalid="ignore", divide="ignore"):
            loss = (values[:, dim + 1] / tokens).astype(np.float32)
        product = None if part.plan.strength is None else values[:, dim]
        hidden = values[:, dim + _BESIDE :]
        return part.plan.rows(part.ids, values[:, :dim], product, loss, hidden, self.sketcher.scale.sigma, factor)

    def _sum(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if self.peers.size == 1:
            return values
        self.summed_bytes += values.nbytes
        return self.peers.allreduce(values)

    # -- the layers' scale ---------------------------------------------------------------------------------------------

    def _measure(self, captures: Sequence[MicroBatchCapture], grad_scale: float, comm: Comm | None) -> None:
        """Freeze the scale of the layers from one step, equal on all ranks.  Collective over the peers and over ``comm``."""
        self._add_to_scale(captures, grad_scale, self.config.reduction)
        if self.leader:
            self.rows_dropped += sum(len(capture.ids) for capture in captures)
        sums = self.sketcher.scale.sums()
        if comm is not None:
            sums = comm.allreduce(sums)
        shared_sums = self.peers.allreduce(sums if self.leader else np.zeros_like(sums))
        if shared_sums[-1] > 0:
            self.sketcher.scale.freeze(shared_sums)

    def _add_to_scale(self, captures: Sequence[MicroBatchCapture], grad_scale: float, reduction: str) -> None:
        """Add the captures' sketches, layer by layer, to the sums that the scale is made of.  Collective over the peers."""
        parts = [np.empty((0, len(self.sketcher.layers) * self.sketcher.rank**2 + 1), np.float32)]
        parts += [np.concatenate([self._coordinates(capture), self._sums_of(capture)[1][:, None]], 1) for capture in captures]
        total, start = self._sum(np.concatenate(parts).astype(np.float32)), 0
        for capture in captures if self.leader else ():
            rows = total[start : start + len(capture.ids)]
            start += len(capture.ids)
            tokens = rows[:, -1]
            counts = np.rint(tokens).astype(np.int64) if np.isfinite(tokens).all() and (tokens > 0).any() else None
            factor = row_factor(len(rows), grad_scale, reduction, counts)
            squares = np.square(rows[:, :-1].reshape(len(rows), len(self.sketcher.layers), -1), dtype=np.float64).sum(2)
            self.sketcher.scale.add(squares * (factor[:, None] * capture.plan.unit) ** 2)

    def _coordinates(self, capture: MicroBatchCapture) -> npt.NDArray[np.float32]:
        coordinates = capture.coordinates().reshape(len(capture.ids), -1)
        return coordinates if self._whole(capture) else np.full_like(coordinates, np.nan)

    def _sums_of(self, capture: MicroBatchCapture | LossCapture) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return, per sample, the sum of its tokens' losses and their number, (n,) each; 0 where this rank counts none."""
        n = len(capture.ids)
        if capture.losses is None or capture.tokens is None or not self.counts_losses:
            return np.zeros(n, np.float32), np.zeros(n, np.float32)
        tokens = capture.tokens.cpu().numpy().astype(np.float32)
        mean = capture.losses.float().cpu().numpy()
        return np.where(tokens > 0, mean * tokens, 0.0).astype(np.float32), tokens
