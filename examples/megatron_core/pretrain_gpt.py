"""Pretrains a GPT with megatron-core alone, on samples that GRACE chooses; started by ``launch/megatron.sh``.

It is what Megatron-LM's ``pretrain_gpt.py`` does, in one file: model, data, schedule, optimizer and checkpoints are
megatron-core's, and the lines marked ``GRACE`` are all that a job has to add.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import grace_ds.megatron  # GRACE

BYTES = {"vocab": 257, "eod": 256}  # of the toy corpus


class Tokens:
    """What Megatron's datasets ask of the tokeniser of a corpus that is tokenised already."""

    pad = -1

    def __init__(self, vocab: int, eod: int) -> None:
        self.vocab_size, self.eod = vocab, eod
        self.unique_identifiers = {"class": "tokens", "vocab": vocab, "eod": eod}


class Single:
    """Micro-batches of one data-parallel rank, position after position: the arithmetic of Megatron's ``single`` loader."""

    def __init__(self, consumed: int, total: int, micro: int) -> None:
        self.consumed, self.total, self.micro = consumed, total, micro
        self.ranks, self.rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()

    def __iter__(self) -> Iterator[list[int]]:
        step = self.micro * self.ranks
        for start in range(self.consumed, self.total - step + 1, step):
            mine = start + self.rank * self.micro
            yield list(range(mine, mine + self.micro))


def model_of(c: DictConfig) -> Any:
    """This rank's part of the model."""
    cpu, m, p = c.device == "cpu", c.model, c.parallel
    dtype = torch.bfloat16 if c.bf16 else torch.float32
    config = TransformerConfig(
        num_layers=m.layers,
        hidden_size=m.hidden,
        num_attention_heads=m.heads,
        tensor_model_parallel_size=p.tensor,
        pipeline_model_parallel_size=p.pipeline,
        sequence_parallel=p.sequence,
        use_cpu_initialization=cpu,
        bf16=c.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **({"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1} if m.recompute else {}),
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=-(-c.data.vocab // (8 * p.tensor)) * 8 * p.tensor,
        max_sequence_length=m.length,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=False,
    )
    grace_ds.megatron.attach(model)  # GRACE
    model = model if cpu else model.cuda()
    model = Float16Module(config, model) if c.bf16 else model
    return DistributedDataParallel(config, DistributedDataParallelConfig(), model)


def datasets_of(c: DictConfig, consumed: int) -> tuple[Any, Any]:
    """Training and validation data; None on ranks that read none."""
    if c.data.prefix is None:
        if {"vocab": c.data.vocab, "eod": c.data.eod} != BYTES:
            raise SystemExit(f"the toy corpus is bytes: leave data.vocab and data.eod at {BYTES}, or give data.prefix")
        sources(Path(c.out) / "corpus")
    t = c.train
    config = GPTDatasetConfig(
        random_seed=c.seed,
        sequence_length=c.model.length,
        blend=([str(c.data.prefix or Path(c.out) / "corpus")], None),
        split="95,5,0",
        path_to_cache=str(Path(c.out) / "indices"),
        tokenizer=Tokens(c.data.vocab, c.data.eod),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    config.token_dtype_code = None  # the index file says it itself
    reads = mpu.get_tensor_model_parallel_rank() == 0 and (mpu.is_pipeline_first_stage() or mpu.is_pipeline_last_stage())
    sizes = [t.steps * t.batch, t.eval_micro * t.micro * mpu.get_data_parallel_world_size(), None]
    train, valid, _ = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: reads, config).build()
    if c.grace.enabled:
        Path(c.out).mkdir(parents=True, exist_ok=True)
    block = OmegaConf.to_container(c.grace, resolve=True)
    job = {"micro_batch_size": t.micro, "global_batch_size": t.batch, "num_workers": t.workers}  # Megatron-LM knows these
    return grace_ds.megatron.wrap(train, block, consumed_samples=consumed, **job), valid  # GRACE


def sources(prefix: Path, megabytes: float = 1.0) -> None:
    """A toy corpus: the Python standard library's own sources as bytes.  Collective."""
    if dist.get_rank() == 0 and not prefix.with_suffix(".idx").exists():
        prefix.parent.mkdir(parents=True, exist_ok=True)
        builder, left = IndexedDatasetBuilder(f"{prefix}.bin"), int(megabytes * 2**20)
        for file in sorted(Path(os.__file__).parent.glob("*.py")):
            text = [*file.read_bytes()[:left], BYTES["eod"]]
            builder.add_document(torch.tensor(text), [len(text)])
            left -= len(text)
            if left <= 0:
                break
        builder.finalize(f"{prefix}.idx")
    dist.barrier()


def batch_of(iterator: Any, c: DictConfig) -> dict[str, torch.Tensor]:
    """The next micro-batch, from tensor-parallel rank 0 to its peers; middle stages have no use for one."""
    device = "cpu" if c.device == "cpu" else "cuda"
    shape = (c.train.micro, c.model.length)
    batch = {"tokens": torch.empty(shape, dtype=torch.int64), "labels": torch.empty(shape, dtype=torch.int64)}
    batch["loss_mask"] = torch.empty(shape)
    if not (mpu.is_pipeline_first_stage() or mpu.is_pipeline_last_stage()):
        return batch
    if mpu.get_tensor_model_parallel_rank() == 0:
        item = next(iterator)
        batch = {key: item[key] for key in batch}
    batch = {key: value.to(device) for key, value in batch.items()}
    for value in batch.values():
        dist.broadcast(value, mpu.get_tensor_model_parallel_src_rank(), group=mpu.get_tensor_model_parallel_group())
    return batch


def step_of(c: DictConfig) -> Any:
    """The forward step that Megatron's schedules call."""
    causal = torch.triu(torch.ones(c.model.length, c.model.length, dtype=torch.bool), 1)[None, None]
    position = torch.arange(c.model.length).expand(c.train.micro, -1)

    def forward_step(iterator: Any, model: Any) -> Any:
        batch = batch_of(iterator, c)
        device = batch["tokens"].device
        mask = batch["loss_mask"]
        losses = model(batch["tokens"], position.to(device), causal.to(device), labels=batch["labels"], loss_mask=mask)

        def loss_of(losses: torch.Tensor) -> Any:
            loss = (losses.float() * mask).sum() / mask.sum()
            return loss, {"loss": loss.detach().clone()}  # the schedule divides the loss in place

        return losses, loss_of

    return forward_step


def run(c: DictConfig, model: Any, data: Any, micro: int, evaluate: bool) -> float | None:
    """One step's forwards (and backwards); the mean loss on the last stage, None elsewhere."""
    found = get_forward_backward_func()(
        forward_step_func=step_of(c),
        data_iterator=data,
        model=[model],
        num_microbatches=micro,
        seq_length=c.model.length,
        micro_batch_size=c.train.micro,
        forward_only=evaluate,
    )
    return float(torch.stack([entry["loss"] for entry in found]).mean()) if found else None


def main(c: DictConfig) -> None:
    """The whole job."""
    start(c)
    saved = Path(c.out) / f"checkpoint-{dist.get_rank()}.pt"
    state = torch.load(saved, weights_only=True) if saved.exists() else {"consumed": 0}
    consumed, t = state["consumed"], c.train
    model = model_of(c)
    precision = {"bf16": True, "params_dtype": torch.bfloat16} if c.bf16 else {}
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=t.lr, clip_grad=0.0, **precision), [model])
    model.config.finalize_model_grads_func, model.config.grad_scale_func = finalize_model_grads, optimizer.scale_loss
    if consumed:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    train, valid = datasets_of(c, consumed)
    loader = lambda data, at: data and iter(DataLoader(data, batch_sampler=Single(at, len(data), t.micro), num_workers=t.workers))  # noqa: E731
    data, micro = loader(train, consumed), t.batch // (t.micro * mpu.get_data_parallel_world_size())
    speaks = mpu.is_pipeline_last_stage() and mpu.get_tensor_model_parallel_rank() == mpu.get_data_parallel_rank() == 0
    model.train()
    for step in range(consumed // t.batch + 1, min(t.steps, consumed // t.batch + t.stop_after) + 1):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        loss = run(c, model, data, micro, evaluate=False)
        optimizer.step()
        consumed += t.batch
        if speaks and step % t.log_every == 0:
            print(f"step {step}: loss {loss:.4f}, {consumed} samples", flush=True)
        if step % t.save_every == 0:
            torch.save({"consumed": consumed, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    model.eval()
    loss = run(c, model, loader(valid, 0), t.eval_micro, evaluate=True)
    if speaks:
        print(f"validation loss {loss:.4f} nats/token after {consumed} samples", flush=True)
    grace_ds.megatron.detach()
    dist.barrier()
    dist.destroy_process_group()


def start(c: DictConfig) -> None:
    """Joins the world that torchrun has started."""
    if c.device == "cpu":
        from tests.multirank.megatron_shims import on_cpu

        on_cpu()
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if c.device == "cpu" else "nccl")
    mpu.initialize_model_parallel(c.parallel.tensor, c.parallel.pipeline)
    torch.manual_seed(c.seed)
    if c.device != "cpu":
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(c.seed)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("usage: pretrain_gpt.py CONFIG.yaml [key=value ...]")
    main(OmegaConf.merge(OmegaConf.load(sys.argv[1]), OmegaConf.from_dotlist(sys.argv[2:])))  # type: ignore[arg-type]
