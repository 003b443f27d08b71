"""Run probe passes: forward and backward over given samples, without any effect on the job.

The parameters are switched off and the embeddings' outputs become the graph's leaves, so that no parameter's gradient
exists and no reduction of the engine is triggered.  The engine itself is never called.  Everything is restored on exit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from grace_ds.errors import DataError, GraceError, ProbeFailed
from grace_ds.gradients.capture import CollectedRows, HookSink, LossCapture, MicroBatchCapture
from grace_ds.gradients.hooks import Sketcher
from grace_ds.gradients.losses import sample_losses
from grace_ds.records import IntArray

LossFn = Callable[[nn.Module, Any], torch.Tensor]
Batches = Iterable[tuple[IntArray, Any]]
Finish = Callable[[MicroBatchCapture, float], CollectedRows | None]


def _as_leaf(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output.detach().requires_grad_()


@contextmanager
def untouched(module: nn.Module, leaves: Sequence[nn.Module] | None = None) -> Iterator[None]:
    """Run ``module`` forwards and backwards within this context, in evaluation mode, without any effect on the job.

    A module that recomputes its activations only while it trains (``gradient_checkpointing`` of Hugging Face's models) keeps
    its own training flag, its children do not.  Otherwise a probe would hold activations that the job has no memory for.

    Args:
        module: the model, or this rank's part of it.
        leaves: modules whose outputs begin the graph; default: its embeddings, of which there must be one.

    Restored on exit, exceptions included: training flags of every submodule, requires_grad of every parameter, and
    torch's random state on the CPU and on the module's devices.

    Raises:
        DataError: the model has no nn.Embedding to start a graph from.
        ProbeFailed: an exception was raised within the context under ZeRO-3.
    """
    embeddings = [m for m in module.modules() if is_embedding(m)] if leaves is None else leaves
    if leaves is None and not embeddings:
        raise DataError(
            f"{type(module).__name__} has no nn.Embedding, where a probe of the trusted samples would begin; set recipe: content"
        )
    training = {m: m.training for m in module.modules()}
    learning = [p for p in module.parameters() if p.requires_grad]
    devices = sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})
    handles = []
    try:
        module.eval()
        for m in (m for m, flag in training.items() if flag and _recomputes(m)):
            m.training = True
        for parameter in learning:
            parameter.requires_grad_(False)
        handles = [m.register_forward_hook(_as_leaf) for m in embeddings]
        with torch.random.fork_rng(devices=devices), torch.enable_grad(), _eager(module):
            yield
    except Exception as error:
        if gathers(module):
            raise ProbeFailed(
                f"a probe failed under ZeRO-3 ({type(error).__name__}: {error}): the other ranks wait in a gather that this "
                "one does not come to, so the job ends here; repair what the error names (of a rank that was only cut off: what "
                "another's names), or set recipe: content"
            ) from error
        raise
    finally:
        for handle in handles:
            handle.remove()
        for parameter in learning:
            parameter.requires_grad_(True)
        for m, flag in training.items():
            m.training = flag


def is_embedding(module: nn.Module) -> bool:
    """Return whether ``module`` turns token ids into vectors, all of it or this rank's part, as AutoTP cuts one."""
    return isinstance(module, nn.Embedding) or type(module).__name__ in ("VocabParallelEmbedding", "HiddenParallelEmbedding")


@contextmanager
def among_peers(shared: bool) -> Iterator[None]:
    """End the job if a probe fails within this context while other ranks wait for this one's part of the same pass.

    Args:
        shared: whether other ranks hold parts of the model.

    Raises:
        ProbeFailed: the model has raised an exception.
    """
    try:
        yield
    except GraceError:  # raised between two passes, or by the transport, which ends the others' wait
        raise
    except Exception as error:
        if shared:
            raise ProbeFailed(
                f"a probe failed on a rank that shares its model with others ({type(error).__name__}: {error}): they wait for "
                "this one's part of the pass, so the job ends here; repair what the error names (of a rank that was only cut "
                "off: what another's names), or set recipe: content"
            ) from error
        raise


def _recomputes(module: nn.Module) -> bool:
    """Return whether ``module`` itself recomputes the activations of its children while it trains."""
    block = type(module).__name__ == "TransformerBlock" and getattr(module.config, "recompute_granularity", None) == "full"
    return block or getattr(module, "gradient_checkpointing", False) is True


def gathers(module: nn.Module) -> bool:
    """Return whether a forward of ``module`` gathers its parameters from all ranks (ZeRO-3)."""
    return any(hasattr(p, "ds_id") for p in module.parameters())


def _eager(module: nn.Module) -> Any:
    """Return a context that runs a compiled model eagerly.

    Hooks added to a compiled model may never fire; the eager stance gives the same numbers without new graphs.
    """
    for m in module.modules():
        if getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_orig_mod"):
            return torch.compiler.set_stance("force_eager")
    return nullcontext()


def probe_basis(module: nn.Module, batches: Batches, loss_fn: LossFn, sketcher: Sketcher, target: HookSink) -> None:
    """Feed the gradient of every sample of ``batches`` to ``target``, each sample with weight 1.

    Args:
        module: the model itself (``engine.module``), never the engine.  Under ZeRO-3 every rank must pass
            equally many batches.
        batches: (ids (n,) int64, batch) pairs; of the ids only their number is used.
        loss_fn: (module, batch) → the batch's scalar mean loss.
        sketcher: attached; its hooks feed ``target``.
        target: an accumulator over ``sketcher``'s layers.

    Raises:
        DataError: the model has no embedding, or a hook failed.
    """
    with untouched(module):
        for ids, batch in batches:
            sketcher.route(target)
            try:
                loss = loss_fn(module, batch) * len(ids)
            finally:
                sketcher.end()
            loss.backward()  # type: ignore[no-untyped-call]
    refuse_spoiled(target.spoiled)


def refuse_spoiled(spoiled: bool) -> None:
    """Raise a DataError if a hook failed during a probe for gradients."""
    if spoiled:
        raise DataError("a hook failed during a probe (its warning is in the log); nothing can be fitted")


def probe_losses(module: nn.Module, batches: Batches, loss_fn: LossFn) -> list[LossCapture]:
    """Return the losses of the samples of ``batches``, one capture a batch; its losses are None if they cannot be read.

    Args:
        module, batches, loss_fn: as for :func:`probe_rows`; there is no backward pass.
    """
    captures = []
    with untouched(module):
        for ids, batch in batches:
            capture = LossCapture(ids)
            per_sample = sample_losses(loss_fn(module, batch), len(ids))
            if per_sample is not None:
                capture.losses, capture.tokens = per_sample
            captures.append(capture)
    return captures


def probe_rows(
    module: nn.Module,
    batches: Batches,
    loss_fn: LossFn,
    sketcher: Sketcher,
    loss_scale: float = 1.0,
    finish: Finish | None = None,
) -> list[CollectedRows]:
    """Return sketches, losses and alignments of the samples of ``batches``, as the training backward would give them.

    Args:
        module: as for :func:`probe_basis`.
        batches: (ids (n,) int64, batch) pairs.
        loss_fn: (module, batch) → the batch's scalar mean loss.
        sketcher: attached; with a trusted basis for alignments.
        loss_scale: multiplies the loss before the backward and is divided out afterwards; for float16 models.
        finish: turns a capture and its gradient scale into rows; default: ``sketcher.finish``, right if this rank holds the
            whole model and all tokens.

    Returns:
        One record per batch; a batch whose loss reached no sketched layer gives none.
    """
    collected = []
    finish = finish or sketcher.finish
    with untouched(module):
        for ids, batch in batches:
            capture = sketcher.begin(ids)
            try:
                loss = loss_fn(module, batch)
                sketcher.observe_loss(loss)
                sketcher.end()
                (loss * loss_scale).backward()  # type: ignore[no-untyped-call]
                rows = finish(capture, 1.0 / loss_scale)
            finally:
                sketcher.end()
                sketcher.discard(capture)
            if rows is not None:
                collected.append(rows)
    return collected
