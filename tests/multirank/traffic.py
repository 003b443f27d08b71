"""What a rank sends through torch's process groups, by its job and by GRACE."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
import torch

from grace_ds.gradients.sharding import Split
from grace_ds.integrations.megatron.job import job
from grace_ds.utils.methods import replace_method

# Methods of a process group → which argument has what is sent.
SENT = {
    "allreduce": 0,
    "broadcast": 0,
    "send": 0,
    "allgather": 1,
    "all_gather_single": 1,
    "reduce_scatter_single": 1,
    "all_to_all_single": 1,
    "alltoall": 1,
}


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for part in value for t in tensors(part)] if isinstance(value, (list, tuple)) else []


class Traffic:
    """Counts what this rank sends through torch's process groups: by the job, and by GRACE."""

    def __init__(self) -> None:
        self.sent = {"job": 0, "grace": 0}
        self.seconds = {"job": 0.0, "grace": 0.0}
        self.whose = "job"
        self.after_steps: list[float] = []  # seconds
        self._undo: list[Any] = []
        group: Any = torch._C._distributed_c10d.ProcessGroup
        for name, at in SENT.items():
            self._undo.append(partial(setattr, group, name, vars(group)[name]))
            setattr(group, name, self._counted(at, getattr(group, name)))

    def _counted(self, at: int, original: Any) -> Any:
        def counted(group: Any, *args: Any, **kwargs: Any) -> Any:
            self.sent[self.whose] += sum(t.numel() * t.element_size() for t in tensors(args[at]))
            return original(group, *args, **kwargs)

        return counted

    def watch(self) -> None:
        """What happens after the optimizer's own step is GRACE's, and what its hooks gather while the job runs."""

        def graces(original: Any, *args: Any, **kwargs: Any) -> Any:
            before, started, self.whose = self.whose, time.perf_counter(), "grace"
            try:
                return original(*args, **kwargs)
            finally:
                self.whose = before
                self.seconds["grace"] += time.perf_counter() - started

        def after(original: Any, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = graces(original, *args, **kwargs)
            self.after_steps.append(time.perf_counter() - started)
            return result

        side = job.feed if job.feed is not None else job.gradients
        self._undo.append(replace_method(side, "after_step" if job.feed is not None else "follow", after))
        for name in ("whole", "all_tokens"):
            self._undo.append(replace_method(Split, name, graces))
        self.sent = {"job": 0, "grace": 0}
        self._started = time.perf_counter()

    def take(self) -> dict[str, Any]:
        while self._undo:
            self._undo.pop()()
        return {
            "sent": self.sent,
            "grace_seconds": self.seconds["grace"],
            "seconds": time.perf_counter() - self._started,
            "after_a_step": float(np.median(self.after_steps)),
        }
