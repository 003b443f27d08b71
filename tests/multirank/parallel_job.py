"""DeepSpeed jobs in which ranks share a model: ``parallel_job.py KIND OUT``, KIND one | ulysses | pipeline.

Each trains on the schedule, goes back to a checkpoint in the middle and on again; and takes sketches of one step, which are
compared with gradients of one sample at a time of the same model in one piece.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.ops import __compatible_ops__
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.utils import set_random_seed
from deepspeed.sequence.layer import DistributedAttention
from torch import nn
from torch.utils.data import SequentialSampler

import grace_ds
from grace_ds.comm.base import Comm
from grace_ds.comm.local import LocalComm
from grace_ds.comm.torch_dist import TorchComm
from grace_ds.config.schema import CollectConfig
from grace_ds.errors import ConfigError
from grace_ds.gradients.hooks import Sketcher
from grace_ds.gradients.layers import Layer, select_layers
from grace_ds.gradients.megatron_layers import select_parallel
from grace_ds.gradients.pipeline_batches import MicroBatches
from grace_ds.gradients.projection import bases, fold_table
from grace_ds.gradients.sharded_collector import ShardedGradientCollector
from tests.multirank.toy import VOCAB, Corpus
from tests.oracles import batch_of_one_gradients, sketch_of

# It would be compiled first, for a minute, under a lock that a killed rank leaves behind.
__compatible_ops__["deepspeed_shm_comm"] = False

ROWS, GAS, STEPS, SAVED, WIDTH, HEADS, LENGTH = 4, 2, 12, 6, 32, 4, 16
SEED, DIM, RANK = 3, 256, 8
Batch = tuple[torch.Tensor, torch.Tensor]


def collate(items: list[dict[str, torch.Tensor]]) -> Batch:
    """(tokens (n, 16), targets (n, 17)): the last target column is the sample's own number, which no loss looks at."""
    tokens = torch.stack([item["input_ids"] for item in items])
    return tokens[:, :-1].contiguous(), torch.cat([tokens[:, 1:], torch.stack([item["sid"] for item in items])], 1)


def ds_config() -> dict[str, Any]:
    grace = {
        "recipe": "content",  # of gradients see grace_parallel_job
        "budget": 0.3,
        "guard": {"enabled": False},
        "refresh": {"interval_steps": 4, "cadence": "fixed", "timeout_seconds": 30},
    }
    return {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": GAS,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "steps_per_print": 10**9,
        "data_efficiency": {"enabled": True, "data_sampling": {"enabled": True, "grace": grace}},
    }


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)

    def forward(self, ids: torch.Tensor, start: int = 0) -> torch.Tensor:
        at = torch.arange(start, start + ids.shape[1], device=ids.device)
        out: torch.Tensor = self.tokens(ids) + self.positions(at)
        return out


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    """Over (n, T, heads, width), causal."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous()


class Local(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
        return attention(q, k, v)


class Block(nn.Module):
    """Attention and MLP; sequence-parallel once ``attend`` exchanges heads for tokens between peers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.attend: nn.Module = Local()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q, k, v = (y.reshape(n, t, -1, WIDTH // HEADS).contiguous() for y in self.qkv(x).chunk(3, -1))
        mixed = self.attend(q, k, v, 0) if isinstance(self.attend, DistributedAttention) else self.attend(q, k, v)
        x = x + self.out(mixed.reshape(n, t, -1))
        y: torch.Tensor = x + self.down(F.gelu(self.up(x)))
        return y


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets[:, :LENGTH].flatten())


class Whole(nn.Module):
    """The layers one after another, named as PipelineModule names them; ``share`` (rank, size): of the tokens."""

    def __init__(self, layers: list[nn.Module], share: tuple[int, int] = (0, 1)) -> None:
        super().__init__()
        self.share = share
        for i, layer in enumerate(layers):
            self.add_module(str(i), layer)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        rank, size = self.share
        width = tokens.shape[1] // size
        mine = slice(rank * width, (rank + 1) * width)
        x: Any = tokens[:, mine]
        for i, layer in enumerate(self.children()):
            x = layer(x, rank * width) if i == 0 else layer(x)
        total = tokens.numel()  # over all shares: their gradients add up to those of the mean
        return F.cross_entropy(x.flatten(0, 1), targets[:, mine].flatten(), reduction="sum") / total


def specs() -> list[LayerSpec]:
    return [LayerSpec(Embed), *[LayerSpec(Block)] * 4, LayerSpec(nn.Linear, WIDTH, VOCAB, bias=False)]


def layers_of() -> list[nn.Module]:
    """The same weights as those of a PipelineModule with ``seed_layers``."""
    made = []
    for i, spec in enumerate(specs()):
        set_random_seed(1234 + i)
        made.append(spec.build())
    return made


def start(kind: str) -> Any:
    """An engine with GRACE, and its loader, without data workers: what is looked ahead must not depend on the kind."""
    options: dict[str, Any] = {"training_data": Corpus(), "config": ds_config(), "collate_fn": collate}
    if kind == "pipeline":
        model: nn.Module = PipelineModule(specs(), num_stages=2, loss_fn=loss_of, seed_layers=True, partition_method="uniform")
    elif kind == "ulysses":
        # The peers' group exists once the engine has made its mesh; it is put into the attention then.
        options["mesh_param"] = (1, 2)
        model = Whole(layers_of(), (dist.get_rank(), 2))
    else:
        model = Whole(layers_of())
    if kind == "in_order":
        engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=ds_config())
        handle = grace_ds.attach(engine, Corpus(), collate_fn=collate, sampler=SequentialSampler(Corpus()))
        return engine, handle.deepspeed_loader(0)
    engine, *_ = grace_ds.initialize(model=model, model_parameters=list(model.parameters()), **options)
    if kind == "ulysses":
        for block in [m for m in model.modules() if isinstance(m, Block)]:
            block.attend = DistributedAttention(Local(), engine.seq_parallel_group, scatter_idx=2, gather_idx=1)
    if kind == "pipeline":
        return engine, engine.grace_ds.feed(0)
    return engine, engine.grace_ds.deepspeed_loader(0)


def step_of(kind: str, engine: Any, loader: Any) -> list[int]:
    """One optimizer step; the samples that it trained on, as this rank sees them."""
    seen: list[int] = []
    if kind == "pipeline":
        original = engine.module.loss_fn

        def looked(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            seen.extend(targets[:, -1].tolist())
            return original(logits, targets)

        engine.module.loss_fn = looked
        engine.train_batch()
        engine.module.loss_fn = original
        return seen
    for _ in range(GAS):
        tokens, targets = next(loader)
        loss = engine(tokens, targets)
        engine.backward(loss)
        engine.step()
        seen += targets[:, -1].tolist()
    return seen


def train(kind: str, engine: Any, loader: Any, steps: int, save: Path | None = None) -> list[list[int]]:
    found = []
    iterator = loader if kind == "pipeline" else iter(loader)
    while engine.global_steps < steps:
        found.append(step_of(kind, engine, iterator))
        if save is not None and engine.global_steps == SAVED:
            engine.save_checkpoint(str(save))
    return found


def sketches(kind: str, peers: Comm) -> dict[str, Any]:
    """Rows of one step of another engine, without GRACE, against the truth; and those of this rank alone."""
    batches = [collate([Corpus()[ROWS * k + i] for i in range(ROWS)]) for k in range(GAS)]
    config = {key: value for key, value in ds_config().items() if key != "data_efficiency"}
    if kind == "pipeline":
        model: nn.Module = PipelineModule(specs(), num_stages=2, loss_fn=loss_of, seed_layers=True, partition_method="uniform")
        engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    else:
        model = Whole(layers_of(), (dist.get_rank(), 2))
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=list(model.parameters()), config=config, mesh_param=(1, 2)
        )
        for block in [m for m in model.modules() if isinstance(m, Block)]:
            block.attend = DistributedAttention(Local(), engine.seq_parallel_group, scatter_idx=2, gather_idx=1)
    layers = (
        select_parallel([engine.module], ["*"], [], 0, share, time_major=False)
        if kind == "pipeline"
        else select_layers(engine.module, ["*"])
    )
    found = {}
    with Sketcher(layers, SEED, DIM, RANK, pipelined=kind == "pipeline") as sketcher:
        run_on_all_ranks = ShardedGradientCollector(sketcher, CollectConfig(dim=DIM, rank=RANK), peers, dist.get_rank() == 0)
        alone = ShardedGradientCollector(sketcher, CollectConfig(dim=DIM, rank=RANK), LocalComm(), True)
        for step, collector in ((1, run_on_all_ranks), (2, run_on_all_ranks), (3, alone)):
            captures = one_step(kind, engine, sketcher, batches)
            collector.commit(captures, step, float(GAS), LocalComm() if collector.leader else None)
        wanted = truth(layers, batches, sketcher)
        found["alone"] = error_of([h for _, h in alone.collect()], wanted[0])
        rows = [h for _, h in run_on_all_ranks.collect()]
        if rows:
            found["error"] = error_of(rows, wanted[0])
            found["loss_error"] = float(np.abs(np.concatenate([h.loss for h in rows]) - wanted[1]).max())
        found["here"], found["all"] = sum(layer.here for layer in layers), len(layers)
        found["failures"] = sketcher.failures
    return found


def one_step(kind: str, engine: Any, sketcher: Sketcher, batches: list[Batch]) -> list[Any]:
    """Forwards and backwards of a step whose update is thrown away; its bindings."""
    ids = [np.arange(ROWS) + 10 * k for k in range(GAS)]
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    for group in engine.optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    if kind == "pipeline":
        micro = MicroBatches([engine.module], sketcher, GAS, ids.__getitem__)
        micro.follow_loss(engine.module, "loss_fn")
        engine.train_batch(iter(batches))
        captures = micro.take()
        micro.detach()
    else:
        captures = []
        for k, (tokens, targets) in enumerate(batches):
            captures.append(sketcher.begin(ids[k]))
            loss = engine(tokens, targets)
            sketcher.end()
            sketcher.observe_loss(loss)
            engine.backward(loss)
            engine.step()
    for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return captures


def truth(layers: list[Layer], batches: list[Batch], sketcher: Sketcher) -> tuple[np.ndarray, np.ndarray]:
    """(n, dim) rows and (n,) losses of every sample alone, of the model in one piece."""
    model = Whole(layers_of())
    modules = dict(model.named_modules())
    weights = {layer.name: modules[layer.name].weight for layer in layers}
    sides = {layer.name: bases(layer.name, SEED, RANK, layer.inputs, layer.outputs) for layer in layers}
    tables = {layer.name: fold_table(layer.name, SEED, RANK, DIM) for layer in layers}
    sigma, rows, losses = sketcher.scale.by_name(), [], []
    for tokens, targets in batches:
        joined = torch.cat([tokens, targets], 1)

        def alone(m: nn.Module, row: torch.Tensor) -> torch.Tensor:
            loss: torch.Tensor = m(row[:, :LENGTH], row[:, LENGTH:])
            losses.append(float(loss.detach()))
            return loss

        gradients = batch_of_one_gradients(model, weights, joined, alone)
        rows += [sketch_of(g, sides, tables, DIM, sigma) for g in gradients]
    return np.array(rows), np.array(losses)


def error_of(found: list[Any], wanted: np.ndarray) -> float:
    rows = np.concatenate([h.sketch for h in found])
    return float((np.linalg.norm(rows - wanted, axis=1) / np.linalg.norm(wanted, axis=1)).max())


def share(value: Any) -> list[Any]:
    got: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(got, value)
    return got


def main() -> None:
    kind, out = sys.argv[-2], Path(sys.argv[-1])
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank, record = dist.get_rank(), dict[str, Any]()
    engine, loader = start(kind)
    record["steps"] = train(kind, engine, loader, STEPS, out / "saved")
    c = engine.grace_ds.controller
    record["schedules"] = [[s.version, s.start, s.digest()] for s in c.book.schedules]
    record["cursor"], record["failures"] = c.cursor, c.metrics.refresh_failures
    engine.load_checkpoint(str(out / "saved"))
    record["again"] = train(kind, engine, loader, STEPS)
    record["again_schedules"] = [[s.version, s.start, s.digest()] for s in c.book.schedules]
    if kind == "pipeline":
        data = [collate([Corpus()[i] for i in range(ROWS)])] * GAS
        try:
            engine.train_batch(iter(data))
        except ConfigError as error:
            record["own data"] = str(error)
    engine.grace_ds.detach()
    handle = grace_ds.attach(engine, Corpus(), {"recipe": "auto"}, collate_fn=collate)
    record["recipe auto"] = handle.config.recipe
    handle.detach()
    if kind not in ("one", "in_order"):
        peers = TorchComm([list(range(dist.get_world_size()))], 30)
        record["sketches"] = sketches(kind, peers)
        peers.close()
    (out / f"{kind}-{rank}.json").write_text(json.dumps(record))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
