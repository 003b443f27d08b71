"""GRACE coreset selection (arXiv 2604.11810) as a DeepSpeed data-efficiency plugin.

    engine, optimizer, loader, scheduler = grace_ds.initialize(...)   # in the place of deepspeed.initialize
    handle = grace_ds.attach(engine, dataset)                         # for jobs that build their own loader
    grace_ds.watch_preemption(engine, save_dir)                       # checkpoint and leave on SIGTERM or SIGUSR1
    import grace_ds.megatron                                          # attach(model) and wrap(train_ds, …) for Megatron jobs
    import grace_ds.huggingface                                       # attach(trainer) for transformers.Trainer

Importing this package imports neither DeepSpeed nor MPI nor any GPU library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grace_ds.integrations.deepspeed import attach, initialize
    from grace_ds.integrations.handle import Grace
    from grace_ds.integrations.preemption import watch_preemption
    from grace_ds.integrations.sample_weights import sample_weights

__version__ = "0.1.0"
__all__ = ["Grace", "__version__", "attach", "initialize", "sample_weights", "watch_preemption"]


def __getattr__(name: str) -> Any:
    if name in ("Grace", "attach", "initialize"):
        from grace_ds.integrations import deepspeed

        return getattr(deepspeed, name)
    if name == "sample_weights":
        from grace_ds.integrations.sample_weights import sample_weights

        return sample_weights
    if name == "watch_preemption":
        from grace_ds.integrations.preemption import watch_preemption

        return watch_preemption
    raise AttributeError(f"module 'grace_ds' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
