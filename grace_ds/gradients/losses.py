"""Read per-sample losses from what autograd has saved for the job's own loss: no second softmax, no patching."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch

_MAX_NODES = 256
# Nodes that treat all tokens alike.  Below any other node an unreduced loss may carry weights that are not visible here.
_ALIKE = frozenset(
    f"{name}Backward{overload}"
    for name in ("Mean", "Sum", "Div", "View", "UnsafeView", "ToCopy", "ReshapeAlias")
    for overload in (0, 1)
)
_PRODUCT = "MulBackward0"
_NO_REDUCTION = 0


def scalar_loss(output: Any) -> torch.Tensor | None:
    """Return the loss in a model's output: a tensor itself, ``output.loss``, ``output["loss"]``, or the first of a tuple."""
    if isinstance(output, Mapping):
        output = output.get("loss")
    elif not isinstance(output, torch.Tensor):
        attribute = getattr(output, "loss", None)
        output = attribute if attribute is not None else output
        if isinstance(output, tuple | list):
            output = output[0] if output else None
    return output if isinstance(output, torch.Tensor) and output.numel() == 1 else None


Weights = tuple[torch.Tensor, ...]


def _find_nll(root: Any) -> tuple[Any, Weights | None] | None:
    """Return the nearest nll_loss node at or above ``root``, and the tensors that its losses are multiplied by on the way.

    They are None if a node on the way may treat tokens differently for another reason.
    """
    queue: deque[tuple[Any, Weights | None]] = deque([(root, ())])
    seen = 0
    visited = set()
    while queue and seen < _MAX_NODES:
        node, weights = queue.popleft()
        seen += 1
        name = node.name()
        if name.startswith("NllLoss"):
            return node, weights
        if weights is not None and name not in _ALIKE:
            factor = _factor(node) if name == _PRODUCT else None
            weights = None if factor is None else (*weights, factor)
        for parent, _ in node.next_functions:
            if parent is not None and parent not in visited:
                visited.add(parent)
                queue.append((parent, weights))
    return None


def _factor(node: Any) -> torch.Tensor | None:
    """Return the constant that a product multiplies the losses by, such as a loss mask; None if both factors are learned."""
    known = [parent is not None for parent, _ in node.next_functions]
    if known == [True, False]:
        factor: torch.Tensor | None = node._saved_other
    else:
        factor = node._saved_self if known == [False, True] else None
    return factor


def sample_losses(output: Any, n: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return each sample's mean loss over its own valid tokens.  Call it between the forward and the backward.

    Args:
        output: what the model returned, holding a scalar loss made by cross_entropy or nll_loss; an unreduced one may be
            multiplied by a loss mask or weights of the tokens, with which the mean is then taken.
        n: samples of the micro-batch; the targets are taken to be batch-major.

    Returns:
        loss (n,) float32, nats per token, NaN for a sample without valid tokens; and tokens (n,) int64, the number of valid
        targets of a weight other than 0.  None if no such loss is found, if its classes are weighted, if a node between it and
        the scalar may treat tokens differently, or if its targets do not divide by ``n``.
    """
    loss = scalar_loss(output)
    if loss is None or loss.grad_fn is None:
        return None
    found = _find_nll(loss.grad_fn)
    if found is None:
        return None
    node, factors = found
    unreduced = node._saved_reduction == _NO_REDUCTION
    if node._saved_weight is not None or (unreduced and factors is None):
        return None
    with torch.no_grad():
        target = node._saved_target
        if target.dim() == 0 or target.numel() == 0 or target.numel() % n:
            return None
        ignore_index = node._saved_ignore_index
        if ignore_index >= 1 << 63:  # autograd hands out the signed index as an unsigned 64-bit number
            ignore_index -= 1 << 64
        weights = _weights(factors, target, n) if unreduced and factors else None
        if unreduced and factors and weights is None:
            return None
        return _gather(node._saved_self, target, ignore_index, n, weights)


def _weights(factors: Weights, target: torch.Tensor, n: int) -> torch.Tensor | None:
    """Return the product of ``factors`` as weights in the form of ``target``, float32; None if one does not fit the tokens.

    A number, or one for each sample, weighs the tokens of a sample alike and is left out.
    """
    weights = torch.ones_like(target, dtype=torch.float32)
    for factor in factors:
        if factor.numel() == target.numel():
            weights *= factor.detach().float().reshape(target.shape)
        elif factor.numel() not in (1, n) or (factor.numel() == n > 1 and target.numel() == n * n):
            return None  # of a square batch it could weigh the positions instead
    return weights


def _gather(
    log_probs: torch.Tensor, target: torch.Tensor, ignore: int, n: int, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    valid = target != ignore if weights is None else (target != ignore) & (weights != 0)
    index = target.masked_fill(~valid, 0).unsqueeze(1)  # axis 1 is the classes, with or without further axes after it
    picked = log_probs.detach().gather(1, index).squeeze(1).float().masked_fill(~valid, 0.0)
    tokens = valid.reshape(n, -1).sum(1)
    if weights is None:
        return -picked.reshape(n, -1).sum(1) / tokens, tokens
    total = weights.masked_fill(~valid, 0.0).reshape(n, -1).sum(1)
    return -(picked * weights).reshape(n, -1).sum(1) / total, tokens
