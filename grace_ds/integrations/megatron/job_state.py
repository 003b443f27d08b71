"""Read what GRACE must know of a Megatron job: its position, its batches, and how far its data workers run ahead."""

from __future__ import annotations

import copy
import itertools
import sys
from dataclasses import dataclass
from typing import Any

from grace_ds.data.sampler import Geometry
from grace_ds.errors import ConfigError

_PREFETCH = 2  # micro-batches that torch's loader keeps in flight for each worker


@dataclass(frozen=True)
class Facts:
    """The facts of one job.

    While Megatron-LM ramps its batch up, its steps are shorter.  GRACE's steps are then still ``geometry.batch`` samples long,
    so that refreshes are made at fixed positions, and a step of Megatron's may end within one of GRACE's.

    Attributes:
        geometry: how positions map to data-parallel ranks, as in Megatron's ``single`` sampler; with the full batch.
        consumed: samples trained on when the run began or was resumed.
        lag: optimizer steps by which a schedule is published ahead of its first sample.
        args: Megatron-LM's own arguments; None without its training loop.
        skipped: iterations that Megatron-LM reads the samples of and leaves out (``--iterations-to-skip``), counted from 0.
        total: samples of the whole run; None if not known.
    """

    geometry: Geometry
    consumed: int
    lag: int
    args: Any = None
    skipped: frozenset[int] = frozenset()
    total: int | None = None

    @property
    def uneven(self) -> bool:
        """Whether some step of the run is not exactly one batch further than the one before."""
        return bool(self.skipped) or self._ramps

    @property
    def longest_gap(self) -> int:
        """Largest number of iterations in a row that are skipped."""
        return max((len(run) for run in _runs(sorted(self.skipped))), default=0)

    @property
    def _ramps(self) -> bool:
        return bool(getattr(self.args, "rampup_batch_size", None))

    def cursor_before(self, counted: int) -> int:
        """Return the samples consumed before the step in progress: Megatron-LM's own number, otherwise ``counted``.

        Megatron also counts iterations that it skips on purpose, which have no optimizer step.
        """
        return counted if self.args is None else int(self.args.consumed_train_samples)

    def cursor_after(self, counted: int) -> int:
        """Return the samples consumed after the step in progress; ``counted`` as for :meth:`cursor_before`."""
        return self.cursor_before(counted) + (_calculator().get() * self.geometry.micro if self._ramps else self.geometry.batch)

    def next_end(self, cursor: int, due: int, started: bool = True) -> int:
        """Return the samples consumed after the first optimizer step from ``cursor`` on that ends at ``due`` or beyond.

        Args:
            cursor: samples consumed so far, between two steps.
            due: a position, in samples.
            started: whether an optimizer step of this process has just ended; otherwise the run begins or is resumed.
        """
        batch = self.geometry.batch
        if not self.uneven:
            return max(cursor + batch, due)
        iteration = cursor // batch
        if self.args is not None:
            iteration = int(self.args.curr_iteration) + 1 if started else int(self.args.iteration)
        sizes = copy.copy(_calculator()) if self._ramps else None  # Megatron's own arithmetic, on positions yet to come
        for number in itertools.count(iteration):
            if sizes is not None:
                sizes.update(cursor, False)
                batch = sizes.get() * self.geometry.micro
            cursor += batch
            if number not in self.skipped and cursor >= due:
                break
        return cursor


def _calculator() -> Any:
    """Return Megatron's calculator of the micro-batches of a step; None if there is none."""
    module = sys.modules.get("megatron.core.num_microbatches_calculator")
    return getattr(module, "_GLOBAL_NUM_MICROBATCHES_CALCULATOR", None)


def _runs(numbers: list[int]) -> list[list[int]]:
    """Return the runs of consecutive numbers in a sorted list."""
    groups = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    return [[number for _, number in group] for _, group in groups]


def facts_of(consumed: int | None, micro: int | None, batch: int | None, workers: int | None, lag: int | None) -> Facts:
    """Return the facts as given, or otherwise from Megatron-LM's arguments.

    Raises:
        ConfigError: a value is neither given nor known, or the values do not fit together; on every rank.
    """
    args = arguments()
    if args is not None:
        _refuse(args)
    consumed = _known("consumed_samples", consumed, args, "consumed_train_samples")
    micro = _known("micro_batch_size", micro, args, "micro_batch_size")
    batch = _known("global_batch_size", batch, args, "global_batch_size")
    workers = _known("num_workers", workers, args, "num_workers")
    ranks, rank = _data_parallel()
    if micro < 1 or batch < 1 or batch % (micro * ranks):
        raise ConfigError(
            f"global_batch_size {batch} is no multiple of micro-batch × data-parallel ranks = {micro} × {ranks}: make it one"
        )
    smallest = micro * ranks if getattr(args, "rampup_batch_size", None) else batch
    if consumed < 0 or consumed % smallest:
        raise ConfigError(
            f"consumed_samples is {consumed}, no multiple of global_batch_size {batch}: a run is taken up between two steps, "
            "with the batch size that it was begun with"
        )
    ahead = workers * _PREFETCH * micro * ranks
    needed = -(-ahead // batch)
    if lag is not None and lag < needed:
        raise ConfigError(
            f"lag {lag} is too short: {workers} data workers read {workers * _PREFETCH} micro-batches ahead, which is {needed} "
            f"step(s) of {batch} samples; pass lag={needed} or more, or leave it out"
        )
    geometry = Geometry(ranks, rank, micro, batch // (micro * ranks))
    skipped = frozenset(int(i) for i in getattr(args, "iterations_to_skip", None) or ())
    return Facts(geometry, consumed, needed + 1 if lag is None else lag, args, skipped, _total(args))


def _total(args: Any) -> int | None:
    """Return the samples of the whole run, if Megatron-LM's arguments tell."""
    if getattr(args, "train_samples", None):
        return int(args.train_samples)
    steps, batch = getattr(args, "train_iters", None), getattr(args, "global_batch_size", None)
    return int(steps) * int(batch) if steps and batch else None


def _known(name: str, given: int | None, args: Any, megatron_name: str) -> int:
    if given is not None:
        return int(given)
    value = getattr(args, megatron_name, None)
    if value is None:
        raise ConfigError(f"{name} is not known: there are no arguments of Megatron-LM in this process; pass {name}=… to wrap")
    return int(value)


def arguments() -> Any:
    """Return Megatron-LM's arguments if its training loop runs in this process; otherwise None."""
    module = sys.modules.get("megatron.training.global_vars") or sys.modules.get("megatron.global_vars")
    return getattr(module, "_GLOBAL_ARGS", None)


# Arguments of Megatron-LM under which position p is not row p of the dataset, or a step is not one of the same size.
_REFUSED = {
    "phase_transition_iterations": "the dataset begins again at each phase, and its positions are then no more those of the run",
    "hybrid_context_parallel": "its sampler reads a whole batch at once and deals its samples out anew",
}


def _refuse(args: Any) -> None:
    kind = getattr(args, "dataloader_type", "single")
    if kind not in ("single", "cyclic", None):
        raise ConfigError(
            f"--dataloader-type {kind} leaves the loader to the job, so that nobody knows which position a batch is; use "
            "--dataloader-type single"
        )
    for name, why in _REFUSED.items():
        if getattr(args, name, None):
            raise ConfigError(f"--{name.replace('_', '-')} cannot be served: {why}; leave it out, or leave GRACE out")
    if getattr(args, "rampup_batch_size", None) and _calculator() is None:
        raise ConfigError(
            "--rampup-batch-size cannot be followed: this Megatron has no megatron.core.num_microbatches_calculator, as "
            "megatron-core 0.16 has; leave it out, or use that version"
        )


def _data_parallel() -> tuple[int, int]:
    """Return (size, rank) of this rank's data-parallel group, context-parallel ranks counted as one."""
    module = sys.modules.get("megatron.core.parallel_state")
    if module is None or not module.model_parallel_is_initialized():
        import torch.distributed as dist

        if dist.is_initialized() and dist.get_world_size() > 1:
            raise ConfigError("megatron.core.parallel_state is not initialised: call wrap after initialize_model_parallel")
        return 1, 0
    return int(module.get_data_parallel_world_size()), int(module.get_data_parallel_rank())


def virtual_stages() -> int:
    """Return how many datasets each rank of an interleaved pipeline builds, one after the other; 1 without interleaving."""
    module = sys.modules.get("megatron.core.parallel_state")
    if module is None or not module.model_parallel_is_initialized():
        return 1
    return int(module.get_virtual_pipeline_model_parallel_world_size() or 1)
