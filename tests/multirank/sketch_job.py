"""One ZeRO stage, started by the deepspeed launcher: ``sketch_job.py STAGE OUT``; each rank writes ``OUT/rank-N.json``.

For each accumulation it trains without hooks, then from the same start with hooks (and probes in the middle) under every
kind of checkpointing, none of which changes a plain job's numbers either.  The first step's rows are compared with
batch-of-one gradients of a float32 copy of the model.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.ops import __compatible_ops__

from grace_ds.gradients.hooks import Sketcher
from grace_ds.gradients.kfac import whiten
from grace_ds.gradients.layers import select_layers
from grace_ds.gradients.probe import probe_basis, probe_rows
from grace_ds.gradients.projection import bases, fold_table
from tests.models import TinyGPT, text
from tests.oracles import batch_of_one_gradients, sketch_of

# It would be compiled first, for a minute, under a lock that a killed rank leaves behind.
__compatible_ops__["deepspeed_shm_comm"] = False

STEPS, ROWS, SEED, DIM, RANK = 5, 6, 3, 256, 8


def build(recompute: str) -> TinyGPT:
    torch.manual_seed(0)
    return TinyGPT(width=16, depth=2, recompute=recompute)


def micro_batch(step: int, micro: int) -> torch.Tensor:
    return text(ROWS, seed=1000 * step + 10 * micro + torch.distributed.get_rank())


def loss_of(module: Any, batch: torch.Tensor) -> torch.Tensor:
    return module(batch)


def oracle(micro_batches: int) -> np.ndarray:
    """(micro-batches, rows, dim) of the first step, in float32 from the weights that bfloat16 leaves."""
    model = build("none").bfloat16().float()
    layers = select_layers(model)
    weights = {layer.name: layer.module.weight for layer in layers}
    sides = {layer.name: bases(layer.name, SEED, RANK, layer.inputs, layer.outputs) for layer in layers}
    tables = {layer.name: fold_table(layer.name, SEED, RANK, DIM) for layer in layers}
    found = []
    for micro in range(micro_batches):
        gradients = batch_of_one_gradients(model, weights, micro_batch(0, micro), loss_of)
        found.append([sketch_of(g, sides, tables, DIM) for g in gradients])
    return np.array(found)


def digest(engine: Any) -> str:
    """Of the parameters and of torch's random state."""
    h = hashlib.blake2b(torch.get_rng_state().numpy().tobytes())
    for p in engine.module.parameters():
        with deepspeed.zero.GatheredParameters([p], enabled=engine.zero_optimization_stage() == 3):
            h.update(p.detach().float().numpy().tobytes())
    return h.hexdigest()


def start(stage: int, recompute: str, gas: int) -> Any:
    model = build(recompute)
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": gas,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def train(engine: Any, gas: int, sketcher: Sketcher | None) -> list[Any]:
    """Returns the rows of the first step, a record a micro-batch, and those of the last step."""
    kept = []
    for step in range(STEPS):
        captures = []
        for micro in range(gas):
            batch = micro_batch(step, micro)
            if sketcher is not None:
                captures.append(sketcher.begin(np.arange(len(batch))))
            loss = engine(batch)
            if sketcher is not None:
                sketcher.end()
                sketcher.observe_loss(loss)
            engine.backward(loss)
            engine.step()
        if sketcher is not None:
            scale = gas / float(engine._get_optimizer_loss_scale() or 1.0)
            rows = [sketcher.finish(capture, grad_scale=scale) for capture in captures]
            kept += rows if step in (0, STEPS - 1) else []
            if step == 2:
                probe(engine, sketcher)
    return kept


def probe(engine: Any, sketcher: Sketcher) -> None:
    trusted = [(np.arange(4), text(4, seed=99))]
    moments = sketcher.moments()
    probe_basis(engine.module, [(np.arange(6), text(6, seed=98))], loss_of, sketcher, moments)
    second = moments.fit(moments.pack())
    moments.close()
    target = sketcher.accumulator()
    probe_basis(engine.module, trusted, loss_of, sketcher, target)
    sketcher.set_basis(whiten(target.fit(target.pack(), version=1), second, dict.fromkeys(sketcher.names, 1.0)))
    target.close()
    found = probe_rows(engine.module, trusted, loss_of, sketcher)
    assert found[0].influence.mean() > 0, found[0].influence  # the trusted samples point their own way


def without_hooks(stage: int, gas: int) -> str:
    engine = start(stage, "none", gas)
    train(engine, gas, None)
    result = digest(engine)
    engine.destroy()
    return result


def with_hooks(stage: int, recompute: str, gas: int, truth: np.ndarray, without: str) -> dict[str, Any]:
    hooked = start(stage, recompute, gas)
    before = sum(len(m._forward_hooks) for m in hooked.module.modules())
    with Sketcher(select_layers(hooked.module), SEED, DIM, RANK) as sketcher:
        rows = train(hooked, gas, sketcher)
        failures = sketcher.failures
    after = sum(len(m._forward_hooks) for m in hooked.module.modules())
    sketches = np.stack([r.sketch for r in rows[:gas]]).astype(np.float64)
    lengths = np.linalg.norm(sketches, axis=2), np.linalg.norm(truth[:gas], axis=2)
    cosine = (sketches * truth[:gas]).sum(2) / (lengths[0] * lengths[1])
    result = {
        "recompute": recompute,
        "gas": gas,
        "identical": digest(hooked) == without,
        "cosine": float(cosine.min()),
        "length": [float((lengths[0] / lengths[1]).min()), float((lengths[0] / lengths[1]).max())],
        "influence": bool(np.isfinite([r.influence for r in rows[gas:]]).all()),
        "hooks_left": after - before,
        "failures": failures,
    }
    hooked.destroy()
    return result


def main() -> None:
    # The launcher adds --local_rank before our own arguments.
    stage, out = int(sys.argv[-2]), Path(sys.argv[-1])
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    truth = oracle(4)
    results = []
    for gas in (1, 4):
        without = without_hooks(stage, gas)
        for recompute in ("none", "nonreentrant", "reentrant"):
            results.append(with_hooks(stage, recompute, gas, truth, without))
    (out / f"rank-{torch.distributed.get_rank()}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()  # gloo's threads, left alone, may abort the process at its exit


if __name__ == "__main__":
    main()
