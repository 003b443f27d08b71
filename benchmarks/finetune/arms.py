"""The arms, and the DeepSpeed config of each."""

from __future__ import annotations

from typing import Any

ARMS = ("none", "uniform", "rs2", "content", "grace", "full")
REFRESHES = 3  # of a run, beside the first schedule
# The arms that are the system's; the others are a plain Trainer's.
SYSTEM: dict[str, dict[str, Any]] = {
    "rs2": {"recipe": "uniform", "start_step": 0, "selection": {"objective": "rs2"}},
    "content": {"recipe": "content"},
    "grace": {"recipe": "grace"},
}


def ds_config(spec: dict[str, Any]) -> dict[str, Any]:
    """The DeepSpeed config, with the arm's block where it has one."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": "auto"},
    }
    if spec["arm"] in SYSTEM:
        block = {
            "budget": spec["budget"],
            "seed": 1000 + spec["seed"],
            "guard": {"enabled": False},
            "refresh": {"interval_steps": max(1, spec["steps"] // REFRESHES), "cadence": "fixed"},
            **SYSTEM[spec["arm"]],
        }
        config["data_efficiency"] = {"enabled": True, "data_sampling": {"enabled": True, "grace": block}}
    return config
