"""Run a probe's samples through a model of a Megatron job, which may lie on several ranks, by the job's own schedule.

The ranks with the dataset call these methods in a refresh; the other ranks of the model execute the leader's commands, by the
same methods of :class:`ModelRuns`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn
from torch.utils.data import default_collate

from grace_ds.comm.base import Comm
from grace_ds.gradients.basis import BasisAccumulator
from grace_ds.gradients.capture import CollectedRows, HookSink, LossCapture, MicroBatchCapture
from grace_ds.gradients.kfac import MomentAccumulator
from grace_ds.gradients.passes import Passes, ProbeBatch
from grace_ds.gradients.pipeline_batches import MicroBatches
from grace_ds.gradients.probe import among_peers, refuse_spoiled
from grace_ds.gradients.probe_items import SampleForm
from grace_ds.gradients.sharded_collector import ShardedGradientCollector
from grace_ds.integrations.megatron.basis_on_ranks import BasisOnRanks
from grace_ds.integrations.megatron.model_ranks import ModelRanks
from grace_ds.integrations.megatron.schedules import CallRecorder, repeat
from grace_ds.records import FloatArray, IntArray

MOMENTS, BASIS = "moments", "basis"
Sink = MomentAccumulator | BasisAccumulator


class ModelRuns:
    """The part of one rank in the runs of a probe.  Each method is collective over the ranks of the model.

    Args:
        ranks: that hold the model together.
        recorder: of the job's own call.
        chunks: this rank's parts of the model; the collector's hooks are on their layers.
        collector: of the job.
        rows: samples of a micro-batch.
    """

    def __init__(
        self,
        ranks: ModelRanks,
        recorder: CallRecorder,
        chunks: Sequence[nn.Module],
        collector: ShardedGradientCollector,
        rows: int,
    ) -> None:
        self.ranks, self.recorder, self.chunks, self.collector, self.rows = ranks, recorder, list(chunks), collector, rows
        self.sink: Sink | None = None  # of the last run for gradients, on a rank that follows

    @property
    def together(self) -> int:
        """Of how many micro-batches a multiple is run: an interleaved pipeline takes them in groups."""
        from megatron.core import parallel_state

        return int(parallel_state.get_pipeline_model_parallel_world_size()) if len(self.chunks) > 1 else 1

    def sink_of(self, kind: str) -> Sink:
        """Return a new sink, "moments" or "basis"."""
        sketcher = self.collector.sketcher
        return sketcher.moments() if kind == MOMENTS else sketcher.accumulator(sketcher.rank)

    def gradients(self, batches: list[Any], count: int, sink: HookSink) -> bool:
        """Feed the gradients of ``count`` micro-batches to ``sink``, each sample with weight 1; return whether a hook failed."""
        sketcher = self.collector.sketcher
        sketcher.route(sink)
        try:
            self._repeat(batches, count, float(self.rows))
        finally:
            sketcher.end()
        return bool(self.ranks.allreduce(np.array([sink.spoiled], np.int64)).any())

    def captured(self, batches: list[Any], ids: Sequence[IntArray], backward: bool) -> list[MicroBatchCapture | LossCapture]:
        """Return a capture of each micro-batch: of its gradients, or else only of its losses."""
        losses = not backward
        sketcher, counts = self.collector.sketcher, self.collector.counts_losses
        micro = MicroBatches(self.chunks, sketcher, len(ids), ids.__getitem__, counts, lambda: losses, probing=True)
        try:
            self._repeat(batches, len(ids), 1.0 if backward else None)
            return micro.take()
        finally:
            micro.detach()

    def rows_of(self, batches: list[Any], ids: Sequence[IntArray]) -> list[CollectedRows]:
        """Return the samples' rows."""
        captures = [c for c in self.captured(batches, ids, backward=True) if isinstance(c, MicroBatchCapture)]
        found = [self.collector.finish(capture, 1.0, "mean") for capture in captures]
        return [rows for rows in found if rows is not None]

    def losses_of(self, batches: list[Any], ids: Sequence[IntArray]) -> FloatArray:
        """Return the samples' losses (n,) float32, nats per token."""
        return self.collector.losses([c for c in self.captured(batches, ids, backward=False) if isinstance(c, LossCapture)])

    def placeholders(self, count: int) -> list[IntArray]:
        """Return ids of ``count`` micro-batches on a rank that does not know them."""
        return [np.arange(self.rows, dtype=np.int64)] * count

    def _repeat(self, batches: list[Any], count: int, weight: float | None) -> None:
        assert self.recorder.call is not None
        with among_peers(self.ranks.size > 1):
            repeat(self.recorder.call, batches, count, weight)


class MegatronPasses(Passes):
    """Probe by repeating the job's own call of its schedule with other data; on the ranks with the dataset.

    Args:
        runs: this rank's part.
        basis: makes all ranks of the model measure along one trusted basis.
        comm: between all ranks with the dataset.
        form: what a sample must look like to be probed.
    """

    cure = (
        "call grace_ds.megatron.wrap before get_forward_backward_func(), and use the function that this returns, as Megatron-LM "
        "does; or set recipe: content"
    )

    def __init__(self, runs: ModelRuns, basis: BasisOnRanks, comm: Comm, form: SampleForm) -> None:
        self.runs, self.ranks, self.basis, self.comm, self.form = runs, runs.ranks, basis, comm, form
        self.multiple = runs.rows * runs.together
        self._asked = False

    @property
    def ready(self) -> bool:  # type: ignore[override]
        """Whether a training call of the job was seen."""
        return self.runs.recorder.call is not None

    def read(self, dataset: Any, ids: IntArray, which: str) -> list[ProbeBatch]:
        """See :meth:`Passes.read`.  The batches are collated as Megatron's loaders do it."""
        return self._read(self.comm, ids, self.runs.rows, lambda part: self.form.batch(dataset, part, default_collate, which))

    def gradients(self, batches: list[ProbeBatch], sink: HookSink) -> None:
        """See :meth:`Passes.gradients`."""
        self.ranks.send("gradients", count=len(batches), kind=MOMENTS if isinstance(sink, MomentAccumulator) else BASIS)
        refuse_spoiled(self.runs.gradients([batch.data for batch in batches], len(batches), sink))

    def sums(self, packed: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """See :meth:`Passes.sums`."""
        self.ranks.send("sum")
        total = self.ranks.allreduce(packed)
        return total if self.ranks.leads else np.zeros_like(total)

    def rows(self, batches: list[ProbeBatch]) -> list[CollectedRows]:
        """See :meth:`Passes.rows`."""
        self.basis.share()
        self.ranks.send("rows", count=len(batches))
        return self.runs.rows_of([batch.data for batch in batches], [batch.ids for batch in batches])

    def losses(self, batches: list[ProbeBatch]) -> FloatArray:
        """See :meth:`Passes.losses`."""
        self.ranks.send("losses", count=len(batches))
        return self.runs.losses_of([batch.data for batch in batches], [batch.ids for batch in batches])

    def asks(self, refresh: bool) -> bool:
        """See :meth:`Passes.asks`: once, after the first step."""
        asks, self._asked = not self._asked, True
        return asks

    def settle(self, proven: bool) -> str:
        """See :meth:`Passes.settle`."""
        return "" if self.ready else "it took one of Megatron's schedules before the training dataset was wrapped"
