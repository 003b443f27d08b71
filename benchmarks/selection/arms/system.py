"""The system's own arms: the job as a user writes it, with a block in its config; the arm only listens.

The CPU seconds of attaching, which holds the first schedule, are measured. Those of later refreshes and of the hooks come from
the system's own clocks, which are wall clocks: they are scaled by the CPU seconds per wall second of the steps they fell in.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.selection.arms.base import Arm, Batch, View, job_sampler
from benchmarks.selection.sizes import training_flops
from grace_ds.records import Array

RECIPES: dict[str, dict[str, Any]] = {  # as a user has them, the guard included
    "grace": {},  # the default
    "content": {"recipe": "content"},
    "no_gradients": {"ablate": ["gradients", "loss", "sketches"]},
    "no_graph": {"ablate": ["graph", "sketches"]},
    "no_sketches": {"ablate": ["sketches"]},
    "grace_facility": {"selection": {"objective": "facility_location"}},
    "pseudo": {},
    "pseudo_content": {"recipe": "content"},
    "unguarded": {"guard": {"enabled": False}},
    "unguarded_content": {"recipe": "content", "guard": {"enabled": False}},
    "unguarded_no_gradients": {"ablate": ["gradients", "loss", "sketches"], "guard": {"enabled": False}},
}
WITHOUT_TRUSTED = ("pseudo", "pseudo_content")


def block(name: str, view: View) -> dict[str, Any]:
    """The grace block of a system arm: the one place where the benchmark configures the system."""
    plan = view.plan
    config: dict[str, Any] = {
        **RECIPES[name],
        "budget": plan.budget,
        "refresh": {"interval_steps": plan.interval, "cadence": "fixed"},
        "total_steps": plan.steps,
        "seed": plan.seed,
    }
    if name not in WITHOUT_TRUSTED:
        config["trusted"] = str(view.folder / "trusted.npy")
    return config


class TokenRows(Dataset[dict[str, Tensor]]):
    """The pool as a job's dataset."""

    def __init__(self, rows: Array) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.from_numpy(self.rows[index].astype(np.int64))}


class SystemArm(Arm):
    """Trains on what ``grace_ds.attach`` feeds.

    Attributes:
        block: of the job's config, as the system is given it.
        step_flops: of the dearest step that was counted, training included; told by the training loop.
        collected_steps: so far.
        decisions: of the guard, one for each schedule: step, level and what it was decided by.
    """

    name = "grace"

    def __init__(self, view: View) -> None:
        super().__init__(view)
        # Before anything is counted: what Python imports once is no cost of a selection.
        from grace_ds.integrations.deepspeed import attach

        self._attach = attach
        self.block = block(self.name, view)
        self.step_flops = 0.0
        self.collected_steps = 0
        self.decisions: list[dict[str, Any]] = []

    def begin(self, engine: Any) -> None:
        """Attaches the system; its first schedule is made here."""
        self.handle = self._attach(engine, TokenRows(self.view.rows), config=self.block, sampler=job_sampler(self.view))
        # No workers: their processes would take CPU seconds that nobody counts.
        self._batches = self._endless(self.handle.deepspeed_loader(num_local_io_workers=0))
        self._at_start = self._clocks()
        self._cpu, self._wall = time.process_time(), time.perf_counter()
        self._version = -1

    def _endless(self, loader: Any) -> Iterator[Any]:
        while True:
            yield from loader

    def _clocks(self) -> float:
        """Wall seconds of refreshes and hooks so far."""
        metrics = self.handle.metrics
        return float(metrics["refresh_seconds"]) + float(metrics["collect_seconds"])

    def take(self, step: int) -> Batch:
        """The loader's next batch, with its ids from the schedule in force."""
        ids = self.handle.controller.book.slots(step * self.plan.batch, self.plan.batch).ids
        rows = next(self._batches)["input_ids"]
        assert np.array_equal(self.view.rows[ids], rows.numpy())  # the schedule tells what the loader feeds
        return Batch(ids, rows=rows)

    def counts_flops(self) -> bool:
        """Whether the step to come is to be counted: the first one under each schedule."""
        controller = self.handle.controller
        if controller.collecting:
            self.collected_steps += 1
        fresh = controller.metrics.version != self._version
        self._version = controller.metrics.version
        if fresh:
            guard = controller.book.schedules[-1].meta.get("guard", {})
            told = {
                key: guard[key] for key in ("level", "effective_share", "loss_share", "prediction_skill", "high") if key in guard
            }
            self.decisions.append({"step": controller.step, **told})
        return bool(fresh and controller.collecting and controller.next_refresh > controller.step + 1)

    def counted(self, flops: float) -> None:
        """Takes the counter's sum over one collected step."""
        self.step_flops = max(self.step_flops, flops)

    def end(self) -> dict[str, Any]:
        """Enters the costs of refreshes and hooks, and says what the system reports of itself.

        FLOPs: collected steps at the dearest that was counted; probes at a forward and a backward pass a sample, an upper bound.
        """
        visits, metrics = self.view.visits, self.handle.metrics
        share = (time.process_time() - self._cpu) / (time.perf_counter() - self._wall)
        visits.cpu_selection += (self._clocks() - self._at_start) * min(share, 1.0)
        probes = metrics.get("probe_samples")
        collect = max(0.0, self.step_flops - self._plain_step_flops()) if self.step_flops else 0.0
        visits.flops_selection += self.collected_steps * collect
        visits.flops_selection += (probes or 0) * training_flops(self.view.scorer.config)
        self.handle.detach()
        plain = {k: v for k, v in metrics.items() if isinstance(v, (int, float, str, list)) and k != "train_seconds"}
        told = {"collected_steps": self.collected_steps, "collect_flops_a_step": collect, "probe_samples": probes}
        told |= {"decisions": self.decisions}
        return {"block": self.block, "metrics": plain, "events": dict(metrics["events"]), **told}

    def _plain_step_flops(self) -> float:
        """What the counter that counted the collected steps says of a step without the system."""
        rows = torch.from_numpy(self.view.rows[: self.plan.batch].astype(np.int64))
        model = self.view.new_model()
        with FlopCounterMode(display=False) as counter:
            model(rows).backward()
        return float(counter.get_total_flops()) * self.plan.batch / len(rows)


def system_arm(name: str) -> type[SystemArm]:
    """The arm class of a recipe."""
    return type(f"System_{name}", (SystemArm,), {"name": name, "__doc__": f"The system with the recipe {name!r}."})
