"""megatron-core on a CPU: what it takes for granted of CUDA, replaced.  For tests and the worked example at toy size.

Nothing here touches a layer, a schedule, a dataset or an optimizer: random states, the current device, and a norm.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

_done = False


def on_cpu() -> None:
    """Lets megatron-core 0.16 run on gloo without a GPU, in this process.  A second call does nothing."""
    global _done
    if _done:
        return
    _done = True
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import torch_norm

    cuda: Any = torch.cuda
    cuda.current_device = lambda: "cpu"
    cuda.synchronize = lambda *_: None
    rng: Any = random
    rng.CudaRNGStatesTracker.fork = lambda *_, **__: contextlib.nullcontext()
    rng._get_all_rng_states = lambda: (torch.get_rng_state(), None, None)
    rng._set_all_rng_states = lambda cpu, *_: torch.set_rng_state(cpu)
    norms: Any = torch_norm
    norms.WrappedTorchNorm.__new__ = _norm
    tensor: Any = torch.Tensor
    tensor.type = _cuda_name(tensor.type)  # which its optimizers and its clipping check
    for name in ("empty", "zeros", "ones", "tensor", "full", "arange"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _norm(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.Module:
    """A LayerNorm that knows of sequence parallelism, as Megatron's fused ones do."""
    norm = torch.nn.LayerNorm(hidden_size, eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


def _cuda_name(original: Any) -> Any:
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        return found if args or kwargs else found.replace("torch.", "torch.cuda.", 1)

    return type_


def _on_cpu(make: Any) -> Any:
    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        result: torch.Tensor = make(*args, **kwargs)
        return result

    return made
