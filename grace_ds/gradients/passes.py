"""Run a probe's samples through the job's model: one class per way in which a job calls its model.

A probe wants three things of the model: gradients into a sink, rows, and losses.  How it is called to give them, and which
ranks must take part, is known here alone; :mod:`~grace_ds.gradients.influence_probe` decides which samples, and what follows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from grace_ds.comm.all_ranks import run_on_all_ranks
from grace_ds.comm.base import Comm
from grace_ds.data.in_flight import IssuedBatch
from grace_ds.errors import DataError
from grace_ds.gradients.capture import CollectedRows, HookSink, MicroBatchCapture
from grace_ds.gradients.collector import GradientCollector
from grace_ds.gradients.job_call import CURE, JobCall
from grace_ds.gradients.losses import scalar_loss
from grace_ds.gradients.probe import LossFn, among_peers, probe_basis, probe_losses, probe_rows
from grace_ds.gradients.probe_items import SampleForm
from grace_ds.records import FloatArray, IntArray
from grace_ds.utils.rng import undisturbed_rng


class ProbeBatch(NamedTuple):
    """One micro-batch of a probe: the positions of its samples (n,) int64, and what the model is called with."""

    ids: IntArray
    data: Any


class Passes:
    """How a probe runs the model.  The ranks that hold one model together are given the same samples, and call in step.

    Attributes:
        ready: whether the model can be run; equal on all ranks.
        probed: samples that this rank has run through the model so far.
        multiple: of how many samples each model's part of a probe consists.
        cure: what to do where :meth:`settle` finds that the model cannot be run.
    """

    ready = True
    probed = 0
    multiple = 1
    cure = CURE

    def read(self, dataset: Any, ids: IntArray, which: str) -> list[ProbeBatch]:
        """Read and check all samples of a probe before it begins.  Collective.

        Ranks wait for each other inside of a probe (ZeRO-3 gathers weights, a pipeline hands activations on), so a rank whose
        data fail in the middle would leave the others waiting in the job's own collective.

        Args:
            dataset: to read from, map-style.
            ids: (n,) int64, positions in ``dataset``.
            which: name of the samples in messages.

        Raises:
            DataError: a sample cannot be probed; raised on every rank.
        """
        raise NotImplementedError

    def _read(self, comm: Comm, ids: IntArray, rows: int, read: Callable[[IntArray], Any]) -> list[ProbeBatch]:
        """Read micro-batches of ``rows`` samples, each by ``read``, on all ranks of ``comm`` before any is run.  Collective."""

        def read_all() -> list[ProbeBatch]:
            with undisturbed_rng():
                parts = [ids[start : start + rows] for start in range(0, len(ids), rows)]
                return [ProbeBatch(part, read(part)) for part in parts]

        batches = run_on_all_ranks(comm, read_all)
        self.probed += len(ids)
        return batches

    def gradients(self, batches: list[ProbeBatch], sink: HookSink) -> None:
        """Feed the gradient of every sample's loss to ``sink``, each sample with weight 1.

        Raises:
            DataError: a hook failed.
        """
        raise NotImplementedError

    def sums(self, packed: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return what to add up over all ranks that probe, from the sums of this rank's sink.  Collective."""
        return packed

    def rows(self, batches: list[ProbeBatch]) -> list[CollectedRows]:
        """Return the samples' rows, as a collected training step would give them.

        Equal on all ranks that hold one model together.
        """
        raise NotImplementedError

    def losses(self, batches: list[ProbeBatch]) -> FloatArray:
        """Return the samples' losses (n,) float32, nats per token, NaN where unknown; equal on the ranks of one model."""
        raise NotImplementedError

    # -- what some of them learn from the job's own steps --------------------------------------------------------------

    def saw(self, args: tuple[Any, ...], kwargs: dict[str, Any], issued: IssuedBatch) -> None:
        """Learn from the start of a training forward: the job has called its module with the batch ``issued``."""

    def returned(self, output: Any) -> None:
        """Learn from the output of that forward."""

    def asks(self, refresh: bool) -> bool:
        """Return whether to call :meth:`settle` after this optimizer step.

        Equal on all ranks.  Every rank calls it at every step.

        Args:
            refresh: whether a refresh follows.
        """
        return False

    def settle(self, proven: bool) -> str:
        """Agree over all ranks on whether the model can be run.  Collective.

        Args:
            proven: an earlier process of the run has made probes.

        Returns:
            The reason why it cannot; empty if it can.
        """
        return ""


class ModulePasses(Passes):
    """Call the module itself (``engine.module``), by the job's ``loss_fn`` or as the job was seen to call it.

    Args:
        module: ``engine.module``.
        collector: of the job; its sketcher is attached to the module.
        collate: the job's collate function.
        rows: samples per batch of a probe.
        device: of the module.
        loss_fn: (module, batch) → mean loss; default: call the module as the job does and take the loss from its output.
        comm: between all ranks that probe.
        form: what a sample must look like to be probed.
        shared: whether other ranks hold parts of the model, and take part in each of its passes.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        collector: GradientCollector,
        collate: Callable[[list[Any]], Any],
        rows: int,
        device: torch.device,
        loss_fn: LossFn | None,
        comm: Comm,
        form: SampleForm | None = None,
        shared: bool = False,
    ) -> None:
        self.module, self.collector, self.collate = module, collector, collate
        self.micro_batch_size, self.device, self.comm, self.form = rows, device, comm, form or SampleForm()
        self.shared = shared
        self.call = JobCall() if loss_fn is None else None
        self.loss_fn: LossFn = loss_fn or self._repeat
        self.ready = self._settled = loss_fn is not None
        self._steps = 0  # optimizer steps counted by :meth:`asks`

    def read(self, dataset: Any, ids: IntArray, which: str) -> list[ProbeBatch]:
        """See :meth:`Passes.read`."""

        def read(part: IntArray) -> Any:
            batch = _to(self.form.batch(dataset, part, self.collate, which), self.device)
            if self.call is not None:
                self.call.rebuild(batch)
            return batch

        return self._read(self.comm, ids, self.micro_batch_size, read)

    def gradients(self, batches: list[ProbeBatch], sink: HookSink) -> None:
        """See :meth:`Passes.gradients`."""
        with among_peers(self.shared):
            probe_basis(self.module, batches, self.loss_fn, self.collector.sketcher, sink)

    def rows(self, batches: list[ProbeBatch]) -> list[CollectedRows]:
        """See :meth:`Passes.rows`."""

        def finish(capture: MicroBatchCapture, grad_scale: float) -> CollectedRows | None:
            return self.collector.finish(capture, grad_scale, "mean")  # what a loss_fn returns, whatever the job sums

        with among_peers(self.shared):
            return probe_rows(self.module, batches, self.loss_fn, self.collector.sketcher, finish=finish)

    def losses(self, batches: list[ProbeBatch]) -> FloatArray:
        """See :meth:`Passes.losses`."""
        with among_peers(self.shared):
            captures = probe_losses(self.module, batches, self.loss_fn)
        return self.collector.losses(captures)

    # -- the job's call ------------------------------------------------------------------------------------------------

    def saw(self, args: tuple[Any, ...], kwargs: dict[str, Any], issued: IssuedBatch) -> None:
        """See :meth:`Passes.saw`."""
        if self.call is not None and self.call.watching:
            self.call.learn(args, kwargs, issued)

    def returned(self, output: Any) -> None:
        """See :meth:`Passes.returned`."""
        if self.call is not None:
            self.call.returned(output)

    def asks(self, refresh: bool) -> bool:
        """See :meth:`Passes.asks`."""
        if self.call is None:
            return False
        self._steps += 1
        return refresh or not (self._settled or self._steps & (self._steps - 1))  # at steps 1, 2, 4, 8, ...

    def settle(self, proven: bool) -> str:
        """Agree over all ranks on whether a probe can repeat the job's call.  Collective.  See :meth:`Passes.settle`."""
        assert self.call is not None
        known = self.call.known(proven=proven)
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


def _to(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {key: _to(value, device) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        moved = [_to(value, device) for value in tree]
        return type(tree)(*moved) if hasattr(tree, "_fields") else type(tree)(moved)
    return tree
