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


def _find_nll(root: Any) -> tuple[Any, bool] | None:
    """Return the nearest nll_loss node at or above ``root``, and whether all nodes on the way treat the tokens alike."""
    queue = deque([(root, True)])
    seen = 0
    visited = set()
    while queue and seen < _MAX_NODES:
        node, alike = queue.popleft()
        seen += 1
        name = node.name()
        if name.startswith("NllLoss"):
            return node, alike
        for parent, _ in node.next_functions:
            if parent is not None and parent not in visited:
                visited.add(parent)
                queue.append((parent, alike and name in _ALIKE))
    return None


def sample_losses(output: Any, n: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return each sample's mean loss over its own valid tokens.  Call it between the forward and the backward.

    Args:
        output: what the model returned, holding a scalar loss made by cross_entropy or nll_loss.
        n: samples of the micro-batch; the targets are taken to be batch-major.

    Returns:
        loss (n,) float32, nats per token, NaN for a sample without valid tokens; and tokens (n,) int64, the number of valid
        targets.  None if no such loss is found, if it is weighted, or if its targets do not divide by ``n``.
    """
    loss = scalar_loss(output)
    if loss is None or loss.grad_fn is None:
        return None
    found = _find_nll(loss.grad_fn)
    if found is None:
        return None
    node, alike = found
    if node._saved_weight is not None or (node._saved_reduction == _NO_REDUCTION and not alike):
        return None
    with torch.no_grad():
        target = node._saved_target
        if target.dim() == 0 or target.numel() == 0 or target.numel() % n:
            return None
        ignore_index = node._saved_ignore_index
        if ignore_index >= 1 << 63:  # autograd hands out the signed index as an unsigned 64-bit number
            ignore_index -= 1 << 64
        return _gather(node._saved_self, target, ignore_index, n)


def _gather(log_probs: torch.Tensor, target: torch.Tensor, ignore: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    valid = target != ignore
    index = target.masked_fill(~valid, 0).unsqueeze(1)  # axis 1 is the classes, with or without further axes after it
    picked = log_probs.detach().gather(1, index).squeeze(1).float().masked_fill(~valid, 0.0)
    tokens = valid.reshape(n, -1).sum(1)
    return -picked.reshape(n, -1).sum(1) / tokens, tokens
