"""One run of the benchmark: ``python -m benchmarks.selection.job SPEC.json OUT.json``.

A small GPT in float32, one process, one rank, a DeepSpeed engine at ZeRO 0. Every arm gets the same optimizer steps, weights
and schedule of the learning rate; what differs is which samples a step holds. CPU seconds are those of this process, from the
first decision to the last step; the engine's construction, loading and validation are not counted.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grace_ds_quickstart.model import GPT, GPTConfig
from grace_ds_quickstart.pollute import Kind
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.selection.arms import ARMS
from benchmarks.selection.arms.base import Arm, Batch, Plan, View
from benchmarks.selection.arms.system import SystemArm
from benchmarks.selection.pools import decode_rows
from benchmarks.selection.runs import RunSpec, read_spec
from benchmarks.selection.scoring import Scorer, mean_loss
from benchmarks.selection.sizes import model_config, training_flops
from benchmarks.selection.store import Stored, opened
from benchmarks.selection.visits import VisitCounts
from grace_ds.gradients.losses import sample_losses
from grace_ds.utils.files import write_atomic

HOLDOUT_SEED = 7919  # of the weights of models other than the one in training


def build_engine(spec: RunSpec, config: GPTConfig, samples: int) -> Any:
    """The DeepSpeed engine around a model whose weights depend on the seed alone."""
    import deepspeed
    from grace_ds_quickstart.train import ds_config

    torch.manual_seed(spec.seed)
    model = GPT(config)
    shared = {"batch": spec.batch, "zero": 0, "lr": spec.lr, "steps": spec.steps}
    unused = {"grace": False, "order_seed": 0, "data": Path(), "out": Path()}
    job = ds_config(argparse.Namespace(**shared, **unused), samples)
    del job["bf16"], job["data_efficiency"]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=job)
    return engine


def new_model(config: GPTConfig, seed: int) -> GPT:
    """A fresh model of the same shape; torch's own random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT(config)


def view_of(spec: RunSpec, pool: Stored, config: GPTConfig, model: GPT) -> View:
    """What the arm can reach."""
    rows, visits = pool.array("train"), VisitCounts()
    budget = spec.budget_of(len(rows))
    return View(
        rows=rows,
        trusted=pool.array("trusted"),
        kinds=pool.array("kinds"),
        folder=pool.folder,
        vocab=config.vocab,
        plan=Plan(spec.steps, spec.batch, budget, spec.interval, spec.lr, spec.order_seed),
        visits=visits,
        scorer=Scorer(model, config, visits),
        new_model=functools.partial(new_model, config, spec.order_seed + HOLDOUT_SEED),
        decode=functools.partial(decode_rows, pool.tokenizer()),
    )


class Trainer:
    """The loop of one run.

    Args:
        engine: DeepSpeed's.
        arm: feeds it.
        view: of the arm.
        held: rows to validate on, by name.
        eval_every: steps between two validations.
    """

    def __init__(self, engine: Any, arm: Arm, view: View, held: dict[str, Any], eval_every: int) -> None:
        self.engine, self.arm, self.view, self.held, self.eval_every = engine, arm, view, held, eval_every
        self.uses = np.zeros(view.n + len(view.trusted), np.int64)
        self.curve: list[dict[str, float]] = []
        self._all = np.concatenate([view.rows, view.trusted])

    def run(self) -> None:
        """All steps."""
        visits, steps = self.view.visits, self.view.plan.steps
        with visits.counted(), visits.selecting():
            self.arm.begin(self.engine)
        for step in range(steps):
            loss = self.step(step)
            if (step + 1) % self.eval_every == 0 or step + 1 == steps:
                losses = {name: mean_loss(self.engine.module, rows) for name, rows in self.held.items()}
                self.curve.append({"step": step + 1, "train": loss, "cpu": visits.cpu_total, **losses})
                print(f"step {step + 1}/{steps} train {loss:.4f} dev {losses['dev']:.4f}", flush=True)

    def step(self, step: int) -> float:
        """One optimizer step; its training loss."""
        visits, arm = self.view.visits, self.arm
        with visits.counted():
            with visits.selecting():
                arm.before(step)
            if isinstance(arm, SystemArm) and arm.counts_flops():
                batch, loss, losses = self._flops_counted(step, arm)
            else:
                batch, loss, losses = self._train(step)
            if arm.watches:
                with visits.selecting():
                    arm.observe(step, batch.ids, losses)
        visits.flops_train += len(batch.ids) * training_flops(self.view.scorer.config)
        np.add.at(self.uses, batch.ids, 1)
        return loss

    def _train(self, step: int) -> tuple[Batch, float, Any]:
        batch = self.arm.take(step)
        rows = batch.rows
        if rows is None:
            rows = torch.from_numpy(self._all[batch.ids].astype(np.int64))
        handle = None if batch.weights is None else rescale(self.engine.module, batch.weights)
        loss = self.engine(rows)
        if handle is not None:
            handle.remove()
        losses = None
        if self.arm.watches:
            found = sample_losses(loss, len(rows))
            assert found is not None
            losses = found[0].numpy()
        self.engine.backward(loss)
        self.engine.step()
        return batch, float(loss), losses

    def _flops_counted(self, step: int, arm: SystemArm) -> tuple[Batch, float, Any]:
        with FlopCounterMode(display=False) as counter:
            done = self._train(step)
        arm.counted(counter.get_total_flops())
        return done

    def facts(self) -> dict[str, Any]:
        """What was trained on."""
        pool, trusted = self.uses[: self.view.n], self.uses[self.view.n :]
        total = float(self.uses.sum())
        shares = {kind.name.lower(): float(pool[self.view.kinds == kind].sum()) / total for kind in Kind}
        return {
            "repeats": total / max(1, int((self.uses > 0).sum())),
            "distinct": int((self.uses > 0).sum()),
            "kinds": {**shares, "trusted": float(trusted.sum()) / total},
        }


def rescale(model: GPT, weights: Any) -> Any:
    """Multiplies each sample's loss by its weight: by its gradient at the logits, which comes to the same."""
    factor = torch.from_numpy(weights).view(-1, 1, 1)

    def on_output(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]

    return model.lm_head.register_forward_hook(on_output)


def warm_up(view: View) -> None:
    """What torch does once, at the first backward pass of a process, is no cost of an arm."""
    view.new_model()(torch.from_numpy(view.trusted[:4].astype(np.int64))).backward()


def run_job(spec: RunSpec) -> dict[str, Any]:
    """Trains and returns the result."""
    pool = opened(Path(spec.pool_folder))
    if pool.manifest["digest"] != spec.pool_digest:
        raise SystemExit(f"{pool.folder} holds {pool.manifest['digest']}, the run asks for {spec.pool_digest}: build it anew")
    config = model_config(spec.model, pool.manifest["vocab"], pool.array("train").shape[1] - 1)
    engine = build_engine(spec, config, pool.manifest["rows"]["train"])
    view = view_of(spec, pool, config, engine.module)
    arm = ARMS[spec.arm](view)
    trainer = Trainer(engine, arm, view, {"dev": pool.array("dev"), "test": pool.array("test")}, spec.eval_every)
    warm_up(view)
    began = time.perf_counter()
    trainer.run()
    told = arm.end()
    return {
        "settings": asdict(spec),
        "dev": trainer.curve[-1]["dev"],
        "test": trainer.curve[-1]["test"],
        "parameters": sum(p.numel() for p in engine.module.parameters()),
        "wall": time.perf_counter() - began,
        **view.visits.as_dict(),
        **trainer.facts(),
        "told": told,
        "curve": trainer.curve,
    }


def main(argv: list[str]) -> int:
    """Reads the spec, runs it in a world of one rank, writes the result."""
    spec = read_spec(Path(argv[0]))
    torch.set_num_threads(1)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    import deepspeed
    import torch.distributed as dist

    # DeepSpeed would compile shared-memory collectives for a minute first.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with tempfile.TemporaryDirectory(prefix="selection-") as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        result = run_job(spec)
        dist.destroy_process_group()
    write_atomic(Path(argv[1]), (json.dumps(result, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
