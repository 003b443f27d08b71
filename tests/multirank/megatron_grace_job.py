"""A Megatron job under ``recipe: grace`` at toy size, laid out over its ranks in several ways: what its refreshes see."""

from __future__ import annotations

import dataclasses
import json
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

import grace_ds.megatron
from grace_ds.errors import ConfigError
from grace_ds.gradients.megatron_layers import global_name
from grace_ds.gradients.sharding import Split
from grace_ds.integrations.megatron.gradients import Gradients
from grace_ds.integrations.megatron.job import job
from grace_ds.utils.methods import replace_method
from tests.multirank.harness import World
from tests.multirank.megatron_shims import on_cpu

VOCAB, LENGTH, HIDDEN, POOL, TRUSTED = 64, 16, 32, 384, 64
MICRO, BATCH, INTERVAL, STEPS, PROBED = 2, 16, 8, 18, 32
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@dataclass(frozen=True)
class Layout:
    """How the ranks share the model and the data, and how the job runs it."""

    tp: int = 1
    pp: int = 1
    vp: int | None = None
    blocks: int = 2
    sp: bool = False
    recompute: bool = False
    adam: bool = False
    distributed: bool = False
    per_token: bool = False
    two: bool = False
    breaks: bool = False
    resumes: bool = False
    plain: bool = False


class Texts(Dataset[Any]):
    """Walks through a fixed cycle of tokens with a few slips, or noise: the former are good.

    Attributes:
        broken: items cannot be read.
    """

    def __init__(self, n: int, seed: int, noisy: float) -> None:
        self.broken = False
        draw = np.random.default_rng(seed)
        cycle = np.random.default_rng(7).permutation(VOCAB)
        next_of = np.empty(VOCAB, np.int64)
        next_of[cycle] = np.roll(cycle, -1)
        self.rows = np.empty((n, LENGTH + 1), np.int64)
        self.noise = draw.random(n) < noisy
        for row, noise in zip(self.rows, self.noise, strict=True):
            row[0] = draw.integers(VOCAB)
            for t in range(LENGTH):
                row[t + 1] = draw.integers(VOCAB) if noise or draw.random() < 0.1 else next_of[row[t]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | None) -> Any:
        if self.broken:
            raise OSError("the disk is gone")
        row = torch.from_numpy(self.rows[0 if index is None else index])
        mask = torch.ones(LENGTH)
        mask[LENGTH - (index or 0) % 3 :] = 0  # unequal numbers of tokens that count
        return {"tokens": row[:-1], "labels": row[1:], "loss_mask": mask, "position_ids": torch.arange(LENGTH)}


class Repeated(Dataset[Any]):
    """The pool again and again, as long as the run, as Megatron's datasets are; a pool of its own to GRACE."""

    def __init__(self, pool: Texts) -> None:
        self.pool = pool

    def __len__(self) -> int:
        return len(self.pool)

    def __getitem__(self, index: int | None) -> Any:
        return self.pool[index]


def model_of(layout: Layout) -> list[Any]:
    """This rank's chunks of a GPT, float32, with the same weights in every layout."""
    from megatron.core import parallel_state as mpu
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=layout.blocks,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vp,
        sequence_parallel=layout.sp,
        calculate_per_token_loss=layout.per_token,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        pipeline_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        deallocate_pipeline_outputs=not layout.vp,  # gloo sends asynchronously there, from memory that is freed
        **({"overlap_p2p_comm": True, "batch_p2p_comm": False} if layout.vp else {}),  # with 2 stages Megatron-LM asks for it
        **(RECOMPUTE if layout.recompute else {}),
    )
    chunks = []
    for stage in range(layout.vp or 1):
        where = {"ignore_virtual": False, "vp_stage": stage} if layout.vp else {}
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=get_gpt_layer_local_spec(),
            vocab_size=VOCAB,
            max_sequence_length=LENGTH,
            pre_process=mpu.is_pipeline_first_stage(**where),
            post_process=mpu.is_pipeline_last_stage(**where),
            parallel_output=True,
            share_embeddings_and_output_weights=False,
            **({"vp_stage": stage} if layout.vp else {}),
        )
        same_weights(chunk)
        chunks.append(chunk)
    return chunks


def same_weights(chunk: Any) -> None:
    """Draws every weight by its global name, whatever part of it this rank has."""
    from megatron.core import parallel_state as mpu

    size, rank = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()
    for path, module in chunk.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            if "norm" in path or name.endswith("bias"):
                continue
            split = size > 1 and getattr(weight, "tensor_model_parallel", False)
            shape = list(weight.shape)
            if split:
                shape[weight.partition_dim] *= size
            seed = zlib.crc32(f"{global_name(chunk, path)[0]}.{name}".encode())
            whole = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            weight.data.copy_(whole.chunk(size, weight.partition_dim)[rank] if split else whole)


def forward_step(layout: Layout, iterator: Iterator[Any], model: Any, rows: int = MICRO) -> Any:
    """As pretrain_gpt.py's: a batch to all tensor-parallel ranks, the loss as a sum and its number of tokens."""
    from megatron.core import parallel_state as mpu
    from megatron.core.utils import get_attr_wrapped_model

    batch = {name: torch.zeros(rows, LENGTH, dtype=torch.int64) for name in ("tokens", "labels", "loss_mask")}
    stage = get_attr_wrapped_model(model, "pre_process"), get_attr_wrapped_model(model, "post_process")
    if any(stage):
        if mpu.get_tensor_model_parallel_rank() == 0:
            item = next(iterator)
            batch = {name: item[name].long() for name in batch}
        for value in batch.values():
            dist.broadcast(value, mpu.get_tensor_model_parallel_src_rank(), group=mpu.get_tensor_model_parallel_group())
    mask = batch["loss_mask"].float()
    causal = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)[None, None]
    position = torch.arange(LENGTH).expand(rows, -1)
    output = model(batch["tokens"], position, causal, labels=batch["labels"], loss_mask=mask)

    def loss_of(losses: torch.Tensor) -> Any:
        total, tokens = (losses.float() * mask).sum(), mask.sum().int()
        said = {"loss": torch.stack([total.detach(), tokens.float()])}
        return (total / tokens, said) if layout.two else (total, tokens, said)

    return output, loss_of


class Single:
    """Megatron's ``single`` sampler."""

    def __init__(self, consumed: int) -> None:
        self.consumed = consumed

    def __iter__(self) -> Iterator[list[int]]:
        from megatron.core import parallel_state as mpu

        ranks, rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
        for start in range(self.consumed, STEPS * BATCH, MICRO * ranks):
            yield [start + rank * MICRO + i for i in range(MICRO)]


class Trainer:
    """The job: model, optimizer, data and its steps."""

    def __init__(
        self,
        layout: Layout,
        block: dict[str, Any],
        attach: bool = True,
        prepare: Callable[[Any], None] = lambda chunk: None,
        consumed: int = 0,
    ) -> None:
        from megatron.core import parallel_state as mpu
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        self.layout = layout
        raw = model_of(layout)
        for chunk in raw:
            prepare(chunk)
        if attach:
            for chunk in raw:
                grace_ds.megatron.attach(chunk)
        settings = DistributedDataParallelConfig(use_distributed_optimizer=layout.distributed)
        self.model = [DistributedDataParallel(raw[0].config, settings, chunk) for chunk in raw]
        kind: dict[str, Any] = {"optimizer": "adam", "lr": 0.003} if layout.adam else {"optimizer": "sgd", "lr": 0.2}
        how = OptimizerConfig(**kind, clip_grad=0.0, use_distributed_optimizer=layout.distributed)
        self.optimizer = get_megatron_optimizer(how, self.model)
        config = raw[0].config
        config.finalize_model_grads_func, config.grad_scale_func = finalize_model_grads, self.optimizer.scale_loss
        self.pool = Texts(POOL, 1, 0.5)
        sizes = {"consumed_samples": consumed, "micro_batch_size": MICRO, "global_batch_size": BATCH, "num_workers": 0}
        self.train: list[Any] = []  # of each chunk
        for chunk in raw:
            reads = mpu.get_tensor_model_parallel_rank() == 0 and (chunk.pre_process or chunk.post_process)
            train = Repeated(self.pool) if reads else None
            self.train.append(grace_ds.megatron.wrap(train, block, trusted_data=Texts(TRUSTED, 2, 0.0), **sizes))
        self.read(lambda train: DataLoader(train, batch_sampler=Single(consumed)))  # type: ignore[arg-type]
        for chunk in self.model:
            chunk.train()

    def read(self, batches: Callable[[Any], Any]) -> None:
        """Take the next micro-batches from ``batches`` of a chunk's dataset, where the chunk has one."""
        streams = [None if train is None else iter(batches(train)) for train in self.train]
        self.data: Any = streams if self.layout.vp else streams[0]

    def forward_backward(self) -> float | None:
        """The micro-batches of a step; its mean loss on the last stage."""
        from megatron.core import parallel_state as mpu
        from megatron.core.pipeline_parallel import get_forward_backward_func

        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        found = get_forward_backward_func()(
            forward_step_func=partial(forward_step, self.layout),
            data_iterator=self.data,
            model=self.model,
            num_microbatches=BATCH // (MICRO * mpu.get_data_parallel_world_size()),
            seq_length=LENGTH,
            micro_batch_size=MICRO,
            forward_only=False,
        )
        if not found:
            return None
        total = torch.stack([entry["loss"] for entry in found]).sum(0)
        return float(total[0] / total[1])


def block(run_dir: Path | None, **more: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "recipe": "grace",
        "budget": 0.5,
        "guard": {"enabled": False},
        "run_dir": None if run_dir is None else str(run_dir),
        "refresh": {"interval_steps": INTERVAL, "cadence": "fixed", "timeout_seconds": 60, "probe_share": 0.75},
    }
    return settings | more


def as_cuda() -> None:
    """Lets the distributed optimizer take float32 weights on a CPU, which it knows by the name of their type."""
    kind_of: Any = torch.Tensor.type

    def kind(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = kind_of(tensor, *args, **kwargs)
        return found.replace("torch.Float", "torch.cuda.Float") if isinstance(found, str) else found

    torch.Tensor.type = kind  # type: ignore[method-assign]


def lay_out(layout: Layout) -> None:
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel import random

    on_cpu()
    if layout.distributed:
        as_cuda()
    mpu.initialize_model_parallel(layout.tp, layout.pp, layout.vp)
    random.get_cuda_rng_tracker()
    torch.manual_seed(3)


def run(layout: Layout, run_dir: Path | None, look: bool, **more: Any) -> dict[str, Any]:
    """What a run came to on this rank; with ``look`` what further probes of its last model find."""
    from megatron.core import parallel_state as mpu

    lay_out(layout)
    traffic = Traffic()
    trainer = Trainer(layout, block(run_dir, **more))
    traffic.watch(trainer)
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

    def watch(self, trainer: Trainer) -> None:
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


# -- further probes ----------------------------------------------------------------------------------------------------


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
