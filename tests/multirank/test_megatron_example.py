"""The worked example from its own command, under three layouts of the ranks: one order of samples."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

pytest.importorskip("megatron.core", reason="megatron-core is not installed (pip install grace_ds[megatron])")

from grace_ds.data.schedule import load_book
from tests.multirank.harness import ROOT, run_command

CONFIG = ROOT / "configs" / "megatron_cpu.yaml"
SHORT = ["train.steps=12", "train.log_every=1", "grace.refresh.interval_steps=5"]


def train(out: Path, processes: int, *settings: str) -> dict[str, float]:
    """Step (or "end", for the validation) → loss."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    said = run_command([*launch, "examples/megatron_core/pretrain_gpt.py", CONFIG, f"out={out}", *SHORT, *settings], timeout=180)
    losses = {step: float(loss) for step, loss in re.findall(r"step (\d+): loss ([\d.]+)", said)}
    return losses | {"end": float(re.findall(r"validation loss ([\d.]+)", said)[0])}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_megatron_example_trains_alike_however_the_model_is_split(tmp_path):
    one = train(tmp_path / "one", 1, "parallel.tensor=1")
    tensor = train(tmp_path / "tensor", 2, "parallel.tensor=2")
    pipeline = train(tmp_path / "pipeline", 2, "parallel.tensor=1", "parallel.pipeline=2")
    books = [
        [s.digest() for s in load_book(tmp_path / name / "grace" / "schedules").schedules]
        for name in ("one", "tensor", "pipeline")
    ]
    assert len(books[0]) == 3 and books[0] == books[1] == books[2]
    lines = (tmp_path / "one" / "grace" / "refreshes.jsonl").read_text().splitlines()
    assert [json.loads(line)["objective"] for line in lines] == ["uniform", "sample", "sample"]
    # The same samples, other initial weights for each layout: it learns, and about equally fast.
    ends = []
    for losses in (one, tensor, pipeline):
        assert set(losses) == {str(step) for step in range(1, 13)} | {"end"}
        assert losses["1"] > 5 and losses["end"] < losses["1"] - 0.5
        ends.append(losses["end"])
    assert max(ends) - min(ends) < 0.3


def test_megatron_gpu_form_differs_by_its_numbers_alone():
    cpu, gpu = (OmegaConf.load(ROOT / "configs" / f"megatron_{device}.yaml") for device in ("cpu", "gpu"))

    def keys(node):
        return {k: keys(v) if OmegaConf.is_dict(v) else None for k, v in node.items()}

    assert keys(gpu.train) == keys(cpu.train) and keys(gpu.model) == keys(cpu.model) and keys(gpu.parallel) == keys(cpu.parallel)
    assert set(gpu) == set(cpu) and set(gpu.data) == set(cpu.data)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_megatron_gpu_form_runs_on_a_cpu_but_for_its_size(tmp_path):
    """TP 2 × PP 2 × DP 2 in bfloat16 with recomputation, stopped and gone on: all of it but CUDA and NCCL."""
    config = ROOT / "configs" / "megatron_gpu.yaml"
    processes = OmegaConf.load(config).processes
    assert processes == 8
    small = ["model.layers=2", "model.hidden=32", "model.heads=4", "model.length=32"]
    train = ["train.steps=9", "train.batch=16", "train.micro=4", "train.log_every=1", "train.save_every=3", "train.eval_micro=2"]
    grace = ["grace.refresh.interval_steps=3", "grace.refresh.timeout_seconds=120", "grace.refresh.cadence=fixed"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launch, "examples/megatron_core/pretrain_gpt.py", config, f"out={tmp_path}", "device=cpu", *small, *train, *grace]
    first = run_command([*command, "train.stop_after=6"], timeout=280)
    second = run_command(command, timeout=280)
    steps = [int(step) for said in (first, second) for step in re.findall(r"step (\d+): loss [\d.]+", said)]
    assert steps == list(range(1, 10)) and "validation loss" in second
    schedules = load_book(tmp_path / "grace" / "schedules").schedules
    assert [s.meta["objective"] for s in schedules] == ["uniform", "sample", "sample", "sample"]
