"""A training script that knows only DeepSpeed, as users have them: ``plain_job.py --deepspeed_config FILE --out FOLDER``.

Each rank writes OUT/first-RANK.json, and OUT/second-RANK.json for the config ``--second FILE``: the ids of each step, the
losses, and whether it has found anything of GRACE on the engine.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.ops import __compatible_ops__

from tests.multirank.toy import Corpus, Model

__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first, for a minute


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--second")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--resume", type=Path, help="folder of a checkpoint, to be loaded where one was saved")
    args = deepspeed.add_config_arguments(parser).parse_args()
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank = torch.distributed.get_rank()
    for name, config in (("first", args.deepspeed_config), ("second", args.second)):
        if config is not None:
            args.deepspeed_config = config
            told = {**train(args), "local_rank": args.local_rank}
            (args.out / f"{name}-{rank}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


def train(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Model()
    engine, _, loader, _ = deepspeed.initialize(args, model=model, model_parameters=model.parameters(), training_data=Corpus())
    if args.resume is not None and (args.resume / "latest").exists():
        engine.load_checkpoint(str(args.resume))
    steps: list[list[int]] = []
    losses: list[float] = []
    while engine.global_steps < args.steps:
        for batch in loader:
            loss = engine(batch)
            engine.backward(loss)
            engine.step()
            steps.append(batch["sid"].flatten().tolist())
            losses.append(float(loss))
            print(f"step {engine.global_steps}", flush=True)
            time.sleep(args.pause)
            if engine.global_steps == args.steps:
                break
    return {"steps": steps, "losses": losses, "touched": hasattr(engine, "grace_ds")}


if __name__ == "__main__":
    main()
