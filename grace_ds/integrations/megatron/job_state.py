"""Read what GRACE must know of a Megatron job: its position, its batches, and how far its data workers run ahead."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from grace_ds.data.sampler import Geometry
from grace_ds.errors import ConfigError

_PREFETCH = 2  # micro-batches that torch's loader keeps in flight for each worker


@dataclass(frozen=True)
class Facts:
    """The facts of one job.

    Attributes:
        geometry: how positions map to data-parallel ranks, as in Megatron's ``single`` sampler.
        consumed: samples trained on when the run began or was resumed.
        lag: optimizer steps by which a schedule is published ahead of its first sample.
        args: Megatron-LM's own arguments; None without its training loop.
    """

    geometry: Geometry
    consumed: int
    lag: int
    args: Any = None

    def cursor_after(self, counted: int) -> int:
        """Return the samples consumed after the step that has just ended: Megatron's own number, otherwise ``counted``.

        Megatron also counts iterations that it skips on purpose, which have no optimizer step.
        """
        if self.args is None:
            return counted
        return int(self.args.consumed_train_samples) + self.geometry.batch


def facts_of(consumed: int | None, micro: int | None, batch: int | None, workers: int | None, lag: int | None) -> Facts:
    """Return the facts as given, or otherwise from Megatron-LM's arguments.

    Raises:
        ConfigError: a value is neither given nor known, or the values do not fit together; on every rank.
    """
    args = _arguments()
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
    if consumed < 0 or consumed % batch:
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
    return Facts(geometry, consumed, needed + 1 if lag is None else lag, args)


def _known(name: str, given: int | None, args: Any, megatron_name: str) -> int:
    if given is not None:
        return int(given)
    value = getattr(args, megatron_name, None)
    if value is None:
        raise ConfigError(f"{name} is not known: there are no arguments of Megatron-LM in this process; pass {name}=… to wrap")
    return int(value)


def _arguments() -> Any:
    """Return Megatron-LM's arguments if its training loop runs in this process; otherwise None."""
    module = sys.modules.get("megatron.training.global_vars") or sys.modules.get("megatron.global_vars")
    return getattr(module, "_GLOBAL_ARGS", None)


# Arguments of Megatron-LM under which position p is not row p of the dataset, or a step is not one of the same size.
_REFUSED = {
    "rampup_batch_size": "it changes the samples of a step during the run, and refreshes are counted in steps",
    "phase_transition_iterations": "the dataset begins again at each phase, and its positions are then no more those of the run",
    "hybrid_context_parallel": "its sampler reads a whole batch at once and deals its samples out anew",
}


def _refuse(args: Any) -> None:
    kind = getattr(args, "dataloader_type", "single")
    if kind not in ("single", None):
        raise ConfigError(
            f"--dataloader-type {kind} draws an order of its own, and a schedule is one; use --dataloader-type single, and "
            "shuffle nothing: the schedule is shuffled"
        )
    for name, why in _REFUSED.items():
        if getattr(args, name, None):
            raise ConfigError(f"--{name.replace('_', '-')} cannot be served: {why}; leave it out, or leave GRACE out")


def _data_parallel() -> tuple[int, int]:
    """Return (size, rank) of this rank's data-parallel group, context-parallel ranks counted as one."""
    module = sys.modules.get("megatron.core.parallel_state")
    if module is None or not module.model_parallel_is_initialized():
        import torch.distributed as dist

        if dist.is_initialized() and dist.get_world_size() > 1:
            raise ConfigError("megatron.core.parallel_state is not initialised: call wrap after initialize_model_parallel")
        return 1, 0
    if module.get_virtual_pipeline_model_parallel_world_size() is not None:
        raise ConfigError(
            "an interleaved pipeline (virtual stages) builds its datasets stage by stage, which wrap cannot follow yet; leave "
            "--num-layers-per-virtual-pipeline-stage out"
        )
    return int(module.get_data_parallel_world_size()), int(module.get_data_parallel_rank())
