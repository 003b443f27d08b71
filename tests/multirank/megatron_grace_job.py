"""A Megatron job under ``recipe: grace`` at toy size, laid out over its ranks in several ways: what its refreshes see."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

import grace_ds.megatron
from grace_ds.errors import ConfigError
from grace_ds.gradients.sharding import Split
from grace_ds.integrations.megatron.gradients import Gradients
from grace_ds.integrations.megatron.job import job
from grace_ds.utils.methods import replace_method
from tests.multirank.harness import World
from tests.multirank.toy_megatron import BATCH, INTERVAL, MICRO, POOL, PROBED, STEPS, Layout, Trainer, block, lay_out
from tests.multirank.traffic import Traffic


def run(layout: Layout, run_dir: Path | None, look: bool, **more: Any) -> dict[str, Any]:
    """What a run came to on this rank; with ``look`` what further probes of its last model find."""
    from megatron.core import parallel_state as mpu

    lay_out(layout)
    traffic = Traffic()
    trainer = Trainer(layout, block(run_dir, **more))
    traffic.watch()
    losses = []
    for step in range(1, STEPS + 1):
        found = trainer.forward_backward()
        trainer.pool.broken = layout.breaks and step == INTERVAL  # throughout the refresh after this step
        trainer.optimizer.step()
        trainer.pool.broken = False
        losses.append(found)
    gradients, feed = job.gradients, job.feed
    assert gradients is not None
    result: dict[str, Any] = {"losses": losses, "traffic": traffic.take(), "bytes": gradients.ranks.bytes}
    if look:
        result |= looked_into(trainer)
    result["failures"] = gradients.sketcher.failures
    if feed is not None:
        controller = feed.controller
        rows = controller.table.rows
        result |= {
            "schedules": [(s.digest(), s.ids, s.roles, s.weights, dict(s.meta)) for s in controller.book.schedules],
            "lines": read_lines(run_dir),
            "rows": {f.name: getattr(rows, f.name) for f in dataclasses.fields(rows)},
            "basis": None if controller.basis is None else dict(controller.basis.factors),
            "reference": controller.reference,
            "snapshot": controller.snapshot(),
            "noise": trainer.pool.noise,
            "layers": [(layer.inputs, layer.outputs) for layer in gradients.sketcher.layers],
        }
    grace_ds.megatron.detach()
    if layout.resumes:
        result["resumed"] = resumed(layout, run_dir, more)
    mpu.destroy_model_parallel()
    return result


def resumed(layout: Layout, run_dir: Path | None, more: dict[str, Any]) -> dict[str, Any] | None:
    """What the run comes to when it is taken up again in the middle, from its schedules alone."""
    begin = STEPS - INTERVAL + 2
    trainer = Trainer(layout, block(run_dir, **more), consumed=begin * BATCH)
    feed = job.feed
    slots = None if feed is None else feed.slots(begin * BATCH, (2 * INTERVAL - begin) * BATCH).ids
    for _ in range(begin, STEPS):
        trainer.forward_backward()
        trainer.optimizer.step()
    found = None
    if feed is not None:
        found = {"begin": begin, "slots": slots, "snapshot": feed.controller.snapshot(), "rows": len(feed.controller.table)}
    grace_ds.megatron.detach()
    return found


def read_lines(run_dir: Path | None) -> list[dict[str, Any]]:
    """The record of the run's refreshes, on the rank that wrote it."""
    file = None if run_dir is None else run_dir / "refreshes.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file is not None and file.exists() else []


def looked_into(trainer: Trainer) -> dict[str, Any]:
    """Probes of the model as it is: influences of pool samples by the exact moments and by others, and what stays untouched."""
    gradients = job.gradients
    assert gradients is not None
    found: dict[str, Any] = {}
    if trainer.layout.tp > 1 or trainer.layout.pp == 1:
        found["exact"] = influences(gradients)
        with blockwise():
            found["blockwise"] = influences(gradients)
        with alone(gradients):
            found["alone"] = influences(gradients)
    found["untouched"] = untouched_by(trainer, gradients)
    return found


def influences(gradients: Gradients) -> Any:
    """Influences of some pool samples along a basis fitted now; on the ranks with the dataset."""
    if job.feed is None:
        gradients.listen()
        return None
    controller = job.feed.controller
    probe = controller.influence_probe
    assert probe is not None
    remembered, probe.gradient = probe.gradient, None
    fitted = probe.fit(9, np.arange(POOL))
    gradients.sketcher.set_basis(fitted.basis)
    rows = probe.passes.rows(probe.passes.read(job.feed.corpus, np.arange(PROBED), "pool"))
    probe.gradient = remembered
    gradients.sketcher.set_basis(controller.basis)
    gradients.release(controller, None)
    return {
        "influence": np.concatenate([r.influence for r in rows]),
        "sketch": np.concatenate([r.sketch for r in rows]),
        "basis": dict(fitted.basis.factors),
    }


@contextmanager
def blockwise() -> Iterator[None]:
    """Second moments of each rank's block alone: pairs of features of different ranks are lost."""
    undo = replace_method(Split, "whole", lambda original, split, side, projected: projected)
    yield
    undo()


@contextmanager
def alone(gradients: Gradients) -> Iterator[None]:
    """No sum over the model's ranks of what a basis is fitted to."""

    def own(original: Any, array: Any) -> Any:
        total = original(array)
        return array if array.dtype == np.float64 and array.size > 1000 else total

    undo = replace_method(gradients.ranks, "allreduce", own)
    yield
    undo()


def untouched_by(trainer: Trainer, gradients: Gradients) -> dict[str, bool]:
    """Whether a probe of every kind leaves the job's state, and its next step, as they were, bit by bit."""
    from megatron.core import parallel_state as mpu

    micro = BATCH // (MICRO * mpu.get_data_parallel_world_size())
    batches = [item for item, _ in zip(DataLoader(trainer.pool, batch_size=MICRO), range(micro), strict=False)]

    def again() -> tuple[float | None, list[torch.Tensor]]:
        trainer.read(lambda _: batches)
        loss = trainer.forward_backward()
        return loss, [p.main_grad.clone() for chunk in trainer.model for p in chunk.parameters()]

    gradients.kind = ""
    loss, grads = again()
    before = state_of(trainer)
    if job.feed is None:
        gradients.listen()
        gradients.listen()
    else:
        probe = job.feed.controller.influence_probe
        assert probe is not None
        influences(gradients)
        probe.losses(3)
        gradients.release(job.feed.controller, None)
    after = state_of(trainer)
    gradients.kind = ""
    loss_after, grads_after = again()
    return {
        "state": all(torch.equal(a, b) for a, b in zip(before, after, strict=True)),
        "loss": loss == loss_after,
        "gradients": all(torch.equal(a, b) for a, b in zip(grads, grads_after, strict=True)),
        "learning": all(p.requires_grad for chunk in trainer.model for p in chunk.parameters()),
        "training": all(module.training for chunk in trainer.model for module in chunk.modules()),
        "functions": trainer.model[0].config.grad_scale_func == trainer.optimizer.scale_loss,
    }


def state_of(trainer: Trainer) -> list[torch.Tensor]:
    """Weights, their gradients, the optimizer's state and torch's random state."""
    found = [torch.get_rng_state()]
    for chunk in trainer.model:
        found += [t.detach().clone() for p in chunk.parameters() for t in (p, p.main_grad)]
    inner = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    for optimizer in inner:
        found += [
            t.clone() for state in optimizer.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)
        ]
    return found


def work(world: World, folder: str, layouts: list[Layout]) -> list[dict[str, Any]]:
    """Every layout on this rank."""
    return [run(layout, Path(folder) / f"{world.size}-{i}", not layout.plain) for i, layout in enumerate(layouts)]


def refusals(world: World) -> dict[str, str]:
    """On one rank: what is refused under recipe: grace, and what recipe: auto makes of it."""
    from megatron.core.pipeline_parallel import get_forward_backward_func, schedules

    said: dict[str, str] = {}

    def refused(name: str, act: Any, **more: Any) -> None:
        try:
            act(block(None, **more))
            assert job.feed is not None
            said[name] = job.feed.controller.config.recipe
        except ConfigError as error:
            said[name] = str(error)
        grace_ds.megatron.detach()

    lay_out(Layout())

    def half(b: dict[str, Any]) -> None:
        trainer = Trainer(Layout(), b, prepare=lambda chunk: setattr(chunk.config, "fp16", True))
        trainer.forward_backward()

    def late(b: dict[str, Any]) -> None:
        taken = get_forward_backward_func()
        trainer = Trainer(Layout(), b)
        schedules_own = schedules.get_forward_backward_func
        schedules.get_forward_backward_func = lambda *_: taken
        import megatron.core.pipeline_parallel as package

        package.get_forward_backward_func = lambda *_: taken
        try:
            trainer.forward_backward()
            trainer.optimizer.step()
        finally:
            schedules.get_forward_backward_func = package.get_forward_backward_func = schedules_own

    for recipe in ("grace", "auto"):
        refused(f"unattached {recipe}", lambda b: Trainer(Layout(), b, attach=False), recipe=recipe)
        refused(f"shadow {recipe}", lambda b: Trainer(Layout(), b), recipe=recipe, mode="shadow")
        refused(f"fp16 {recipe}", half, recipe=recipe)
        refused(f"late {recipe}", late, recipe=recipe)
    said["whole"] = str(schedules.forward_backward_no_pipelining.__module__)
    return said
