"""Small ``transformers.Trainer`` jobs for the tests, started by the deepspeed launcher: ``trainer_job.py SPECS.json``.

SPECS maps names to jobs, which run one after another.  The model writes down which samples its training forwards see, from a
column of the dataset, so what was trained on is known without asking grace_ds.  Each rank writes ``OUT/NAME-RANK.json``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import datasets
import deepspeed
import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from deepspeed.ops import __compatible_ops__
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import grace_ds.huggingface
from grace_ds.errors import GraceError
from grace_ds.gradients.probe import probe_rows

# It would be compiled first, for a minute, under a lock that a killed rank leaves behind.
__compatible_ops__["deepspeed_shm_comm"] = False

VOCAB, SAMPLES = 61, 60
SEEN: list[list[int]] = []


class Watched(LlamaForCausalLM):
    """Writes down the samples of every training forward."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, sid=None, **kwargs):  # type: ignore[no-untyped-def]
        if self.training and torch.is_grad_enabled() and sid is not None:
            SEEN.append(sid.flatten().tolist())
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)


class WatchedGPT2(GPT2LMHeadModel):
    def forward(self, input_ids=None, attention_mask=None, labels=None, sid=None, **kwargs):  # type: ignore[no-untyped-def]
        if self.training and torch.is_grad_enabled() and sid is not None:
            SEEN.append(sid.flatten().tolist())
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)


def corpus(n: int = SAMPLES, salt: int = 0) -> datasets.Dataset:
    """Runs of tokens of 9 to 16, every fourth a near copy; with a column of text that no model takes."""
    rng = np.random.default_rng(salt)
    rows = []
    for i in range(n):
        tokens = rng.integers(0, VOCAB, 9 + i % 8)
        if i % 2 == 0:
            tokens = (np.arange(len(tokens)) * 3 + tokens % 5) % VOCAB
        if i % 4 == 3:
            tokens = np.array(rows[-1]["input_ids"])
            tokens[4] = 1
        rows.append({"input_ids": tokens.tolist(), "text": f"sample {i}", "sid": i})
    return datasets.Dataset.from_list(rows)


def packed(rows: datasets.Dataset, length: int = 24) -> datasets.Dataset:
    """Rows of ``length`` tokens, each of several documents whose positions begin anew, as packing makes them."""
    tokens = [t for row in rows["input_ids"] for t in row]
    places = [i for row in rows["input_ids"] for i in range(len(row))]
    cut = [slice(at, at + length) for at in range(0, len(tokens) // length * length, length)]
    return datasets.Dataset.from_list(
        [{"input_ids": tokens[c], "labels": tokens[c], "position_ids": places[c], "sid": i} for i, c in enumerate(cut)]
    )


class Plain(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The same rows by a dataset of the user's own."""

    def __init__(self, rows: datasets.Dataset) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]


def padded(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(x["input_ids"]) for x in items)
    out: dict[str, Any] = {"input_ids": [], "attention_mask": [], "labels": [], "sid": [x["sid"] for x in items]}
    for x in items:
        pad = longest - len(x["input_ids"])
        out["input_ids"].append(x["input_ids"] + [0] * pad)
        out["attention_mask"].append([1] * len(x["input_ids"]) + [0] * pad)
        out["labels"].append(x["input_ids"] + [-100] * pad)
    return {key: torch.tensor(value) for key, value in out.items()}


class Steps(TrainerCallback):
    """Cuts what the model has seen at the optimizer steps."""

    def __init__(self) -> None:
        self.steps: list[list[list[int]]] = []
        SEEN.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(list(SEEN))
        SEEN.clear()


def ds_config(spec: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": spec.get("stage", 2)},
        "bf16": {"enabled": "auto"},
    }
    if spec.get("grace") is not None:
        config["data_efficiency"] = {"enabled": True, "data_sampling": {"enabled": True, "grace": spec["grace"]}}
    return config


def model_of(spec: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    if spec.get("model") == "gpt2":
        small = GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=2, n_head=2, attn_pdrop=0.1, resid_pdrop=0.1)
        return WatchedGPT2(small)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Watched(LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=32))
    if spec.get("lora"):
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"))
    return model


def trainer_of(spec: dict[str, Any], out: str) -> tuple[Any, Steps]:
    deepspeed_config = None if spec.get("no_deepspeed") else ds_config(spec)
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # set by the job before
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 12,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": spec.get("bf16", False),
        **spec.get("args", {}),
    }
    args = TrainingArguments(output_dir=f"{out}/{spec.get('folder', spec['name'])}", deepspeed=deepspeed_config, **arguments)
    data: Any = corpus()
    collator: Any = padded
    if spec.get("data") == "packed":
        data, collator = packed(corpus(2 * SAMPLES)), default_data_collator
    elif spec.get("data") == "plain":
        data = Plain(data)
    elif spec.get("data") == "iterable":
        data = data.to_iterable_dataset()
    steps = Steps()
    evaluation = corpus(12, salt=spec.get("eval_salt", 7))
    if spec.get("data") == "packed":
        evaluation = packed(evaluation)
    made = Trainer(
        model=model_of(spec), args=args, train_dataset=data, eval_dataset=evaluation, data_collator=collator, callbacks=[steps]
    )
    return made, steps


def digest(trainer: Any) -> str:
    """Of the trained parameters; under ZeRO-3 gathered."""
    h = hashlib.blake2b(digest_size=16)
    for p in trainer.model.parameters():
        with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
            h.update(p.detach().float().cpu().numpy().tobytes())
    return h.hexdigest()


def run(spec: dict[str, Any], out: str) -> dict[str, Any]:
    trainer, steps = trainer_of(spec, out)
    if spec.get("attach", True):
        extra = {"trusted_data": corpus(16, salt=spec.get("trusted_salt", 3))} if spec.get("trusted") else {}
        assert grace_ds.huggingface.attach(trainer, **extra) is trainer
    if spec.get("peek"):  # at the shapes, before there is an engine
        next(iter(trainer.get_train_dataloader()))
    resume = f"{out}/{spec['resume']}" if "resume" in spec else None
    trainer.train(resume_from_checkpoint=resume)
    if spec.get("again"):
        trainer.train()
    logs = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    evals = [x["eval_loss"] for x in trainer.state.log_history if "eval_loss" in x]
    record = {"steps": steps.steps, "losses": logs, "evals": evals, "epoch": trainer.state.epoch}
    record["params"] = digest(trainer)
    handle = getattr(trainer.model_wrapped, "grace_ds", None)
    record["touched"] = hasattr(trainer, "grace_ds")
    if handle is not None:
        c = handle.controller
        record["metrics"] = {k: v for k, v in handle.metrics.items() if isinstance(v, (int, float, bool))}
        record["schedules"] = [[s.version, s.start, s.digest()] for s in c.book.schedules]
        record["table"] = {str(i): int(v) for i, v in zip(c.table.ids, c.table.last, strict=True)}
        if c.collector is not None:
            record["layers"] = c.collector.sketcher.names
            record["failures"] = c.collector.sketcher.failures
        if spec.get("compare_norms"):
            record["norms"] = norms(trainer, handle)
        handle.detach()
    return record


def norms(trainer: Any, handle: Any) -> list[list[float]]:
    """Of the samples in the table: the collected length, and that of the gradient of the sample's mean loss, taken alone."""
    c, data = handle.controller, corpus()
    out = []
    for i, norm in zip(c.table.ids.tolist(), c.table.rows.norm.tolist(), strict=True):
        batch = {k: v for k, v in padded([data[i]]).items() if k != "sid"}
        alone = [(np.array([i]), batch)]
        (found,) = probe_rows(handle.engine.module, alone, lambda m, b: m(**b).loss, c.collector.sketcher)
        out.append([norm, float(found.norm[0])])
    return out


def main() -> None:
    specs = json.loads(Path(sys.argv[-1]).read_text())
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank = torch.distributed.get_rank()
    for name, spec in specs["jobs"].items():
        print(f"[{rank}] job {name}", flush=True)
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        try:
            record = run({"name": name, **spec}, specs["out"])
        except GraceError as error:
            record = {"error": f"{type(error).__name__}: {error}"}
        Path(specs["out"], f"{name}-{rank}.json").write_text(json.dumps(record))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
