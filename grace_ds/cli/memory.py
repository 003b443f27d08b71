"""Estimate the memory that a job's ranks on this machine need at least, for ``grace-ds doctor`` to compare with free memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace_ds.config.load import find_block, load_config, read_ds_config
from grace_ds.config.schema import GraceConfig
from grace_ds.errors import ConfigError
from grace_ds.graph.repair import SPARE

_ROW_BYTES = 36  # bytes of a table's row in addition to its sketch
_VISIT_BYTES = 12  # bytes per sample seen


@dataclass(frozen=True)
class Job:
    """Facts of a job that determine its memory.

    Attributes:
        config: path of its DeepSpeed config.
        parameters: number of the model's parameters.
        samples: number of the dataset's samples.
        ranks: data-parallel ranks of the job.
        here: ranks on this machine.
    """

    config: Path
    parameters: float
    samples: float
    ranks: int
    here: int


def needs(job: Job) -> tuple[int, int]:
    """Return the bytes on this machine of the model's states, and of GRACE's; activations and data workers are not included.

    The model's: weights, gradients, and Adam's states, with float32 weights if the job computes in 16 bits.  Each is divided
    among the ranks from its ZeRO stage on (arXiv 1910.02054, section 3.1).

    Raises:
        ConfigError: the config cannot be read, or a number is not above 0.
    """
    for name in ("parameters", "samples", "ranks", "here"):
        if not getattr(job, name) > 0:
            raise ConfigError(f"--{name} must be above 0, not {getattr(job, name)}")
    config = read_ds_config(job.config)
    found = find_block(config)
    grace = load_config(found[1], found[0]) if found is not None else GraceConfig(enabled=False)
    return round(job.here * _model(config, job)), round(job.here * _grace(grace, job)) if grace.enabled else 0


def _model(config: Mapping[str, Any], job: Job) -> float:
    stage = int((config.get("zero_optimization") or {}).get("stage", 0))
    half = any((config.get(kind) or {}).get("enabled") for kind in ("bf16", "fp16"))
    width, states = (2, 12) if half else (4, 8)
    parts = ((width, 3), (width, 2), (states, 1))  # bytes per parameter, and the stage that divides them among the ranks
    return sum(job.parameters * size / (job.ranks if stage >= divided else 1) for size, divided in parts)


def _grace(grace: GraceConfig, job: Job) -> float:
    window = min(grace.window or job.samples, job.samples)
    row = 2 * grace.collect.dim + _ROW_BYTES if grace.collects else 0
    if grace.builds_graph:  # the vectors, and the lists of the kept graph
        row += 4 * grace.features.dim + 8 * (grace.graph.k + SPARE + 1)
    return _VISIT_BYTES * job.samples + window / job.ranks * row
