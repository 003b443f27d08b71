"""Add GRACE to DeepSpeed's PipelineEngine: feed the schedule to ``train_batch``, one call of which is one step.

The engine pulls micro-batches itself, on the first and the last stage only, and runs them through its own pipeline schedule;
its ``backward`` and ``step`` are not called.  So no batch is recognised at a forward.  Instead a step consumes as many
micro-batches as the engine accumulates, and it ends when ``train_batch`` returns, where all stages are at the same point.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from grace_ds.data.dataset import IdLoader
from grace_ds.data.sampler import Geometry, StreamSampler
from grace_ds.errors import ConfigError
from grace_ds.gradients.pipeline_batches import MicroBatches
from grace_ds.integrations import checkpoint
from grace_ds.integrations.handle import Grace
from grace_ds.records import IntArray
from grace_ds.utils.methods import replace_method


class EndlessSampler(StreamSampler):
    """A sampler without an end, like the loader of a PipelineEngine: an epoch may end in the middle of a step."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        geometry, self.issued = self.geometry, self.frontier
        for micro_batch in itertools.count(self.frontier):
            start = micro_batch * geometry.micro + geometry.rank * geometry.rows
            ids = self.book.slots(start, geometry.rows).ids.tolist()
            self.issued = max(self.issued, micro_batch + 1)
            yield from zip(range(start, start + geometry.rows), ids, strict=True)


class PipelineGrace(Grace):
    """The handle ``engine.grace_ds`` of a PipelineEngine."""

    job_shuffles = False  # the engine's default sampler does not

    def attach_hooks(self) -> None:
        """Replace ``train_batch``, ``save_checkpoint``, ``load_checkpoint`` and ``destroy``; undone by :meth:`detach`."""
        if self.config.weights != "none":
            raise ConfigError("weights: inverse_probability is not passed on to a PipelineEngine's loss; set weights: none")
        self._fed: IdLoader | None = None
        self._micro: MicroBatches | None = None
        collector = self.controller.collector
        if collector is not None:
            accumulation, reads = self.controller.geometry.accumulation, lambda: not self.controller.collecting
            self._micro = MicroBatches([self.engine.module], collector.sketcher, accumulation, self._ids, reads=reads)
            if self.engine.is_last_stage() and self.engine.module.loss_fn is not None:
                self._micro.follow_loss(self.engine.module, "loss_fn")
            self._restore.append(self._micro.detach)
        replacements: dict[str, Callable[..., Any]] = {
            "train_batch": self._train_batch,
            "save_checkpoint": functools.partial(checkpoint.save, self.controller, self.engine),
            "load_checkpoint": self._load,
            "destroy": self._destroy,
        }
        self._restore += [replace_method(self.engine, name, method) for name, method in replacements.items()]

    def feed(self, num_local_io_workers: int | None = None) -> Any:
        """Give the engine its loader, on the stages that load data; return the engine's own training loader."""
        self._fed = self.deepspeed_loader(num_local_io_workers)
        if self.controller.sampler is None:  # shadow: the job's order has an end
            from deepspeed.utils import RepeatingLoader

            self._fed = RepeatingLoader(self._fed)
        self.engine.set_dataloader(self._fed)
        return self.engine.training_dataloader

    def _stream_sampler(self, geometry: Geometry, samples: int) -> StreamSampler:
        return EndlessSampler(self.controller.book, geometry, 0, -(-samples // geometry.ranks))

    def _train_batch(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        controller, accumulation = self.controller, self.controller.geometry.accumulation
        controller.in_flight.clear()
        if self._micro is not None:
            self._micro.restart()
        scale = self._grad_scale()
        result = original(*args, **kwargs)
        loads = self.engine.is_first_stage() or self.engine.is_last_stage()
        if loads and len(controller.in_flight) != min(accumulation, controller.in_flight.most):
            raise ConfigError(
                f"train_batch took {len(controller.in_flight)} micro-batches of the schedule and {accumulation} make a step: "
                "it was given data of its own; pass iter(engine.grace_ds.loader()), or nothing"
            )
        if isinstance(controller.sampler, StreamSampler):
            controller.sampler.frontier += accumulation
            controller.sampler.issued = max(controller.sampler.issued, controller.sampler.frontier)
        controller.in_flight.clear()
        seen = self._micro.take() if self._micro is not None else []
        controller.after_step(self.engine.global_steps, self.engine.was_step_applied(), scale, seen)
        return result

    def _ids(self, k: int) -> IntArray | None:
        """Return the samples of the step's micro-batch k: (rows,) int64; None if nothing is to be read of it.

        The first stage knows them, and passes the rows on.  Of the others the captures only need the number.
        """
        controller, rows = self.controller, self.controller.geometry.rows
        if not (controller.collecting or controller.reading):
            return None
        ids = controller.in_flight.ids_of(k) if self.engine.is_first_stage() else None
        return np.full(rows, -1, np.int64) if ids is None or len(ids) != rows else ids

    def _load(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = checkpoint.load(self.controller, self.engine, original, *args, **kwargs)
        if self._fed is not None:  # an iterator has prefetched batches of another position in the run
            self.engine.set_dataloader(self._fed)
        return result
