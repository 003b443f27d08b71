"""A Lightning Fabric loop over DeepSpeed that knows nothing of GRACE: ``fabric_job.py OUT NAME [--save-at N | --resume FOLDER]``.

Each rank writes ``OUT/NAME-RANK.json``: the samples of every optimizer step, the
losses, the samples of the validations, and a digest of the parameters.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import lightning_fabric.strategies.deepspeed as fabric_deepspeed
import torch
from deepspeed.ops import __compatible_ops__
from lightning_fabric import Fabric
from lightning_fabric.strategies import DeepSpeedStrategy
from torch.utils.data import DataLoader

from tests.multirank.toy import Corpus, Model

__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first, for a minute


class OnCPU(DeepSpeedStrategy):
    """Fabric refuses DeepSpeed without CUDA; this leaves the refusal out, and numbers the device."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("name")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--save-at", type=int)
    parser.add_argument("--resume", type=Path)
    args = parser.parse_args()
    fabric_deepspeed._validate_device_index_selection = lambda devices: None
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
    fabric = Fabric(accelerator="cpu", devices=2, strategy=OnCPU(config=config))
    fabric.launch()
    module, data = Model(), Corpus()
    model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=1e-3))
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=4, shuffle=True, drop_last=True))
    held_out = fabric.setup_dataloaders(DataLoader(Corpus(24, salt=3), batch_size=4))
    told: dict[str, Any] = {"steps": [], "losses": [], "validated": []}
    done = 0
    if args.resume is not None:
        state = {"model": model, "optimizer": optimizer, "done": 0}
        fabric.load(args.resume, state)
        done = state["done"]
    while done < args.steps:
        model.train()
        for batch in loader:
            loss = model(batch)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            told["steps"].append(batch["sid"].flatten().tolist())
            told["losses"].append(float(loss))
            if done % 4 == 0:
                validate(model, held_out, told["validated"])
            if done == args.save_at:
                fabric.save(args.out / "state", {"model": model, "optimizer": optimizer, "done": done})
            if done == args.steps:
                break
    handle = getattr(model._forward_module, "grace_ds", None)
    if handle is not None:
        told["metrics"] = {k: v for k, v in handle.metrics.items() if isinstance(v, (int, float, str))}
        told["table"] = sorted(handle.controller.table.ids.tolist())
    h = hashlib.blake2b(digest_size=16)
    for p in module.parameters():
        h.update(p.detach().float().cpu().numpy().tobytes())
    told["params"] = h.hexdigest()
    (args.out / f"{args.name}-{fabric.global_rank}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


def validate(model: Any, loader: Any, seen: list[int]) -> None:
    model.eval()
    with torch.no_grad():
        for batch in loader:
            model(batch)
            seen += batch["sid"].flatten().tolist()
    model.train()


if __name__ == "__main__":
    main()
