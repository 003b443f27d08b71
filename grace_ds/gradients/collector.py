"""Collect rows from the job's own steps: micro-batches in, committed rows and losses out, centred on their running mean."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from grace_ds.comm.base import Comm
from grace_ds.config.schema import CollectConfig
from grace_ds.errors import CheckpointError
from grace_ds.gradients.capture import CollectedRows, LossCapture, MicroBatchCapture
from grace_ds.gradients.hooks import Sketcher
from grace_ds.records import FloatArray, Losses, SampleRecords

log = logging.getLogger("grace_ds")

_MEMORY = 0.98  # decay of the running mean of the loss, per optimizer step


@dataclass(frozen=True)
class CollectedInterval:
    """What this rank measured in the steps of an interval; losses are centred on the running mean at their step.

    Attributes:
        rows: of the steps that were collected.
        losses: of all steps, including those of ``rows``; finite.
        running_mean: of the losses, after the last of these steps; None if no loss was seen.
    """

    rows: SampleRecords
    losses: Losses
    running_mean: float | None


class GradientCollector:
    """Keep what the sketcher measured until a refresh takes it.

    Args:
        sketcher: attached to the job's module.
        config: of what is collected.
    """

    def __init__(self, sketcher: Sketcher, config: CollectConfig) -> None:
        self.sketcher, self.config = sketcher, config
        self.running_mean: float | None = None  # nats per token, equal on all ranks, up to the last drained step
        self.rows_kept = 0  # rows put into the inbox so far
        self.rows_dropped = 0  # rows of steps before the layer scale was frozen, or without a finite gradient
        self.seconds = 0.0  # wall time in this class, without the hooks
        self._inbox: list[SampleRecords] = []
        self._read: list[tuple[int, LossCapture]] = []  # (step, its losses); copied from the device once per refresh

    def read(self, readings: Sequence[LossCapture], step: int) -> None:
        """Keep the losses of an optimizer step that was applied and whose gradients were not collected."""
        self._read += [(step, reading) for reading in readings if reading.losses is not None]

    def commit(self, captures: Sequence[MicroBatchCapture], step: int, grad_scale: float, comm: Comm) -> int:
        """Keep the rows of an optimizer step that was applied; return how many they are.

        The first collected step only freezes the scale of the layers and gives no rows.  It is the only collective one.

        Args:
            captures: of the step's micro-batches, on this rank.
            step: number of the optimizer step.
            grad_scale: accumulation steps divided by the loss scale.
            comm: used only while the scale is not frozen.
        """
        started, before = time.perf_counter(), self.rows_kept
        collected = [self.finish(capture, grad_scale) for capture in captures]
        if not self.sketcher.scale.frozen:
            self._freeze(comm)
            self.rows_dropped += sum(len(rows.ids) for rows in collected if rows is not None)
        else:
            self._keep([rows for rows in collected if rows is not None], step)
        self.seconds += time.perf_counter() - started
        return self.rows_kept - before

    def _keep(self, collected: Sequence[CollectedRows], step: int) -> None:
        """Put a step's rows into the inbox."""
        parts = [rows.rows(step) for rows in collected]
        kept = sum(map(len, parts))
        self.rows_dropped += sum(len(rows.ids) for rows in collected) - kept
        self.rows_kept += kept
        self._inbox += parts

    def discard(self, captures: Sequence[MicroBatchCapture]) -> None:
        """Drop the captures of a step that was not applied."""
        for capture in captures:
            self.sketcher.discard(capture)

    def pending(self, comm: Comm) -> CollectedInterval:
        """Return what has been kept so far, centred, and the running mean that :meth:`drained` will store.  Collective.

        Nothing is removed yet, so that a refresh that fails loses nothing.
        """
        rows = SampleRecords.concat(self._inbox) if self._inbox else SampleRecords.empty(self.sketcher.dim)
        losses = Losses.concat([self._losses_read(), rows.losses])
        losses = losses.take(losses.finite())
        first = int(comm.allreduce(np.array([losses.step.min(initial=2**62)], np.int64), "min")[0])
        last = int(comm.allreduce(np.array([losses.step.max(initial=-1)], np.int64), "max")[0])
        if last < first:
            return CollectedInterval(rows, losses, self.running_mean)
        at = losses.step - first
        sums = np.stack([np.bincount(at, weights, last - first + 1) for weights in (losses.loss.astype(np.float64), None)], 1)
        # Of no loss at all, as on a rank that passes no rows on, NumPy makes integers.
        means, final = _running_means(comm.allreduce(sums.astype(np.float64)), self.running_mean)
        known = np.clip(rows.step - first, 0, last - first)  # a row without a loss may belong to a step without losses
        rows = replace(rows, loss=rows.loss - means[known])
        return CollectedInterval(rows, replace(losses, loss=losses.loss - means[at]), final)

    def drained(self, running_mean: float | None) -> None:
        """Drop what :meth:`pending` returned, after it was stored in the tables, and set the running mean."""
        self.running_mean = running_mean
        self._inbox, self._read = [], []

    @property
    def total_seconds(self) -> float:
        """Wall seconds spent on collecting on this rank so far: hooks and rows (on a GPU: launching them)."""
        return self.seconds + self.sketcher.seconds

    def state_dict(self) -> dict[str, Any]:
        """Return a JSON-able state.

        It is equal on all ranks if taken right after :meth:`drained` and once the layer scale is frozen.
        """
        return {"sketcher": self.sketcher.state_dict(), "running_mean": self.running_mean}

    def check_state(self, state: dict[str, Any]) -> None:
        """Check that :meth:`load_state_dict` can restore ``state``; change nothing.

        Raises:
            CheckpointError: it belongs to other layers, another seed or other widths.
        """
        mean = state.get("running_mean", "missing")
        if not isinstance(mean, float | None) or not isinstance(state.get("sketcher"), dict):
            raise CheckpointError(f"the checkpoint's collect cannot be read (running mean {mean!r}); use another checkpoint")
        self.sketcher.check_state(state["sketcher"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`; rows not drained are dropped."""
        self.sketcher.load_state_dict(state["sketcher"])
        self.drained(state["running_mean"])

    def _losses_read(self) -> Losses:
        """Return the losses that were read and not drained yet, in that order, not centred."""
        # Summed over peers even where nothing was read: see ShardedGradientCollector.losses.
        counts = np.array([len(reading.ids) for _, reading in self._read], np.int64)
        steps = np.repeat(np.array([step for step, _ in self._read], np.int64), counts)
        ids = np.concatenate([np.empty(0, np.int64), *[reading.ids for _, reading in self._read]])
        return Losses(ids, steps, self.losses([reading for _, reading in self._read]))

    def losses(self, captures: Sequence[LossCapture]) -> FloatArray:
        """Return the losses of the samples of ``captures`` that have any, (n,) float32, nats per token."""
        found = [capture.losses for capture in captures if capture.losses is not None]
        return torch.cat(found).float().cpu().numpy() if found else np.empty(0, np.float32)  # one copy from the device

    def finish(self, capture: MicroBatchCapture, grad_scale: float, reduction: str | None = None) -> CollectedRows | None:
        """Return the rows of a capture; None if there are none.

        An error (such as out of memory) costs the rows, not the step.

        Args:
            reduction: "mean" or "sum", how the loss joins the tokens of a micro-batch; default: as the config says of the job.
        """
        try:
            return self.sketcher.finish(capture, grad_scale, reduction or self.config.reduction)
        except Exception as error:
            if not self.sketcher.failures:
                log.warning("a micro-batch gives no rows (%s: %s); training goes on", type(error).__name__, error)
            self.sketcher.failures += 1
            return None

    def _freeze(self, comm: Comm) -> None:
        total = comm.allreduce(self.sketcher.scale.sums())
        if total[-1] > 0:
            self.sketcher.scale.freeze(total)


def _running_means(sums: FloatArray, mean: float | None) -> tuple[FloatArray, float | None]:
    """Return the exponential mean up to and including each step, (steps,) float32, and the last one.

    Args:
        sums: (steps, 2) sums of losses and their counts.
        mean: before the first step; None if no loss was seen yet.
    """
    out = np.zeros(len(sums), np.float32)
    for i, (total, count) in enumerate(sums):
        if count > 0:
            step_mean = total / count
            mean = step_mean if mean is None else _MEMORY * mean + (1 - _MEMORY) * step_mean
        out[i] = 0.0 if mean is None else mean
    return out, mean
