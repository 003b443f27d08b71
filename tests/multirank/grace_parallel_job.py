"""DeepSpeed jobs under ``recipe: grace`` whose model lies over ranks: ``grace_parallel_job.py KIND OUT``.

KIND is one (the same job on one rank), ulysses, tensor (AutoTP) or pipeline; on twice the ranks there are two replicas.
Each measures the trusted basis and influences on the same weights as all others, trains over several refreshes, counts the bytes
that it sends, and trains a model with dropout without GRACE and in shadow mode.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.utils import set_random_seed
from deepspeed.sequence.layer import DistributedAttention
from deepspeed.utils import RepeatingLoader
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

import grace_ds
from grace_ds.comm.base import Comm
from grace_ds.comm.local import LocalComm
from grace_ds.data.schedule import load_book
from grace_ds.gradients.sharded_collector import ShardedGradientCollector
from grace_ds.gradients.sharding import Split
from grace_ds.integrations.engine import dp_rank
from tests.multirank.parallel_job import WIDTH, Block, Embed, Local, Whole, collate, loss_of
from tests.multirank.toy import LENGTH, VOCAB, Corpus

GAS, BATCH, STEPS, INTERVAL, PLAIN = 2, 8, 20, 5, 8
NAMES = ["2.*", "3.*"]  # of a pipeline of two stages, one layer on each
PROBED = np.arange(16)  # pool samples whose influences are compared


class Trusted(Corpus):
    """Runs like those that half of the corpus is made of, without noise."""

    def __init__(self, n: int = 64) -> None:
        super().__init__(n, salt=1, clean=True)
        self.tokens = (np.arange(LENGTH) * 3 + np.arange(n)[:, None] % 7) % VOCAB


class Dropping(Block):
    """A block with dropout."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = nn.functional.dropout(super().forward(x), 0.2, self.training)
        return y


def grace_config(mode: str, run_dir: Path | None = None) -> dict[str, Any]:
    return {
        "run_dir": None if run_dir is None else str(run_dir),
        "recipe": "grace",
        "mode": mode,
        "budget": 0.3,
        "start_step": 0,
        "guard": {"enabled": False},
        "collect": {"layers": NAMES, "share": 1.0, "dim": 128},
        "refresh": {"interval_steps": INTERVAL, "cadence": "fixed", "timeout_seconds": 60, "probe_share": 1.0},
    }


def ds_config(kind: str, replicas: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH // GAS // replicas,
        "gradient_accumulation_steps": GAS,
        # With a smaller eps, steps would be made of the rounding of gradients that are 0, such as those of the keys' biases.
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-4, "eps": 1e-7, "torch_adam": True}},
        "gradient_clipping": 0.0,  # the default, 1.0, does not clip a pipeline's gradients
        "steps_per_print": 10**9,
    }
    if kind == "tensor":
        specs = [
            {"patterns": [r".*\.qkv\.weight$"], "partition_type": "column", "shape": [3, -1], "partition_dim": 0},
            {"patterns": [r".*\.up\.weight$"], "partition_type": "column"},
            {"patterns": [r".*\.(out|down)\.weight$"], "partition_type": "row"},
        ]
        partition = {"use_default_specs": False, "layer_specs": specs}
        config["tensor_parallel"] = {"autotp_size": 2, "partition_config": partition}
    return config


class Ranks:
    """What DeepSpeed asks about the groups of Ulysses on two ranks: neighbours share a sequence.

    With mesh_param in its place DeepSpeed 0.19.8 does not add up gradients over the ranks of a sequence.
    """

    def __init__(self) -> None:
        size = dist.get_world_size()
        self.sequence = self._mine([[first, first + 1] for first in range(0, size, 2)])
        self.replicas = self._mine([list(range(first, size, 2)) for first in (0, 1)])
        self.single = self._mine([[rank] for rank in range(size)])

    @staticmethod
    def _mine(groups: list[list[int]]) -> Any:
        made = [(dist.new_group(ranks), ranks) for ranks in groups]  # every rank makes all of them
        return next(group for group, ranks in made if dist.get_rank() in ranks)

    def get_data_parallel_group(self) -> Any:
        return self.replicas

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.replicas)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.replicas)

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(dist.get_process_group_ranks(self.replicas))

    def get_model_parallel_group(self) -> Any:
        return self.single

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_sequence_parallel_group(self) -> Any:
        return self.sequence

    def get_sequence_parallel_rank(self) -> int:
        return dist.get_rank(self.sequence)

    def get_sequence_parallel_world_size(self) -> int:
        return dist.get_world_size(self.sequence)

    def get_sequence_data_parallel_group(self) -> Any:
        return dist.group.WORLD

    def get_sequence_data_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_sequence_data_parallel_world_size(self) -> int:
        return dist.get_world_size()


def engine_of(kind: str, replicas: int, block: type[Block] = Block) -> Any:
    """The engine without GRACE."""
    specs = [LayerSpec(Embed), *[LayerSpec(block)] * 4, LayerSpec(nn.Linear, WIDTH, VOCAB, bias=False)]
    options: dict[str, Any] = {"config": ds_config(kind, replicas)}
    if kind == "pipeline":
        model: nn.Module = PipelineModule(specs, num_stages=2, loss_fn=loss_of, seed_layers=True, partition_method="uniform")
    else:
        layers = []
        for i, spec in enumerate(specs):
            set_random_seed(1234 + i)
            layers.append(spec.build())
        ulysses = kind == "ulysses"
        model = Whole(layers, (dist.get_rank() % 2, 2) if ulysses else (0, 1))
        if ulysses:
            options["mpu"] = Ranks()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), **options)
    if kind == "ulysses":
        for m in [m for m in model.modules() if isinstance(m, Block)]:
            m.attend = DistributedAttention(Local(), engine.seq_parallel_group, scatter_idx=2, gather_idx=1)
    set_random_seed(7)
    return engine


def attached(engine: Any, kind: str, mode: str = "train", run_dir: Path | None = None) -> Any:
    """The loader (or nothing, for a pipeline, which is fed) of an engine with GRACE."""
    options: dict[str, Any] = {"collate_fn": collate, "trusted_data": Trusted()}
    if kind != "pipeline":
        options |= {"loss_fn": lambda module, batch: module(*batch), "sampler": sampler_of(engine)}
    handle = grace_ds.attach(engine, Corpus(), grace_config(mode, run_dir), **options)
    if kind == "pipeline":
        handle.feed(0)
        return None
    return endless(handle.loader())


def endless(loader: Any) -> Any:
    while True:
        yield from loader


def plain(engine: Any, kind: str) -> Any:
    """The same without GRACE, in the order of the corpus."""
    sampler = sampler_of(engine)
    if kind == "pipeline":
        inner = engine.deepspeed_io(Corpus(), data_sampler=sampler, collate_fn=collate, num_local_io_workers=0)
        engine.set_dataloader(RepeatingLoader(inner))
        return None
    rows = engine.train_micro_batch_size_per_gpu()
    return endless(DataLoader(Corpus(), batch_size=rows, sampler=sampler, collate_fn=collate))


def sampler_of(engine: Any) -> DistributedSampler[Any]:
    return DistributedSampler(Corpus(), num_replicas=engine.dp_world_size, rank=dp_rank(engine), shuffle=False)


def train(kind: str, engine: Any, loader: Any, steps: int) -> list[float]:
    losses = []
    while engine.global_steps < steps:
        if kind == "pipeline":
            losses.append(float(engine.train_batch() if loader is None else engine.train_batch(loader)))
            continue
        for _ in range(GAS):
            loss = engine(*next(loader))
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
    return losses


# -- the trusted basis, and influences along it ----------------------------------------------------------------------------


def measured(controller: Any) -> dict[str, np.ndarray]:
    """The basis' dense matrices and the influences of some pool samples, on the model as it is; nothing is changed.

    "rows alone": the influences without the sum over the ranks that hold the model.
    """
    probe, collector = controller.influence_probe, controller.collector
    scale = copy.deepcopy(collector.sketcher.scale)
    fitted = probe.fit(50, np.arange(len(Corpus())))
    before, found = collector.sketcher.basis, {f"basis {n}": u * s @ v.T for n, (u, s, v) in fitted.basis.factors.items()}
    collector.sketcher.set_basis(fitted.basis)
    try:
        batches = probe.passes.read(Corpus(), PROBED, "pool")
        rows = probe.passes.rows(batches)
        if isinstance(collector, ShardedGradientCollector):
            peers, collector.peers = collector.peers, LocalComm(5.0)
            found["rows alone"] = np.concatenate([r.influence * r.norm for r in probe.passes.rows(batches)])
            collector.peers = peers
    finally:
        collector.sketcher.set_basis(before)
        collector.sketcher.scale = scale
    found["influence"] = np.concatenate([r.influence * r.norm for r in rows])
    found["loss"] = np.concatenate([r.loss for r in rows])
    found["losses"] = probe.passes.losses(batches)
    found["unit"] = np.array([fitted.unit])
    return found


class Unsummed:
    """A transport that does not add up the sums behind a basis."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm

    def __getattr__(self, name: str) -> Any:
        return getattr(self.comm, name)

    def allreduce(self, array: np.ndarray, op: str = "sum") -> np.ndarray:
        return array


def alone(controller: Any) -> dict[str, np.ndarray]:
    """The same without the sum over the ranks of the moments and the gradient."""
    probe = controller.influence_probe
    comm, probe.comm = probe.comm, Unsummed(probe.comm)
    try:
        return measured(controller)
    finally:
        probe.comm = comm


def without_whole(controller: Any) -> dict[str, np.ndarray]:
    """The same without the sum of the tokens' projections over the ranks that hold the blocks of a side."""
    original = Split.whole
    Split.whole = lambda self, side, projected: projected  # type: ignore[method-assign]
    try:
        return measured(controller)
    finally:
        Split.whole = original  # type: ignore[method-assign]


# -- what the job holds, and what it sends ---------------------------------------------------------------------------------


def state_of(engine: Any) -> str:
    """A digest of parameters, gradients, optimizer and random states."""
    digest = hashlib.sha256()
    for p in engine.module.parameters():
        digest.update(p.detach().numpy().tobytes())
        digest.update(b"none" if p.grad is None else p.grad.numpy().tobytes())
        digest.update(str(p.requires_grad).encode())
    for state in engine.optimizer.state.values():
        for value in state.values():
            digest.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else str(value).encode())
    digest.update(torch.get_rng_state().numpy().tobytes())
    digest.update(str(random.getstate()).encode() + str(np.random.get_state()).encode())
    counters = (engine.global_steps, engine.micro_steps, engine.global_samples, engine.module.training)
    digest.update(str((counters, getattr(engine.module, "micro_offset", 0))).encode())
    return digest.hexdigest()


class Sent:
    """Counts the bytes that this rank gives to torch's collectives, by what they are sent for."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.what = "job"
        for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "all_to_all_single", "send", "broadcast", "reduce"):
            original = getattr(dist, name)
            setattr(dist, name, self._counted(original))

    def _counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            if tensors:
                self.bytes[self.what] += tensors[-1].numel() * tensors[-1].element_size()
            return original(*args, **kwargs)

        return call

    def during(self, owner: Any, name: str, what: str) -> None:
        """Count what ``owner.name(...)`` sends as ``what``, and its seconds."""
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            before, self.what, started = self.what, what, time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[what] += time.perf_counter() - started
                self.what = before

        setattr(owner, name, call)


def main() -> None:
    kind, out = sys.argv[-2], Path(sys.argv[-1])
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank, world, record = dist.get_rank(), dist.get_world_size(), dict[str, Any]()
    replicas = world // (1 if kind == "one" else 2)
    sent = Sent()
    engine = engine_of(kind, replicas)
    loader = attached(engine, kind, run_dir=out / "run")
    c = engine.grace_ds.controller
    before = state_of(engine)
    arrays = {"right": measured(c)}
    record["untouched"] = state_of(engine) == before
    if kind != "one":
        arrays["alone"] = alone(c)
    if kind == "tensor":
        arrays["parts"] = without_whole(c)
    for name, found in arrays.items():
        np.savez(out / f"{name}-{rank}.npz", **found)
    sent.bytes.clear()
    sent.during(c.influence_probe, "fit", "probes")
    sent.during(c.influence_probe, "losses", "probes")
    sent.during(c.collector, "pending", "rows")
    sent.during(c.collector, "commit", "rows")
    sent.during(c, "refresh", "refresh")
    started = time.perf_counter()
    record["losses"] = train(kind, engine, loader, STEPS)
    record["seconds"] = {"all": time.perf_counter() - started, **sent.seconds, "hooks": c.collector.sketcher.seconds}
    record["bytes"] = dict(sent.bytes)
    record["summed"] = getattr(c.collector, "summed_bytes", 0)
    c.recorder.settle()
    dist.barrier()
    schedules = load_book(out / "run" / "schedules").schedules  # written by rank 0
    record["schedules"] = [[s.version, s.start, s.ids.tolist(), s.roles.tolist()] for s in schedules]
    record["weights"] = [s.weights.tolist() for s in schedules]
    record["last"] = [[s.version, s.start, s.digest()] for s in c.book.schedules]
    kept = ("drawn_by", "parts", "known_influence", "known_loss")
    record["meta"] = [{key: s.meta.get(key) for key in kept} for s in schedules]
    record["reference"] = {str(version): unit for version, unit in c.reference.items()}
    record["sigma"] = c.collector.sketcher.scale.by_name()
    record["table"] = int(sum(len(x) for x in [c.table.rows]))
    record["rows_kept"], record["metrics"] = (
        c.collector.rows_kept,
        {k: v for k, v in engine.grace_ds.metrics.items() if k != "events"},
    )
    engine.grace_ds.detach()
    traces = []
    for mode in ("none", "shadow"):
        engine = engine_of(kind, replicas, Dropping)
        batches = plain(engine, kind) if mode == "none" else attached(engine, kind, "shadow")
        traces.append([train(kind, engine, batches, PLAIN), state_of(engine)])
        if mode == "shadow":
            record["shadow basis"] = engine.grace_ds.controller.basis.version
            engine.grace_ds.detach()
    record["plain"], record["shadow"] = traces
    (out / f"{rank}.json").write_text(json.dumps(record, default=str))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
