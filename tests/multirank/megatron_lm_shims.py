"""Megatron-LM's training loop on a CPU: what it takes for granted of CUDA, replaced.  For tests at toy size.

Beyond what megatron-core needs (``megatron_shims``): devices, streams and ``.cuda()`` that are the CPU, nothing compiled.
Not touched: arguments, loop, datasets, samplers, schedules, checkpoints, rerun state machine.
"""

from __future__ import annotations

import contextlib
import os
from types import SimpleNamespace
from typing import Any

import torch

from tests.multirank.megatron_shims import on_cpu


class _Stream:
    """A CUDA stream of a machine without: what is put on it has been done already."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0

    def wait_stream(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def record_event(self, *_: Any) -> Any: ...
    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...


def training_on_cpu() -> None:
    """Let ``megatron.training`` of core_v0.16.1 run on gloo without a GPU, in this process."""
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    # Before anything is replaced: torch's compiler takes stock of torch's functions as it is imported.
    import megatron.core.datasets.utils as built
    import megatron.training.initialize as initialize
    import megatron.training.training as training
    import torch._dynamo
    from megatron.core.pipeline_parallel import schedules
    from megatron.legacy import fused_kernels

    _devices()
    on_cpu()
    nothing: Any = lambda *_, **__: None  # noqa: E731
    fused_kernels.load = nothing
    built.compile_helpers = nothing  # the wheel brings them compiled
    initialize.set_jit_fusion_options = training.set_jit_fusion_options = nothing  # compiles and warms up on the device
    training.report_memory = nothing
    # Frees what is sent as soon as the send is queued, which is right on a CUDA stream alone.
    schedules.deallocate_output_tensor, schedules.custom_backward = nothing, torch.autograd.backward
    initialize.tensor_parallel.model_parallel_cuda_manual_seed = nothing


def _devices() -> None:
    cuda: Any = torch.cuda
    properties = SimpleNamespace(multi_processor_count=1, major=8, minor=0, total_memory=2**34, name="CPU")
    cuda.is_available, cuda.device_count = (lambda: True), (lambda: 1)
    cuda.set_device = cuda.empty_cache = cuda.set_stream = cuda.manual_seed = cuda.manual_seed_all = lambda *_, **__: None
    cuda.get_device_properties, cuda.get_device_capability = (lambda *_: properties), (lambda *_: (8, 0))
    cuda.get_device_name = lambda *_: "CPU"
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = lambda *_: _Stream()
    cuda.stream = lambda *_: contextlib.nullcontext()
    cuda.get_rng_state, cuda.set_rng_state = (lambda *_: torch.get_rng_state()), (lambda *_, **__: None)
    for name in ("FloatTensor", "IntTensor", "LongTensor", "ByteTensor", "HalfTensor", "BFloat16Tensor", "DoubleTensor"):
        setattr(cuda, name, getattr(torch, name))
    kinds: tuple[Any, ...] = (torch.Tensor, torch.nn.Module)
    for kind in kinds:
        kind.cuda, kind.to = (lambda self, *_, **__: self), _to(kind.to)
    kinds[0].pin_memory = lambda self, *_, **__: self
    loader: Any = torch.utils.data.DataLoader
    made = loader.__init__
    loader.__init__ = lambda self, *args, **kwargs: made(self, *args, **{**kwargs, "pin_memory": False})


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


def _to(original: Any) -> Any:
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple("cpu" if str(a).startswith("cuda") else a for a in args)
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return original(self, *args, **kwargs)

    return to
