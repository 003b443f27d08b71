"""A plain accelerate loop that knows nothing of GRACE: ``accelerate_job.py OUT NAME [--save-at N | --resume FOLDER]``.

Each rank writes ``OUT/NAME-RANK.json``: the samples of every optimizer step, the gathered evaluation losses, the samples that the
evaluation saw, and a digest of the parameters.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from deepspeed.ops import __compatible_ops__
from torch.utils.data import DataLoader

from tests.multirank.toy import Corpus, Model

__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first, for a minute


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("name")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--save-at", type=int)
    parser.add_argument("--resume", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    PartialState(cpu=True)  # without a GPU accelerate takes a DeepSpeed job for one process, unless it is told so
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = Model()
    loader = DataLoader(Corpus(), batch_size=4, shuffle=True, drop_last=True)
    held_out = DataLoader(Corpus(24, salt=3), batch_size=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader, held_out = accelerator.prepare(model, optimizer, loader, held_out)
    told: dict[str, Any] = {"steps": [], "losses": [], "evals": [], "evaluated": []}
    done = skipped = 0
    if args.resume is not None:
        accelerator.load_state(str(args.resume))
        done = json.loads((args.resume / "done.json").read_text())
        skipped = done * 2 % len(loader)
    step: list[int] = []
    while done < args.steps:
        epoch = accelerator.skip_first_batches(loader, skipped) if skipped else loader
        skipped = 0
        model.train()
        for batch in epoch:
            with accelerator.accumulate(model):
                loss = model(batch)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            step += batch["sid"].flatten().tolist()
            if not accelerator.sync_gradients:
                continue
            done += 1
            told["steps"].append(step)
            told["losses"].append(float(accelerator.gather(loss.detach().reshape(1)).mean()))
            step = []
            if done % 4 == 0:
                told["evals"].append(evaluate(accelerator, model, held_out, told["evaluated"]))
            if done == args.save_at:
                accelerator.save_state(str(args.out / "state"))
                if accelerator.is_main_process:
                    (args.out / "state" / "done.json").write_text(json.dumps(done))
            if done == args.steps:
                break
    handle = getattr(model, "grace_ds", None)
    if handle is not None:
        told["metrics"] = {k: v for k, v in handle.metrics.items() if isinstance(v, (int, float, str))}
    h = hashlib.blake2b(digest_size=16)
    for p in model.parameters():
        h.update(p.detach().float().cpu().numpy().tobytes())
    told |= {"params": h.hexdigest(), "processes": accelerator.num_processes}
    (args.out / f"{args.name}-{accelerator.process_index}.json").write_text(json.dumps(told))
    accelerator.end_training()


def evaluate(accelerator: Any, model: Any, loader: Any, seen: list[int]) -> float:
    model.eval()
    losses = []
    for batch in loader:
        with torch.no_grad():
            losses.append(accelerator.gather_for_metrics(model(batch).reshape(1)).mean())
        seen += accelerator.gather_for_metrics(batch["sid"]).flatten().tolist()
    model.train()
    return float(torch.stack(losses).mean())


if __name__ == "__main__":
    main()
