"""One run of the fine-tuning benchmark: ``python -m benchmarks.finetune.job SPEC.json OUT.json``.

One process, one rank, a Trainer with DeepSpeed at ZeRO 1, bfloat16 with float32 master weights of the adapters.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.finetune.arms import SYSTEM, ds_config
from benchmarks.finetune.model import Padded, answer_loss, exact_matches, prepare_model, with_adapters
from benchmarks.finetune.problems import Problem, Problems, read, sample, split
from grace_ds.utils.files import write_atomic


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    import deepspeed

    # It would be compiled first, for a minute, under a lock that a killed run leaves behind.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    write_atomic(Path(sys.argv[2]), json.dumps({"settings": spec, **run(spec)}, indent=1).encode())


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Trains one arm and judges it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepare_model(Path(spec["model_folder"])))
    problems = problems_of(spec, tokenizer)
    samples = {name: samples_of(getattr(problems, name), tokenizer) for name in ("pool", "trusted", "test")}
    collate = Padded(tokenizer.pad_token_id)
    model = with_adapters(Path(spec["model_folder"]), spec["seed"])
    told = train(spec, model, samples, collate) if spec["arm"] != "none" else {}
    began = time.process_time()
    loss = answer_loss(model.bfloat16(), samples["test"], collate, 2 * spec["batch"])
    asked = problems.test[: spec["generate"]]
    right = exact_matches(model, asked, tokenizer, 20, spec["new_tokens"])
    print(f"{spec['arm']}: {loss:.4f} nats, {right} of {len(asked)} right", flush=True)
    return {"nll": loss, "right": right, "asked": len(asked), "judging_cpu_s": time.process_time() - began, **told}


def problems_of(spec: dict[str, Any], tokenizer: Any) -> Problems:
    """The run's problems: the same for every run of a pool."""

    def fits(problem: Problem) -> bool:
        return len(sample(problem, _tokenize(tokenizer), 0)["input_ids"]) <= int(spec["max_tokens"])

    sizes = (spec["pool_size"], spec["trusted"], spec["test_size"])
    return split(read(Path(spec["data"])), read(Path(spec["test"])), fits, sizes, spec["pool"] == "polluted")


def samples_of(problems: list[Problem], tokenizer: Any) -> list[dict[str, list[int]]]:
    """The token ids of problems."""
    return [sample(problem, _tokenize(tokenizer), tokenizer.eos_token_id) for problem in problems]


def _tokenize(tokenizer: Any) -> Any:
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def train(spec: dict[str, Any], model: Any, samples: dict[str, list[dict[str, list[int]]]], collate: Padded) -> dict[str, Any]:
    """Runs the arm's optimizer steps; what they cost."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    import grace_ds.huggingface

    rows = samples["pool"]
    if spec["arm"] == "uniform":
        chosen = np.random.default_rng([7, spec["seed"]]).permutation(len(rows))[: round(spec["budget"] * len(rows))]
        rows = [rows[i] for i in chosen]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            deepspeed=ds_config(spec),
            per_device_train_batch_size=spec["batch"],
            max_steps=spec["steps"],
            learning_rate=spec["lr"],
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5,
            bf16=True,
            use_cpu=True,
            save_strategy="no",
            logging_steps=10,
            report_to=[],
            seed=spec["seed"],
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=args, train_dataset=Dataset.from_list(rows), data_collator=collate)
        if spec["arm"] in SYSTEM:
            trusted = Dataset.from_list(samples["trusted"]) if spec["arm"] != "rs2" else None
            grace_ds.huggingface.attach(trainer, trusted_data=trusted)
        cpu, wall = time.process_time(), time.monotonic()
        trainer.train()
        told = {"train_cpu_s": time.process_time() - cpu, "train_wall_s": time.monotonic() - wall}
    handle = getattr(trainer.model_wrapped, "grace_ds", None)
    return {**told, **_of_the_handle(handle)}


def _of_the_handle(handle: Any) -> dict[str, Any]:
    if handle is None:
        return {}
    m = handle.metrics
    keys = ("refresh_seconds", "collect_seconds", "refreshes", "refresh_failures", "probe_samples")
    return {key: m[key] for key in keys}


if __name__ == "__main__":
    main()
