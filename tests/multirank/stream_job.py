"""A job over an iterable dataset that saves as it goes and takes up what it finds: ``stream_job.py FOLDER STEPS EVERY``.

Each rank appends a line [step, ids] to FOLDER/ids-RANK.jsonl after each step; a killed job is started again by the same command.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.ops import __compatible_ops__

import grace_ds
from tests.multirank.launch import COLLECTING
from tests.multirank.toy import Corpus, Model, Stream

__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first, for a minute

PASS = 150


def main() -> None:
    folder, steps, every = Path(sys.argv[-3]), int(sys.argv[-2]), int(sys.argv[-1])
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    torch.manual_seed(0)
    model = Model()
    config = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "steps_per_print": 10**9,
        "grace_ds": {"enabled": True, **COLLECTING},
    }
    engine, _, loader, _ = grace_ds.initialize(
        model=model, model_parameters=model.parameters(), training_data=Stream(Corpus(PASS)), config=config
    )
    if (folder / "latest").exists():
        engine.load_checkpoint(str(folder))
    with (folder / f"ids-{torch.distributed.get_rank()}.jsonl").open("a") as file:
        while engine.global_steps < steps:
            for batch in loader:
                engine.backward(engine(batch))
                engine.step()
                file.write(json.dumps([engine.global_steps, batch["sid"].flatten().tolist()]) + "\n")
                file.flush()
                if engine.global_steps % every == 0:
                    engine.save_checkpoint(str(folder))
                if engine.global_steps == steps:
                    break
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
