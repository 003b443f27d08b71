"""The worked example of a Trainer, with a tiny model in the place of SmolLM2: it runs to its end, and goes on where it stood."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.extras import needs
from tests.multirank.harness import run_command
from tests.multirank.launch import environment, free_port

needs("huggingface", "transformers", "accelerate", "datasets", "peft")


def tiny_model(folder: Path) -> None:
    """A random Llama and a tokeniser of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<pad>", "<eos>", "Question", "Answer", ":", "#", "."] + [str(i) for i in range(60)]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), num_key_value_heads=2, **sizes)).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_the_example_runs_to_its_end_and_a_second_call_goes_on(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    rows = [{"question": f"{i % 60} 1 {i % 7}", "answer": f"{(i + 1) % 60} . # {i % 13}"} for i in range(200)]
    data.write_text("\n".join(map(json.dumps, rows)))
    deepspeed = Path(sys.executable).with_name("deepspeed")

    def train(*more: str) -> str:
        launch = [deepspeed, "--num_accelerators", "2", "--master_port", str(free_port()), "examples/huggingface/sft.py"]
        where = ["--model", tmp_path / "model", "--data", data, "--out", tmp_path / "out"]
        return run_command([*launch, *where, *more], timeout=200, env=environment(tmp_path))

    said = train("--steps", "6")
    assert re.search(r"loss on 16 held-out rows after 6 steps: [\d.]+", said), said
    assert re.search(r"schedules: [2-9], .* the last coreset holds \d+ of 120 rows", said), said
    assert "after 8 steps" in train("--steps", "8", "--resume")
