"""What the ranks of the Megatron sketch tests do: a real GPTModel, real schedules, and gradients of one sample at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from grace_ds.comm.base import Comm
from grace_ds.comm.local import LocalComm
from grace_ds.comm.torch_dist import TorchComm
from grace_ds.config.schema import CollectConfig
from grace_ds.errors import ConfigError
from grace_ds.gradients.basis import TrustedBasis
from grace_ds.gradients.hooks import Sketcher
from grace_ds.gradients.layers import Layer
from grace_ds.gradients.megatron_layers import select_parallel
from grace_ds.gradients.pipeline_batches import MicroBatches
from grace_ds.gradients.projection import bases, fold_table
from grace_ds.gradients.sharded_collector import ShardedGradientCollector
from tests.multirank.harness import World
from tests.multirank.megatron_shims import on_cpu
from tests.multirank.toy_megatron import HIDDEN, VOCAB, gpt, settings
from tests.oracles import sketch_of

SEED, DIM, RANK, LENGTH = 5, 256, 8, 8
PATTERNS = ["decoder.*", "output_layer"]
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One layout of the model over two ranks, and the micro-batches of a step."""

    tp: int = 1
    pp: int = 1
    sp: bool = False
    recompute: bool = False
    micro: int = 2
    rows: int = 3
    blocks: int = 2


def build(case: Case) -> Any:
    """This rank's part of a GPT, the same weights for every layout."""
    torch.manual_seed(1)
    return gpt(settings(case), LENGTH)


def batches(case: Case) -> list[Batch]:
    """The micro-batches of a step; their samples have unequally many tokens that count."""
    made = []
    for k in range(case.micro):
        draw = torch.Generator().manual_seed(k)
        tokens = torch.randint(0, VOCAB, (case.rows, LENGTH + 1), generator=draw)
        mask = torch.ones(case.rows, LENGTH)
        for i in range(case.rows):
            mask[i, LENGTH - i - k % 2 :] = 0
        made.append({"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "mask": mask})
    return made


def forward_backward(model: Any, data: list[Batch]) -> None:
    """A step's forwards and backwards by Megatron's own schedule."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def step(iterator: Iterator[Batch], module: Any) -> Any:
        batch = next(iterator)
        position = torch.arange(LENGTH).expand(batch["tokens"].shape)
        causal = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)[None, None]
        output = module(batch["tokens"], position, causal, labels=batch["labels"], loss_mask=batch["mask"])
        return output, lambda losses: ((losses * batch["mask"]).sum() / batch["mask"].sum(), {})

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(data),
        model=[model],
        num_microbatches=len(data),
        seq_length=LENGTH,
        micro_batch_size=len(data[0]["tokens"]),
        forward_only=False,
    )


def whole_gradients(layers: list[Layer]) -> dict[str, np.ndarray]:
    """Name → (inputs, outputs) float64 gradient of every layer, put together from the ranks' parts."""
    mine = {
        layer.name: (layer.split.side, layer.module.weight.grad.double().numpy().T)  # type: ignore[union-attr]
        for layer in layers
        if layer.module is not None
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found = {}
    for layer in layers:
        parts = [part[layer.name] for part in everyone if layer.name in part]
        found[layer.name] = np.concatenate([p[1] for p in parts], 0 if parts[0][0] == "in" else 1)
        assert found[layer.name].shape == (layer.inputs, layer.outputs)
    return found


def one_sample_gradients(model: Any, layers: list[Layer], case: Case) -> list[dict[str, np.ndarray]]:
    """Of every sample of the step alone, in order."""
    found = []
    for batch in batches(case):
        for i in range(case.rows):
            model.zero_grad()
            forward_backward(model, [{k: v[i : i + 1] for k, v in batch.items()}])
            found.append(whole_gradients(layers))
    model.zero_grad()
    return found


def basis_of(layers: list[Layer]) -> TrustedBasis:
    """Any basis: what counts is that inner products with it are those of the whole gradients."""
    draw = np.random.default_rng(3)
    factors = {}
    for layer in layers:
        u, v = (np.linalg.qr(draw.normal(size=(width, 4)))[0].astype(np.float32) for width in (layer.inputs, layer.outputs))
        factors[layer.name] = (u, np.abs(draw.normal(size=4)).astype(np.float32), v)
    return TrustedBasis(7, factors)


def share(value: Any) -> list[Any]:
    got: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(got, value)
    return got


def collect(model: Any, sketcher: Sketcher, case: Case, peers: Comm, leader: bool, rerun: bool = False) -> tuple[Any, int]:
    """(ids, rows, losses, inner products) of one step, summed over ``peers``, after one that freezes the scale."""
    config = CollectConfig(dim=DIM, rank=RANK)
    collector = ShardedGradientCollector(sketcher, config, peers, leader)
    ids = [np.arange(case.rows) + 100 * k for k in range(case.micro)]
    rank = dist.get_rank()
    micro = MicroBatches([model], sketcher, case.micro, ids.__getitem__, counts_losses=case.tp == 1 or rank == 0)
    for step in (2,) if sketcher.scale.frozen else (1, 2):
        for _ in range(2 if rerun else 1):
            forward_backward(model, batches(case))
            model.zero_grad()
        collector.commit(micro.take(), step, float(case.micro), LocalComm() if leader else None)
    micro.detach()
    found = [h for _, h in collector.collect()]
    if not found:
        return None, collector.summed_bytes
    columns = [np.concatenate([getattr(h, f) for h in found]) for f in ("ids", "sketch", "loss", "influence", "norm")]
    return columns, collector.summed_bytes


def work(world: World, cases: list[Case]) -> list[dict[str, Any]]:
    """What each case came to, on this rank."""
    from megatron.core import parallel_state

    on_cpu()
    results = []
    for case in cases:
        parallel_state.initialize_model_parallel(case.tp, case.pp)
        results.append(measure(case, world))
        parallel_state.destroy_model_parallel()
    return results


def measure(case: Case, world: World) -> dict[str, Any]:
    model = build(case)
    model.train()
    layers = select_parallel([model], PATTERNS, [], world.rank if case.tp > 1 else 0, share)
    truth = one_sample_gradients(model, layers, case)
    seen: list[int] = []
    first = next(layer for layer in layers if layer.module is not None)
    watch = first.module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))  # type: ignore[union-attr]
    sketcher = Sketcher(layers, SEED, DIM, RANK, pipelined=True)
    basis = basis_of(layers)
    sketcher.set_basis(basis)
    peers = TorchComm([list(range(world.size))], 30)
    leader = world.rank == 0
    with sketcher:
        found, nbytes = collect(model, sketcher, case, peers, leader)
        again, _ = collect(model, sketcher, case, peers, leader, rerun=True)
        alone, _ = collect(model, sketcher, case, LocalComm(), True)
        failures = sketcher.failures
    watch.remove()
    result: dict[str, Any] = {
        "names": [layer.name for layer in layers],
        "here": [layer.name for layer in layers if layer.here],
        "tokens_seen": sorted(set(seen)),
        "failures": failures,
        "bytes": nbytes,
        "sigma": sketcher.scale.by_name(),
    }
    if alone is not None:
        result["alone"] = error_of(alone[1], expected(layers, truth, sketcher))
    if leader:
        result |= compare(found, layers, truth, sketcher, basis)
        result["rerun"] = float(np.abs(again[1] - found[1]).max())
        result["rerun_ids"] = np.array_equal(again[0], found[0])
    peers.close()
    return result


def expected(layers: list[Layer], truth: list[dict[str, np.ndarray]], sketcher: Sketcher) -> np.ndarray:
    """(n, dim) from the whole gradients."""
    sides = {layer.name: bases(layer.name, SEED, RANK, layer.inputs, layer.outputs) for layer in layers}
    tables = {layer.name: fold_table(layer.name, SEED, RANK, DIM) for layer in layers}
    sigma = sketcher.scale.by_name()
    return np.array([sketch_of(g, sides, tables, DIM, sigma) for g in truth])


def error_of(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest error of a row, in lengths of the right one."""
    return float((np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)).max())


def compare(
    found: list[np.ndarray], layers: list[Layer], truth: list[dict[str, np.ndarray]], sketcher: Sketcher, basis: TrustedBasis
) -> dict[str, Any]:
    wanted = expected(layers, truth, sketcher)
    sides = {layer.name: bases(layer.name, SEED, RANK, layer.inputs, layer.outputs) for layer in layers}
    sigma = sketcher.scale.by_name()
    rms = {}
    for layer in layers:
        p_in, p_out, unit = sides[layer.name]
        rms[layer.name] = np.sqrt(np.mean([((unit * p_in @ g[layer.name] @ p_out.T) ** 2).sum() for g in truth]))
    products = []
    for g in truth:
        total = 0.0
        for layer in layers:
            u, s, v = (a.astype(np.float64) for a in basis.factors[layer.name])
            total += float((np.diag(u.T @ g[layer.name] @ v) * s).sum()) / sigma[layer.name] ** 2
        products.append(total)
    length = np.sqrt(sum((basis.factors[n][1].astype(np.float64) ** 2).sum() / sigma[n] ** 2 for n in basis.factors))
    cosines = np.array(products) / (np.linalg.norm(wanted, axis=1) * length)
    return {
        "ids": found[0].tolist(),
        "error": error_of(found[1], wanted),
        "sigma_error": max(abs(sigma[n] / rms[n] - 1) for n in rms),
        "align_error": float(np.abs(found[3] - cosines).max() / np.abs(cosines).max()),
        "loss": found[2].tolist(),
    }


def refusals(world: World) -> dict[str, str]:
    """On one rank: what is left out, and what is refused, with the words for it."""
    from megatron.core import parallel_state

    on_cpu()
    parallel_state.initialize_model_parallel(1, 1)
    said: dict[str, str] = {}
    model = build(Case())
    model.train()
    layers = select_parallel([model], ["auto"], [], 0, share)
    said["auto"] = " ".join(layer.name for layer in layers)
    with Sketcher(layers, SEED, DIM, RANK, pipelined=True) as sketcher:
        micro = MicroBatches([model], sketcher, 1, lambda k: np.arange(3))
        batch = batches(Case())[0]
        try:
            model(batch["tokens"], None, None, packed_seq_params=object())
        except ConfigError as error:
            said["packed"] = str(error)
        micro.detach()
    block = model.decoder.layers[1]
    block.adapter = torch.nn.Linear(HIDDEN, HIDDEN)
    copies = [select_parallel([model], ["*adapter"], [], rank, share)[0] for rank in (0, 1)]
    said["copies"] = " ".join(str(layer.here) for layer in copies)
    block.adapter.weight.sequence_parallel = True  # as Megatron marks what sees a share of the tokens
    said["token shares"] = str(select_parallel([model], ["*adapter"], [], 1, share)[0].here)
    lines: list[str] = []
    log, handler = logging.getLogger("grace_ds"), logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    moe = with_experts()
    said["experts"] = " ".join(layer.name for layer in select_parallel([moe], ["*"], [], 0, share))
    log.removeHandler(handler)
    inside = sum(p.numel() for layer in moe.decoder.layers for p in layer.mlp.experts.parameters())
    said["share"] = f"{100 * inside / sum(p.numel() for p in moe.parameters()):.0f}"
    said["lines"] = " ".join(lines)
    # Transformer Engine cannot be installed without a GPU: a class that says it is of that package stands in.
    block.fused = type("TELayerNormColumnParallelLinear", (torch.nn.Linear,), {"__module__": "transformer_engine.pytorch"})(4, 4)
    try:
        select_parallel([model], ["auto"], [], 0, share)
    except ConfigError as error:
        said["engine"] = str(error)
    return said


def with_experts() -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    config = settings(Case(blocks=1), num_moe_experts=2, add_bias_linear=False)
    return GPTModel(config, get_gpt_layer_local_spec(num_experts=2), VOCAB, LENGTH)
