"""One small job on its ranks, in a given setting: layout of the model, ZeRO, recomputation, recipe."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer, set_autotp_mode
from deepspeed.ops import __compatible_ops__
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.sequence.layer import DistributedAttention
from torch import nn
from torch.utils.checkpoint import checkpoint

import grace_ds
from tests.multirank.grace_parallel_job import Ranks
from tests.multirank.harness import World
from tests.multirank.parallel_job import Block, Embed, Local, Whole, collate, loss_of
from tests.multirank.toy import VOCAB, Corpus
from tests.multirank.zero_job import param_digest

# It would be compiled first, for a minute, under a lock that a killed rank leaves behind.
__compatible_ops__["deepspeed_shm_comm"] = False

BATCH, GAS, STEPS, SAVED, WIDTH = 8, 2, 10, 6, 32
Job = dict[str, Any]


# -- one job ------------------------------------------------------------------------------------------------------------------


class Recomputed(Block):
    """A block whose activations are recomputed; ``how``: reentrant, nonreentrant or deepspeed."""

    how = "nonreentrant"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        if self.how == "deepspeed":
            out: torch.Tensor = deepspeed.checkpointing.checkpoint(super().forward, x)
        else:
            out = checkpoint(super().forward, x, use_reentrant=self.how == "reentrant")
        return out


def blocks_of(job: Job) -> type[Block]:
    how = job.get("recomputed", "plain")
    return Block if how == "plain" else type("Recomputed", (Recomputed,), {"how": how})


def layers_of(block: type[Block]) -> list[LayerSpec]:
    return [LayerSpec(Embed), *[LayerSpec(block)] * 4, LayerSpec(nn.Linear, WIDTH, VOCAB, bias=False)]


def built(specs: list[LayerSpec]) -> list[nn.Module]:
    """The same weights as those of a PipelineModule with ``seed_layers``."""
    from deepspeed.runtime.utils import set_random_seed

    made = []
    for i, spec in enumerate(specs):
        set_random_seed(1234 + i)
        made.append(spec.build())
    return made


def ds_config(job: Job) -> dict[str, Any]:
    sizes = sizes_of(job)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH // GAS // sizes["DP"],
        "gradient_accumulation_steps": GAS,
        # With a smaller eps, steps would be made of the rounding of gradients that are 0, such as those of the keys' biases.
        "optimizer": job.get("optimizer", {"type": "AdamW", "params": {"lr": 1e-3, "eps": 1e-6, "torch_adam": True}}),
        "gradient_clipping": 0.0,  # the default, 1.0, does not clip a pipeline's gradients
        "zero_optimization": {"stage": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        **job.get("ds", {}),
    }
    if sizes["TP"] > 1 and sizes["PP"] == 1:
        config["tensor_parallel"] = {
            "autotp_size": sizes["TP"],
            "partition_config": {
                "use_default_specs": False,
                "layer_specs": [
                    {"patterns": [r".*up\.weight$"], "partition_type": "column"},
                    {"patterns": [r".*down\.weight$"], "partition_type": "row"},
                ],
            },
        }
    return config


def grace_block(job: Job) -> dict[str, Any]:
    return {
        "enabled": True,
        "recipe": job["recipe"],
        "mode": job.get("mode", "train"),
        "budget": 0.3,
        "start_step": 0,
        "guard": {"enabled": False},
        "refresh": {"interval_steps": 4, "cadence": "fixed", "timeout_seconds": 30},
    }


def sizes_of(job: Job) -> dict[str, int]:
    kinds = job.get("parallel", [])
    return {kind: 2 if kind in kinds else 1 for kind in ("DP", "TP", "PP", "SP")}


def start(job: Job, data: Corpus) -> tuple[Any, Any]:
    """The engine, with GRACE where the job asks for it, and its loader.

    There are no data workers: they decide how far is looked ahead.
    """
    sizes, config, options = sizes_of(job), ds_config(job), dict[str, Any]()
    model = model_of(job)
    if job.get("compile") == "module":
        model = torch.compile(model, backend="eager")  # type: ignore[assignment]
    elif job.get("compile") == "in place":
        model.compile(backend="eager")
    if sizes["SP"] > 1:
        # At ZeRO 0 DeepSpeed 0.19.8 adds gradients over the ranks of a sequence only with an mpu, at ZeRO 3 only with a mesh.
        mesh = config["zero_optimization"]["stage"] == 3 or sizes["PP"] * sizes["TP"] > 1
        options |= {"mesh_param": (dist.get_world_size() // 2, 2)} if mesh else {"mpu": Ranks()}
    options |= {"model": model, "model_parameters": list(model.parameters())}
    engine, *_ = deepspeed.initialize(config=config, **options)
    if job.get("compile") == "engine":
        engine.compile(backend="eager")
    if "activations" in job:
        deepspeed.checkpointing.configure(engine.mpu, **job["activations"])
    if sizes["SP"] > 1:  # the peers' group exists once the engine has made or read it
        for block in [m for m in model.modules() if isinstance(m, Block)]:
            block.attend = DistributedAttention(Local(), engine.seq_parallel_group, scatter_idx=2, gather_idx=1)
    if job.get("recipe") is None:
        return engine, engine.deepspeed_io(data, collate_fn=collate, num_local_io_workers=0)
    handle = grace_ds.attach(engine, data, grace_block(job), collate_fn=collate, trusted_data=Corpus(64, salt=3))
    return engine, handle.feed(0) if sizes["PP"] > 1 else handle.deepspeed_loader(0)


def model_of(job: Job) -> nn.Module:
    sizes, specs = sizes_of(job), layers_of(blocks_of(job))
    if sizes["PP"] == 1:
        return Whole(built(specs), (dist.get_rank() % sizes["SP"], sizes["SP"]))
    options: dict[str, Any] = {"num_stages": 2}
    if sizes["TP"] > 1:
        options = {"topology": PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=sizes["DP"])}
    model = PipelineModule(specs, loss_fn=loss_of, seed_layers=True, partition_method="uniform", **options)
    if sizes["TP"] > 1:  # DeepSpeed leaves it to the layers of a pipeline to be parallel
        set_autotp_mode(training=True)
        group = model.mpu().get_slice_parallel_group()
        for block in [m for m in model.modules() if isinstance(m, Block)]:
            block.up, block.down = LinearLayer(block.up, group), LinearAllreduce(block.down, group)
    return model


def run(world: World, job: Job, place: Path) -> dict[str, Any]:
    """One job on this rank; what it saw."""
    os.environ.update({"RANK": str(world.rank), "LOCAL_RANK": str(world.rank), "WORLD_SIZE": str(world.size)})
    world.join()
    deepspeed.init_distributed("gloo", verbose=False)
    if job.get("recomputed") == "deepspeed" and "activations" not in job:
        deepspeed.checkpointing.configure(None)
    engine, loader = start(job, Corpus())
    second = start({**job, "recipe": job["recipe"] if job["second"] == "grace" else None}, Corpus()) if "second" in job else None
    record = train(job, engine, loader, second, place)
    if job.get("save"):
        engine.load_checkpoint(str(place / "saved"))
        record["again"] = train(job, engine, loader, None, None)
    grace = getattr(engine, "grace_ds", None)
    record["params"] = param_digest(engine)
    if grace is not None:
        record |= told_by(grace.controller)
        if second is not None and job["second"] == "grace":
            record["other"] = {**record["other"], **told_by(second[0].grace_ds.controller)}
            second[0].grace_ds.detach()
        grace.detach()
    dist.barrier()  # a rank that ends before the others takes its connections with it
    return record


def told_by(controller: Any) -> dict[str, Any]:
    metrics = controller.snapshot()
    keys = ("refresh_failures", "cursor", "unrecognised", "collected_rows", "step")
    table = controller.table
    found = {key: metrics[key] for key in keys}
    by_id = {"influence": table.rows.influence, "row of step": table.last}
    return found | {key: dict(zip(table.ids.tolist(), column.tolist(), strict=True)) for key, column in by_id.items()}


def train(job: Job, engine: Any, loader: Any, second: tuple[Any, Any] | None, place: Path | None) -> dict[str, Any]:
    """Runs to the last step; returns the ids of each step as this rank saw them, the losses, and the schedules."""
    step = pipeline_step if sizes_of(job)["PP"] > 1 else own_step
    iterator, found = endless(loader), seen_of(engine)
    other = None if second is None else (*second, endless(second[1]), seen_of(second[0]))
    while engine.global_steps < STEPS:
        batches = list(itertools.islice(iterator, GAS)) if step is own_step else []
        note(found, engine, *step(engine, batches))
        if other is not None:  # in turn, on the same batches or on its own
            mine = list(itertools.islice(other[2], GAS)) if job["second"] == "grace" else batches
            note(other[3], other[0], *step(other[0], mine))
        if place is not None and job.get("save") and engine.global_steps == SAVED:
            engine.save_checkpoint(str(place / "saved"))
    return found if other is None else {**found, "other": other[3]}


def endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def seen_of(engine: Any) -> dict[str, Any]:
    return {"first": engine.global_steps, "steps": [], "losses": [], "applied": [], "schedules": {}}


def note(found: dict[str, Any], engine: Any, ids: list[int], losses: list[float]) -> None:
    """Adds a step, and the schedules there are."""
    found["steps"].append(ids)
    found["losses"] += losses
    found["applied"].append(bool(engine.was_step_applied()))
    grace = getattr(engine, "grace_ds", None)
    for s in [] if grace is None else grace.controller.book.schedules:
        facts = {"start": s.start, "digest": s.digest(), "ids": s.ids.tolist(), "roles": s.roles.tolist()}
        found["schedules"][s.version] = facts


def own_step(engine: Any, batches: list[Any]) -> tuple[list[int], list[float]]:
    ids, losses = [], []
    for tokens, targets in batches:
        loss = engine(tokens, targets)
        engine.backward(loss)
        engine.step()
        ids += targets[:, -1].tolist()
        losses.append(loss.item())
    return ids, losses


def pipeline_step(engine: Any, _: list[Any]) -> tuple[list[int], list[float]]:
    """Of a pipeline only the last stage sees the samples' own numbers."""
    batches: list[list[int]] = []
    original = engine.module.loss_fn

    def looked(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        batches.append(targets[:, -1].tolist())
        return original(logits, targets)

    engine.module.loss_fn = looked
    loss = engine.train_batch()
    engine.module.loss_fn = original
    return list(itertools.chain(*batches[:GAS])), [float(loss)]  # what comes after the step's own are probes
