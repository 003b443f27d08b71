"""Megatron-LM's own pretrain_gpt.py, in its own loop: what it trains on is what the schedules say, however it is run.

Needs a checkout of Megatron-LM core_v0.16.1 (``git clone -b core_v0.16.1 https://github.com/NVIDIA/Megatron-LM``), named by the
environment variable GRACE_MEGATRON_LM, and the packages ``six`` and ``triton`` that it imports.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed (pip install grace_ds[megatron])")

from grace_ds.data.schedule import load_book
from tests.multirank.harness import ROOT, RanksFailed, run_command

CHECKOUT = os.environ.get("GRACE_MEGATRON_LM")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHECKOUT is None, reason="GRACE_MEGATRON_LM names no checkout of Megatron-LM core_v0.16.1"),
]

MODEL = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64"
TRAIN = "--micro-batch-size 4 --global-batch-size 16 --lr 1e-3 --lr-decay-style constant --num-workers 2 --split 95,5,0"
TEXT = "--transformer-impl local --tokenizer-type NullTokenizer --vocab-size 2048 --eval-iters 1 --log-interval 4"
PLAIN = "--no-masked-softmax-fusion --no-gradient-accumulation-fusion --no-persist-layer-norm"
PLAIN += " --hidden-dropout 0 --attention-dropout 0"
ON_CPU = "--distributed-backend gloo --use-cpu-initialization --no-bias-gelu-fusion --no-bias-dropout-fusion --no-rope-fusion"
STEPS = ["--train-iters", "24", "--eval-interval", "1000"]
TP, PP = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
GRACE = {"recipe": "content", "budget": 0.4, "refresh": {"interval_steps": 6, "cadence": "fixed", "timeout_seconds": 120}}
BATCH, LENGTH = 16, 64


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The quickstart's crawl pool, with its junk, as two of Megatron's datasets; trusted samples beside."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    sys.path.insert(0, str(ROOT / "examples"))
    from grace_ds_quickstart.corpus import CorpusSpec, prepare

    folder = tmp_path_factory.mktemp("data")
    pool = prepare(CorpusSpec(pool_size=3000, trusted_size=128, validation_size=64), folder / "pool").folder
    rows = np.load(pool / "train.npy")[:, :LENGTH]
    import torch

    for name, part in (("a", rows[:2000]), ("b", rows[2000:])):
        builder = IndexedDatasetBuilder(f"{folder / name}.bin", dtype=np.int32)
        for row in part:
            builder.add_document(torch.from_numpy(row.copy()), [len(row)])
        builder.finalize(f"{folder / name}.idx")
    trusted = [json.dumps({"input_ids": row[:LENGTH].tolist()}) for row in np.load(pool / "trusted.npy")]
    (folder / "trusted.jsonl").write_text("\n".join(trusted))
    return folder


def pretrain(data: Path, out: Path, *arguments: str, grace: dict[str, Any] | None = None, ranks: int = 2) -> str:
    """Ranks of pretrain_gpt.py; what they have printed."""
    import yaml

    out.mkdir(exist_ok=True)
    block = {**GRACE, "trusted": str(data / "trusted.jsonl"), "run_dir": str(out / "grace"), **(grace or {})}
    (out / "grace.yaml").write_text(yaml.safe_dump(block))
    options = " ".join((MODEL, TRAIN, TEXT, PLAIN, ON_CPU)).split()
    blend = ["--data-path", "70", str(data / "a"), "30", str(data / "b"), "--data-cache-path", str(data / "cache")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    job = [ROOT / "tests" / "multirank" / "megatron_lm_job.py", CHECKOUT, out]
    # The wheel of megatron-core comes first: the checkout's own is the same, and not compiled.
    paths = [str(ROOT), sysconfig.get_paths()["purelib"], *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return run_command([*launch, *map(str, job), *options, *blend, *arguments], timeout=400, env=env)


def trained(out: Path, ranks: int = 2) -> dict[int, dict[int, list[int]]]:
    """Rank → start of each iteration → ids that it must have trained on there; checked against what the model was given."""
    book, corpus = load_book(out / "grace" / "schedules"), np.load(out / "corpus.npz")
    found: dict[int, dict[int, list[int]]] = {}
    for path in out.glob("trained-*.npz"):
        seen, ids = np.load(path), dict[int, list[int]]()
        rank, replicas = seen["place"]
        for start, rows in zip(seen["starts"].tolist(), seen["rows"], strict=True):
            micro = len(ids.setdefault(start, [])) // len(rows)
            scheduled = book.slots(start + (micro * replicas + rank) * len(rows), len(rows)).ids
            assert np.array_equal(rows, corpus["labels" if seen["labels"] else "tokens"][scheduled]), (path.name, start, micro)
            ids[start] += scheduled.tolist()
        found[int(path.stem.split("-")[1])] = ids
    assert len(found) == ranks
    return found


def digests(out: Path) -> list[str]:
    return [schedule.digest() for schedule in load_book(out / "grace" / "schedules").schedules]


def check(out: Path, starts: list[int], recipe: str = "content", ranks: int = 2) -> None:
    """A live coreset, and every iteration trained on the samples of its positions."""
    schedules = load_book(out / "grace" / "schedules").schedules
    kinds = [s.meta["objective"] for s in schedules]
    assert kinds == sorted(kinds, reverse=True) and kinds.count("uniform") == (1 if recipe == "content" else 2) and len(kinds) > 3
    assert {s.meta["drawn_by"] for s in schedules if s.meta["objective"] == "sample"} == {recipe}
    for ids in trained(out, ranks).values():
        assert sorted(ids) == starts
    counts = [np.load(path) for path in out.glob("counts-*.npz")]
    assert counts and all(int(c["position_slips"]) == int(c["refresh_failures"]) == 0 for c in counts)


def even(first: int = 0, last: int = 24) -> list[int]:
    return [step * BATCH for step in range(first, last)]


@pytest.fixture(scope="module")
def tensor(data, tmp_path_factory) -> Path:
    """TP 2, 24 iterations, distributed checkpoints after 10 and 20."""
    out = tmp_path_factory.mktemp("tensor")
    save = ["--save", str(out / "checkpoints"), "--save-interval", "10", "--ckpt-format", "torch_dist"]
    quiet = ["--logging-level", "40"]  # of Megatron-LM's own lines
    (out / "said").write_text(pretrain(data, out, *STEPS, *TP, *save, *quiet))
    return out


def test_pretrain_gpt_trains_on_the_schedule_under_tensor_parallelism(tensor):
    check(tensor, even())
    said = (tensor / "said").read_text()
    assert said.count("grace_ds") and said.count("schedule 1: content") == 1  # rank 0 alone


def test_pretrain_gpt_blend_keeps_its_weights_and_each_dataset_its_best(tensor):
    for schedule in load_book(tensor / "grace" / "schedules").schedules[1:]:
        window, coreset = (np.array(schedule.meta["sources"][key]) for key in ("window", "coreset"))
        assert np.abs(coreset / window - GRACE["budget"]).max() < 0.01
        assert abs((schedule.ids < 1900).mean() - 0.7) < 0.05  # dataset a has 95 % of 2000 samples


def test_pretrain_gpt_resumes_from_a_distributed_checkpoint(data, tensor, tmp_path):
    shutil.copytree(tensor / "grace", tmp_path / "grace")
    shutil.copytree(tensor / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("10")
    load = ["--load", str(tmp_path / "checkpoints"), "--no-load-rng", "--ckpt-format", "torch_dist"]
    said = pretrain(data, tmp_path, *STEPS, *TP, *load)
    assert "schedules taken up from" in said
    check(tmp_path, even(10))
    assert digests(tmp_path) == digests(tensor)


@pytest.mark.parametrize(
    "layout",
    [PP, [*PP, "--num-layers-per-virtual-pipeline-stage", "1"], [*PP, "--eval-interval", "5"]],
    ids=["pipeline", "interleaved", "evaluated"],
)
def test_pretrain_gpt_schedules_do_not_depend_on_the_layout_or_on_evaluation(data, tensor, tmp_path, layout):
    pretrain(data, tmp_path, *STEPS, *layout)
    check(tmp_path, even())
    assert digests(tmp_path) == digests(tensor)


def test_pretrain_gpt_data_parallel_and_cyclic_draw_nothing_themselves(data, tmp_path):
    kinds = {
        "single": [],
        "sharded": ["--dataloader-type", "cyclic"],
        "whole": ["--dataloader-type", "cyclic", "--no-data-sharding"],
    }
    for name, kind in kinds.items():
        pretrain(data, tmp_path / name, *STEPS, *kind)
        check(tmp_path / name, even())
    assert digests(tmp_path / "sharded") == digests(tmp_path / "whole") == digests(tmp_path / "single")
    assert trained(tmp_path / "sharded") == trained(tmp_path / "whole") == trained(tmp_path / "single")


def test_pretrain_gpt_skips_iterations_across_a_refresh(data, tmp_path):
    skipped = [4, 5, 6, 7, 8, 12, 18, 19]
    pretrain(data, tmp_path, *STEPS, "--num-workers", "1", "--iterations-to-skip", *map(str, skipped))
    check(tmp_path, [step * BATCH for step in range(24) if step not in skipped])


def test_pretrain_gpt_ramps_its_batch_up_and_resumes_within(data, tmp_path):
    ramp = ["--rampup-batch-size", "8", "8", "224", "--train-samples", "400", "--eval-interval", "1000"]
    save = ["--save", str(tmp_path / "checkpoints"), "--save-interval", "15"]
    pretrain(data, tmp_path / "whole", *ramp, *save)
    starts = [*range(0, 224, 8), *range(224, 400, BATCH)]
    check(tmp_path / "whole", starts)
    shutil.copytree(tmp_path / "whole" / "grace", tmp_path / "resumed" / "grace")
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("15")  # 120 samples: within a step of 16
    pretrain(data, tmp_path / "resumed", *ramp, "--load", str(tmp_path / "checkpoints"), "--no-load-rng")
    check(tmp_path / "resumed", [start for start in starts if start >= 120])
    assert digests(tmp_path / "resumed") == digests(tmp_path / "whole")


def test_pretrain_gpt_step_that_is_run_again_by_the_rerun_state_machine(data, tensor, tmp_path):
    """A fault is injected: Megatron-LM runs the step again, saves the state before it, and ends; the run is then resumed."""
    save = ["--save", str(tmp_path / "checkpoints"), "--save-interval", "100"]
    with pytest.raises(RanksFailed, match="Possible transient error"):
        pretrain(data, tmp_path, *STEPS, *TP, *save, "--error-injection-rate", "20", "--error-injection-type", "transient_error")
    saved = int((tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    load = ["--load", str(tmp_path / "checkpoints"), "--no-load-rng", "--rerun-mode", "disabled"]
    pretrain(data, tmp_path, *STEPS, *TP, *load)
    check(tmp_path, even(saved))
    assert digests(tmp_path) == digests(tensor)


# -- recipe: grace -------------------------------------------------------------------------------------------------------

GRADIENTS = {
    "recipe": "grace",
    "guard": {"enabled": False},
    "refresh": {"interval_steps": 6, "cadence": "fixed", "timeout_seconds": 120, "probe_share": 0.5},
}
ALIKE = ["--vocab-size", "2047", "--make-vocab-size-divisible-by", "1024", "--num-workers", "0"]  # the same model and lag


@pytest.fixture(scope="module")
def weights(data, tmp_path_factory) -> list[str]:
    """Arguments by which a run begins with the weights of one rank, however it lays the model out, and trains with SGD."""
    out = tmp_path_factory.mktemp("weights")
    save = ["--save", str(out / "checkpoints"), "--save-interval", "1", "--ckpt-format", "torch_dist"]
    pretrain(data, out, "--train-iters", "1", "--eval-interval", "1000", *ALIKE, *save, ranks=1)
    load = ["--load", str(out / "checkpoints"), "--finetune", "--no-load-optim", "--no-load-rng", "--ckpt-format", "torch_dist"]
    return [*ALIKE, *load, "--optimizer", "sgd", "--lr", "0.3"]


@pytest.fixture(scope="module")
def one(data, weights, tmp_path_factory) -> Path:
    """``recipe: grace`` on one rank."""
    out = tmp_path_factory.mktemp("one")
    pretrain(data, out, *STEPS, *weights, grace=GRADIENTS, ranks=1)
    check(out, even(), "grace", ranks=1)
    return out


def influences(out: Path) -> dict[int, float]:
    parts = [np.load(path) for path in out.glob("counts-*.npz")]
    found = {int(i): float(value) for part in parts for i, value in zip(part["ids"], part["influence"], strict=True)}
    return {i: value for i, value in found.items() if np.isfinite(value)}


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, TP),
        (2, [*TP, "--sequence-parallel"]),
        (2, PP),
        (2, [*PP, "--num-layers-per-virtual-pipeline-stage", "1"]),
        (2, []),
        (4, [*TP, *PP]),
        (4, TP),
    ],
    ids=["tensor", "sequence", "pipeline", "interleaved", "data", "tensor and pipeline", "data and tensor"],
)
def test_pretrain_gpt_reads_gradients_as_one_rank_does(data, weights, one, tmp_path, ranks, layout):
    pretrain(data, tmp_path, *STEPS, *layout, *weights, grace=GRADIENTS, ranks=ranks)
    check(tmp_path, even(), "grace", ranks)
    books = [load_book(out / "grace" / "schedules").schedules for out in (tmp_path, one)]
    assert len(books[0]) == len(books[1])
    for found, wanted in zip(*books, strict=True):
        assert np.array_equal(found.ids, wanted.ids) and np.array_equal(found.roles, wanted.roles)
    found_here, wanted_here = influences(tmp_path), influences(one)
    assert found_here.keys() == wanted_here.keys() and len(wanted_here) > 150
    a, b = (np.array([of[i] for i in sorted(wanted_here)]) for of in (found_here, wanted_here))
    assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)


@pytest.mark.parametrize("ramped", [False, True], ids=["skipped", "ramped"])
def test_pretrain_gpt_reads_gradients_of_the_samples_trained_on(data, tmp_path, ramped):
    """Where iterations are skipped, and while the batch is ramped up."""
    skipped = [4, 5, 6, 7, 8, 12, 18, 19]
    run = [*STEPS, "--iterations-to-skip", *map(str, skipped)]
    starts = [step * BATCH for step in range(24) if step not in skipped]
    if ramped:
        run = ["--rampup-batch-size", "8", "8", "224", "--train-samples", "400", "--eval-interval", "1000"]
        starts = [*range(0, 224, 8), *range(224, 400, BATCH)]
    pretrain(data, tmp_path, *run, *PP, "--num-workers", "1", grace=GRADIENTS)
    check(tmp_path, starts, "grace")
    (ids,) = {tuple(sorted({i for batch in rank.values() for i in batch})) for rank in trained(tmp_path).values()}
    kept = {i for path in tmp_path.glob("counts-*.npz") for i in np.load(path)["ids"].tolist()}
    # The first step that is collected gives the layers' scale and no rows; those after the last refresh are not gathered yet.
    assert kept <= set(ids) and len(kept) > len(ids) // 3
