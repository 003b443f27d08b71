"""A Megatron job at toy size for several layouts of its ranks: a real GPTModel, the same weights in each."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

import grace_ds.megatron
from grace_ds.gradients.megatron_layers import global_name
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


def settings(layout: Any, **more: Any) -> Any:
    """Megatron's configuration of a toy model on a CPU: no dropout, nothing fused.

    Args:
        layout: its ``tp``, ``pp``, ``sp``, ``blocks`` and ``recompute`` count.
        more: of Megatron's own arguments.
    """
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=layout.blocks,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        sequence_parallel=layout.sp,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        pipeline_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **({"deallocate_pipeline_outputs": True} | (RECOMPUTE if layout.recompute else {}) | more),
    )


def gpt(config: Any, length: int, stage: int | None = None) -> Any:
    """This rank's part of a GPT with Megatron's local layers, float32; ``stage`` names one of several chunks."""
    from megatron.core import parallel_state as mpu
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    where = {} if stage is None else {"ignore_virtual": False, "vp_stage": stage}
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=VOCAB,
        max_sequence_length=length,
        pre_process=mpu.is_pipeline_first_stage(**where),
        post_process=mpu.is_pipeline_last_stage(**where),
        parallel_output=True,
        share_embeddings_and_output_weights=False,
        **({} if stage is None else {"vp_stage": stage}),
    )


def model_of(layout: Layout) -> list[Any]:
    """This rank's chunks of a GPT, with the same weights in every layout."""
    more: dict[str, Any] = {"calculate_per_token_loss": layout.per_token}
    if layout.vp:
        more |= {
            "virtual_pipeline_model_parallel_size": layout.vp,
            "deallocate_pipeline_outputs": False,  # gloo sends asynchronously there, from memory that is freed
            "overlap_p2p_comm": True,  # with 2 stages Megatron-LM asks for it
            "batch_p2p_comm": False,
        }
    config = settings(layout, **more)
    chunks = [gpt(config, LENGTH, stage) for stage in (range(layout.vp) if layout.vp else [None])]
    for chunk in chunks:
        same_weights(chunk)
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
        shared = DistributedDataParallelConfig(use_distributed_optimizer=layout.distributed)
        self.model = [DistributedDataParallel(raw[0].config, shared, chunk) for chunk in raw]
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
    made: dict[str, Any] = {
        "recipe": "grace",
        "budget": 0.5,
        "guard": {"enabled": False},
        "run_dir": None if run_dir is None else str(run_dir),
        "refresh": {"interval_steps": INTERVAL, "cadence": "fixed", "timeout_seconds": 60, "probe_share": 0.75},
    }
    return made | more


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
