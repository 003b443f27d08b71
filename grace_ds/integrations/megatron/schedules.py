"""Record how a Megatron job runs its steps, so that a probe can make the same call with other samples."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from grace_ds.gradients.probe import is_embedding, untouched
from grace_ds.utils.methods import replace_method

# Attributes of megatron.core.pipeline_parallel.schedules, which get_forward_backward_func returns by name at each call.
SCHEDULES = (
    "forward_backward_no_pipelining",
    "forward_backward_pipelining_without_interleaving",
    "forward_backward_pipelining_with_interleaving",
)
# What a schedule does to gradients and parameters beyond its forwards and backwards, and how it scales the loss.
SIDE_EFFECTS = (
    "grad_scale_func",
    "no_sync_func",
    "grad_sync_func",
    "param_sync_func",
    "finalize_model_grads_func",
    "timers",
)


@dataclass(frozen=True)
class Call:
    """A training call of a schedule.

    Attributes:
        schedule: the function.
        kwargs: its keyword arguments, without ``data_iterator`` and ``num_microbatches``.
        data: whether this rank gave it data; a list with an entry per chunk in an interleaved pipeline.
    """

    schedule: Callable[..., Any]
    kwargs: dict[str, Any]
    data: bool | list[bool]

    @property
    def chunks(self) -> list[nn.Module]:
        """This rank's parts of the model, as the job wraps them."""
        model = self.kwargs["model"]
        return list(model) if isinstance(model, list) else [model]

    def iterators(self, batches: list[Any]) -> Any:
        """Return data iterators over ``batches``, one wherever the job gave one."""
        if isinstance(self.data, list):
            return [iter(batches) if given else None for given in self.data]
        return iter(batches) if self.data else None


class CallRecorder:
    """The job's last training call of one of Megatron's schedules.

    Args:
        begins: called with the number of micro-batches before each training call.

    Attributes:
        call: None before the first.
    """

    def __init__(self, begins: Callable[[int], None]) -> None:
        self.call: Call | None = None
        self._begins = begins
        module = importlib.import_module("megatron.core.pipeline_parallel.schedules")
        self._undo = [replace_method(module, name, self._record) for name in SCHEDULES]

    def close(self) -> None:
        """Restore Megatron's functions."""
        while self._undo:
            self._undo.pop()()

    def _record(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("forward_only", False):
            count = int(kwargs["num_microbatches"])
            data = kwargs["data_iterator"]
            given = [part is not None for part in data] if isinstance(data, list) else data is not None
            kept = {key: value for key, value in kwargs.items() if key not in ("data_iterator", "num_microbatches")}
            self.call = Call(original, kept, given)
            self._begins(count)
        return original(*args, **kwargs)


def repeat(call: Call, batches: list[Any], count: int, weight: float | None) -> None:
    """Run ``count`` micro-batches through the model as ``call`` did, without any effect on the job.

    Collective over the ranks that hold one model together (and over more where experts lie on several models' ranks).

    Args:
        batches: what the job's data iterator would give, ``count`` of them; used where the job gave data.
        weight: of a micro-batch's mean loss in the backward pass; None: forward passes only.
    """
    kwargs = dict(call.kwargs)
    kwargs["data_iterator"], kwargs["num_microbatches"] = call.iterators(batches), count
    kwargs["forward_only"] = weight is None
    if weight is not None:
        kwargs["forward_step_func"] = _weighted(kwargs["forward_step_func"], weight * count)
    with ExitStack() as stack:
        for chunk in call.chunks:
            # The embeddings' outputs begin the graph; a later stage of a pipeline has none and needs none.
            stack.enter_context(untouched(chunk, [module for module in chunk.modules() if is_embedding(module)]))
        stack.enter_context(_set_aside(call.chunks))
        stack.enter_context(torch.enable_grad() if weight is not None else torch.no_grad())
        call.schedule(**kwargs)


def _weighted(forward_step: Callable[..., Any], factor: float) -> Callable[..., Any]:
    """Return a forward step whose loss is ``factor`` times the micro-batch's mean loss, summed over context-parallel ranks.

    The schedule multiplies a loss that comes without a number of tokens by the context-parallel size, and divides it by the
    number of micro-batches.  The job then averages gradients over the context-parallel ranks; here they are summed.
    """
    from megatron.core import parallel_state

    size = parallel_state.get_context_parallel_world_size()

    def step(*args: Any, **kwargs: Any) -> Any:
        output, loss_of = forward_step(*args, **kwargs)

        def mean_of(tensor: torch.Tensor) -> Any:
            found = loss_of(tensor)
            if len(found) == 3:
                total, tokens, reduced = found
                return total * (factor / size**2) / torch.clamp(torch.as_tensor(tokens), min=1), reduced
            loss, reduced = found
            return loss * (factor / size), reduced

        return output, mean_of

    return step


@contextmanager
def _set_aside(chunks: list[nn.Module]) -> Iterator[None]:
    """Take away within this context what a schedule does besides forwards and backwards, and Megatron's reruns of a step."""
    from megatron.core import rerun_state_machine as reruns
    from megatron.core.utils import get_model_config

    configs = list({id(config): config for config in map(get_model_config, chunks)}.values())
    before = [(config, name, getattr(config, name)) for config in configs for name in SIDE_EFFECTS]
    machine = getattr(reruns, "_GLOBAL_RERUN_STATE_MACHINE", None)  # its getter would make one
    mode = None if machine is None else machine.mode
    try:
        for config, name, _ in before:
            setattr(config, name, None)
        if machine is not None:
            machine.mode = reruns.RerunMode.DISABLED  # set_mode would log it at each refresh
        yield
    finally:
        for config, name, value in before:
            setattr(config, name, value)
        if machine is not None:
            machine.mode = mode
