"""Run a probe's samples through a PipelineEngine's model: its own instructions, without those that change the job.

The stages exchange activations and gradients as in a training step.  Gradients are not reduced, no optimizer is called, and the
engine's ``forward`` and ``backward``, which scale losses and count, are left out: a stage calls its module alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from grace_ds.comm.base import Comm
from grace_ds.errors import DataError
from grace_ds.gradients.capture import CollectedRows, HookSink, LossCapture, MicroBatchCapture
from grace_ds.gradients.collector import GradientCollector
from grace_ds.gradients.losses import sample_losses, scalar_loss
from grace_ds.gradients.passes import Passes, ProbeBatch
from grace_ds.gradients.probe import among_peers, is_embedding, refuse_spoiled, untouched
from grace_ds.gradients.probe_items import SampleForm
from grace_ds.records import FloatArray, IntArray
from grace_ds.utils.rng import undisturbed_rng

# Of the engine: what a pass changes, each restored at its end.  The rest of what it uses is written anew by every step.
_RESTORED = ("data_iterator", "dynamic_shape", "loss")


class PipelinePasses(Passes):
    """Run the stages' modules by the engine's schedules.

    Args:
        engine: a PipelineEngine.
        collector: of this stage; its sketcher is attached to the stage's module.
        collate: the job's collate function.
        rows: samples of a micro-batch.
        comm: between all ranks.
        form: what a sample must look like to be probed, as far as this stage can tell.
    """

    def __init__(
        self,
        engine: Any,
        collector: GradientCollector,
        collate: Callable[[list[Any]], Any],
        rows: int,
        comm: Comm,
        form: SampleForm,
    ) -> None:
        self.engine, self.collector, self.collate, self.comm, self.form = engine, collector, collate, comm, form
        self.micro_batch_size = rows
        self._leaves = [m for m in engine.module.modules() if is_embedding(m)] if engine.is_first_stage() else []

    def read(self, dataset: Any, ids: IntArray, which: str) -> list[ProbeBatch]:
        """See :meth:`Passes.read`."""

        def read(part: IntArray) -> Any:
            batch = self.form.batch(dataset, part, self.collate, which)
            if self.engine.batch_fn is None and not (isinstance(batch, (tuple, list)) and len(batch) == 2):
                raise DataError(
                    f"a PipelineEngine takes (inputs, labels), and the job's collate_fn joins {which} samples to a "
                    f"{type(batch).__name__}; make it return such a pair"
                )
            return batch

        return self._read(self.comm, ids, self.micro_batch_size, read)

    def gradients(self, batches: list[ProbeBatch], sink: HookSink) -> None:
        """See :meth:`Passes.gradients`."""
        sketcher = self.collector.sketcher
        with among_peers(self.engine.is_pipe_parallel):
            self._run(batches, [len(batch.ids) for batch in batches], lambda _: sketcher.route(sink), lambda *_: sketcher.end())
        refuse_spoiled(sink.spoiled)

    def rows(self, batches: list[ProbeBatch]) -> list[CollectedRows]:
        """See :meth:`Passes.rows`."""
        sketcher, captures = self.collector.sketcher, list[MicroBatchCapture]()

        def after(_: int, loss: torch.Tensor | None) -> None:
            sketcher.end()
            if loss is not None:
                sketcher.observe_loss(loss)

        try:
            with among_peers(self.engine.is_pipe_parallel):
                self._run(batches, [1] * len(batches), lambda k: captures.append(sketcher.begin(batches[k].ids)), after)
            found = [self.collector.finish(capture, 1.0, "mean") for capture in captures]
        finally:
            for capture in captures:
                sketcher.discard(capture)
        return [rows for rows in found if rows is not None]

    def losses(self, batches: list[ProbeBatch]) -> FloatArray:
        """See :meth:`Passes.losses`."""
        captures = [LossCapture(batch.ids) for batch in batches]

        def after(k: int, loss: torch.Tensor | None) -> None:
            found = None if loss is None else sample_losses(loss, len(batches[k].ids))
            if found is not None:
                captures[k].losses, captures[k].tokens = found

        with among_peers(self.engine.is_pipe_parallel):
            self._run(batches, None, lambda _: None, after)
        return self.collector.losses(captures)

    # -- the schedule --------------------------------------------------------------------------------------------------

    def _run(
        self,
        batches: list[ProbeBatch],
        weights: list[int] | None,
        before: Callable[[int], None],
        after: Callable[[int, torch.Tensor | None], None],
    ) -> None:
        """Run this stage's part of the schedule over ``batches``.

        Args:
            weights: factor of each micro-batch's loss in the backward pass; None: forward passes alone.
            before: called with the number of the micro-batch before its forward.
            after: called after it, with the loss too on the last stage.
        """
        from deepspeed.runtime.pipe import schedule

        engine, count = self.engine, len(batches)
        kind = schedule.InferenceSchedule if weights is None else schedule.TrainSchedule
        plan = kind(micro_batches=count, stages=engine.num_stages, stage_id=engine.stage_id)
        losses = list[torch.Tensor]()
        forwards, backwards = iter(range(count)), iter(range(count))

        def forward(buffer_id: int) -> None:
            k = next(forwards)
            before(k)
            loss = self._forward(buffer_id)
            after(k, loss)
            if loss is not None and weights is not None:
                losses.append(loss)

        def backward(buffer_id: int) -> None:
            k = next(backwards)
            if engine.is_last_stage():
                assert weights is not None
                (losses.pop(0) * weights[k]).backward()  # type: ignore[no-untyped-call]
            else:
                self._backward(buffer_id)

        own = {schedule.ForwardPass: forward, schedule.BackwardPass: backward}
        skipped = (schedule.ReduceTiedGrads, schedule.ReduceGrads, schedule.OptimizerStep)
        with undisturbed_rng(), untouched(engine.module, self._leaves), self._lent(batches):
            engine._reserve_pipe_buffers(plan.num_pipe_buffers())
            for instructions in plan:
                for instruction in instructions:
                    if type(instruction) in own:
                        own[type(instruction)](**instruction.kwargs)
                    elif not isinstance(instruction, skipped):
                        engine._INSTRUCTION_MAP[type(instruction)](engine, **instruction.kwargs)

    @contextmanager
    def _lent(self, batches: list[ProbeBatch]) -> Iterator[None]:
        """Give the engine the probe's batches, of whatever length; restore all that a pass changes in it."""
        engine, module = self.engine, self.engine.module
        kept = {name: getattr(engine, name) for name in _RESTORED}
        offset = module.micro_offset  # counts forwards, and seeds each of them
        buffers = {key: list(slots) for key, slots in engine.pipe_buffers.items()}
        try:
            if engine.is_first_stage() or engine.is_last_stage():
                engine.data_iterator = iter([batch.data for batch in batches])
            engine.reset_activation_shape()
            engine.dynamic_shape = True
            yield
        finally:
            for name, value in kept.items():
                setattr(engine, name, value)
            module.micro_offset = offset
            engine.pipe_buffers, engine.num_pipe_buffers = buffers, len(buffers["inputs"])
            engine.reset_activation_shape()  # the next step tells the stages the job's own shapes again

    def _forward(self, buffer_id: int) -> torch.Tensor | None:
        """Run this stage's module on what was loaded or received; return the loss on the last stage."""
        engine, module = self.engine, self.engine.module
        held = engine.pipe_buffers["inputs"][buffer_id]
        inputs = tuple(x.clone() for x in held) if isinstance(held, tuple) else held.clone()
        outputs = module(inputs)
        engine.pipe_buffers["outputs"][buffer_id] = outputs
        if not engine.is_last_stage():
            return None
        found = module.loss_fn(outputs, engine.pipe_buffers["labels"][buffer_id]) if module.loss_fn is not None else outputs
        loss = scalar_loss(found)
        if loss is None:
            raise DataError("the pipeline's loss_fn returns no scalar loss, which a probe needs; set recipe: content")
        return loss

    def _backward(self, buffer_id: int) -> None:
        """Run this stage's backward from the gradient that was received."""
        engine = self.engine
        outputs, received = engine.pipe_buffers["outputs"][buffer_id], engine.grad_layer
        if isinstance(outputs, tuple):
            floats = [x for x in outputs if x.is_floating_point()]
            pairs = [(x, g) for x, g in zip(floats, received, strict=True) if x.requires_grad]
        else:
            pairs = [(outputs, received)]
        torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])
        engine.pipe_buffers["outputs"][buffer_id] = None
