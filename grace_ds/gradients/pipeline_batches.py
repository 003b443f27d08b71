"""Capture the micro-batches of a step whose schedule another engine runs: a pipeline, with several of them in flight.

A rank sees the forwards of its part of the model, chunk by chunk, in the order of the micro-batches; their backwards come
in the same order.  So a counter identifies the micro-batch of a forward, and no id has to travel with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from grace_ds.errors import ConfigError
from grace_ds.gradients.capture import LossCapture, MicroBatchCapture
from grace_ds.gradients.hooks import Sketcher
from grace_ds.records import IntArray
from grace_ds.utils.methods import replace_method


class MicroBatches:
    """Open a capture for every micro-batch of a step, on this rank.

    Args:
        chunks: this rank's parts of the model; every micro-batch passes once through each of them.
        sketcher: pipelined, over the layers of the chunks.
        count: micro-batches of a step.
        ids: returns the dataset ids (n,) of the step's micro-batch k; None if the step is not collected.  On ranks that do
            not pass rows on, only the number of ids matters.
        counts_losses: whether to count this rank's losses: tensor-parallel peers all have the same ones.
        reads: returns whether only the losses are read of the step in progress.
        probing: follow the forwards of a probe, which runs the model in evaluation mode, instead of the job's.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        sketcher: Sketcher,
        count: int,
        ids: Callable[[int], IntArray | None],
        counts_losses: bool = True,
        reads: Callable[[], bool] = lambda: False,
        probing: bool = False,
    ) -> None:
        self.sketcher, self.count, self.ids, self.counts_losses = sketcher, count, ids, counts_losses
        self.reads, self.probing = reads, probing
        self._captures: dict[int, MicroBatchCapture | LossCapture] = {}
        self._forwards = [0] * len(chunks)
        self._undo: list[Callable[[], None]] = []
        for index, chunk in enumerate(chunks):
            self._undo.append(chunk.register_forward_pre_hook(self._before(index), with_kwargs=True).remove)
            self._undo.append(chunk.register_forward_hook(self._after(index), with_kwargs=True).remove)

    def take(self) -> list[MicroBatchCapture | LossCapture]:
        """Return the captures of the step that has just been applied, in order, and start a new step."""
        captures = [self._captures[k] for k in sorted(self._captures)]
        self._captures = {}
        self._forwards = [0] * len(self._forwards)
        return captures

    def restart(self) -> None:
        """Discard the captures of the step so far, because it is run again or was not applied."""
        for capture in self.take():
            if isinstance(capture, MicroBatchCapture):
                self.sketcher.discard(capture)

    def begin(self, count: int) -> None:
        """Begin a step of ``count`` micro-batches, which may be the same step once more."""
        self.count = count
        if any(self._forwards):
            self.restart()

    def detach(self) -> None:
        """Remove the hooks, and discard the step in progress."""
        while self._undo:
            self._undo.pop()()
        self.restart()

    def follow_loss(self, owner: Any, name: str) -> None:
        """Read the losses from the return value of ``owner.name(...)``, for a job that computes them outside of its model.

        That function must be called right after the micro-batch's forward, as PipelineEngine does with ``module.loss_fn``.
        """

        def observed(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            loss = original(*args, **kwargs)
            if torch.is_grad_enabled() and self.counts_losses:
                self.sketcher.observe_loss(loss)
            return loss

        self._undo.append(replace_method(owner, name, observed))

    def _follows(self, module: nn.Module) -> bool:
        """Return whether a forward of ``module`` that begins now is one of those to capture."""
        return not module.training if self.probing else module.training and torch.is_grad_enabled()

    def _before(self, index: int) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._follows(module):
                return
            if kwargs.get("packed_seq_params") is not None:
                raise ConfigError(
                    "packed sequences (packed_seq_params, THD layout) hold several samples in one row, which cannot be told "
                    "apart again: leave packing off, or set recipe: content"
                )
            if self._forwards[index] == self.count:  # one more than a step has: the step is run again
                self.restart()
            k = self._forwards[index]
            self._forwards[index] += 1
            capture = self._captures.get(k)
            if capture is None:
                ids = self.ids(k)
                if ids is None:
                    return
                capture = self._captures[k] = self.sketcher.read(ids) if self.reads() else self.sketcher.begin(ids)
            elif isinstance(capture, MicroBatchCapture):
                self.sketcher.route(capture)

        return before

    def _after(self, index: int) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not self._follows(module):
                return
            self.sketcher.end()
            capture = self._captures.get(self._forwards[index] - 1)
            if capture is not None and getattr(module, "post_process", True) and self.counts_losses:
                _observe(capture, output, kwargs.get("loss_mask"))

        return after


def _observe(capture: MicroBatchCapture | LossCapture, output: Any, mask: Any) -> None:
    """Read per-token losses (n, T), which Megatron's models return if they are given labels."""
    n = len(capture.ids)
    if not isinstance(output, torch.Tensor) or output.dim() != 2 or output.shape[0] != n:
        return
    with torch.no_grad():
        losses = output.detach().float()
        weight = torch.ones_like(losses) if mask is None else mask.reshape(losses.shape).float()
        capture.tokens = weight.sum(1).long()
        capture.losses = (losses * weight).sum(1) / weight.sum(1)
