"""Modes of an engine: what a job of two data-parallel ranks may switch on, each run with every recipe.

Nothing heavy is imported here, as in :mod:`tests.multirank.cells`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CPU = {"device": "cpu"}
ZERO3 = {"stage": 3, "stage3_param_persistence_threshold": 0}


@dataclass(frozen=True)
class Mode:
    """One mode.

    Attributes:
        area: rows of the page's table that it stands among.
        what: is switched on, for the page.
        job: its options of ``cell_job``.
        exact: whether its numbers are those of the plain job up to rounding, so that the schedules are the same.
        comparable: whether it makes the plain job's steps, so that influences can be compared.
        compiles: whether DeepSpeed compiles an operator for it first.
    """

    area: str
    what: str
    job: dict[str, Any] = field(default_factory=dict)
    exact: bool = True
    comparable: bool = True
    compiles: bool = False


def zero(**section: Any) -> dict[str, Any]:
    return {"ds": {"zero_optimization": section}}


def fp16(power: int) -> dict[str, Any]:
    """Loss scale from 2 ** ``power`` on; the toy's gradients overflow above 2 ** 15."""
    section = {"enabled": True, "initial_scale_power": power, "hysteresis": 1}
    return {"ds": {"fp16": section, "zero_optimization": {"stage": 2}}}


MODES = {
    "offload 1": Mode("offload", "ZeRO 1, optimizer on the CPU", zero(stage=1, offload_optimizer=CPU)),
    "offload 2": Mode("offload", "ZeRO 2, optimizer on the CPU", zero(stage=2, offload_optimizer=CPU)),
    "offload 3": Mode("offload", "ZeRO 3, optimizer on the CPU", zero(**ZERO3, offload_optimizer=CPU)),
    "offload 3p": Mode(
        "offload", "ZeRO 3, optimizer and parameters on the CPU", zero(**ZERO3, offload_optimizer=CPU, offload_param=CPU)
    ),
    "CPUAdam": Mode(
        "offload",
        "ZeRO 2, optimizer on the CPU, DeepSpeed's CPUAdam",
        {**zero(stage=2, offload_optimizer=CPU), "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
        compiles=True,
    ),
    "hpz": Mode("ZeRO++", "secondary partition (`zero_hpz_partition_size`)", zero(**ZERO3, zero_hpz_partition_size=2)),
    "qwz": Mode("ZeRO++", "quantized weights (`zero_quantized_weights`)", zero(**ZERO3, zero_quantized_weights=True)),
    "qgz": Mode("ZeRO++", "quantized gradients (`zero_quantized_gradients`)", zero(**ZERO3, zero_quantized_gradients=True)),
    "compiled module": Mode("torch.compile", "`torch.compile(module)`", {"compile": "module"}),
    "compiled in place": Mode("torch.compile", "`module.compile()`", {"compile": "in place"}),
    "compiled engine": Mode("torch.compile", "`engine.compile()`", {"compile": "engine"}),
    "fp16": Mode("fp16", "dynamic loss scaling", fp16(10), exact=False),
    "fp16 overflows": Mode("fp16", "dynamic loss scaling, the first steps overflow", fp16(17), exact=False, comparable=False),
    "reentrant": Mode("checkpointing", "torch's, re-entrant", {"recomputed": "reentrant"}),
    "nonreentrant": Mode("checkpointing", "torch's, non-re-entrant", {"recomputed": "nonreentrant"}),
    "deepspeed": Mode("checkpointing", "DeepSpeed's", {"recomputed": "deepspeed"}),
    "deepspeed in parts": Mode(
        "checkpointing",
        "DeepSpeed's, with `partition_activations` and `cpu_checkpointing`",
        {"recomputed": "deepspeed", "activations": {"partition_activations": True, "checkpoint_in_cpu": True}},
    ),
    "actor and critic": Mode("two engines", "a second engine without GRACE, on the same batches", {"second": "plain"}),
    "two with GRACE": Mode("two engines", "a second engine with GRACE of its own", {"second": "grace"}),
}
