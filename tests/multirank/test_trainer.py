"""``transformers.Trainer`` on a coreset: which samples it trains on, before and after a resume, and what it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grace_ds.data.schedule import load_book
from tests.extras import needs
from tests.multirank.harness import run_module
from tests.multirank.launch import COLLECTING, Records, environment

needs("huggingface", "transformers", "accelerate", "datasets", "peft")

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(600)]

JOB = "tests.multirank.trainer_job"
SCRIPT = Path(__file__).with_name("trainer_job.py")
ROWS, GAS, STEPS = 2, 2, 12  # 60 samples: 15 micro-batches on each of two ranks, so that an epoch's last step is half a one
CONTENT: dict[str, Any] = {**COLLECTING, "recipe": "content"}
GRACE: dict[str, Any] = COLLECTING
EVALUATING = {"eval_strategy": "steps", "eval_steps": 3}
SAVING = {"save_strategy": "steps", "save_steps": 5}
WORKERS = {"dataloader_num_workers": 2}


def run_trainers(folder: Path, jobs: dict[str, Any], ranks: int, unchanged: bool = False) -> Records:
    folder.mkdir(parents=True, exist_ok=True)
    specs = folder / "specs.json"
    specs.write_text(json.dumps({"out": str(folder), "jobs": jobs}))
    module, words = ("grace_ds.run", [SCRIPT, specs]) if unchanged else (JOB, [specs])
    run_module(module, words, ranks, timeout=500, env=environment(folder), preload=[JOB])
    return {name: [json.loads((folder / f"{name}-{r}.json").read_text()) for r in range(ranks)] for name in jobs}


def run_and_resume(prefix: str, spec: dict[str, Any], at: tuple[int, ...] = (5, 10), **more: Any) -> dict[str, Any]:
    """A job that saves, and the same taken up from each of its checkpoints."""
    saving = {**spec, "args": {**spec.get("args", {}), **SAVING}}
    resumed = {f"{prefix}_from{k}": {**saving, **more, "resume": f"{prefix}/checkpoint-{k}"} for k in at}
    for again in resumed.values():
        again["grace"] = {k: v for k, v in again["grace"].items() if k != "run_dir"}
    return {prefix: saving, **resumed}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainers")


@pytest.fixture(scope="module")
def two(folder: Path) -> Records:
    plain = {"attach": False, "args": {**EVALUATING, "lr_scheduler_type": "linear"}, "model": "gpt2"}
    kept = {name: {**CONTENT, "run_dir": str(folder / name)} for name in ("base", "workers")}
    jobs: dict[str, Any] = {
        "plain": plain,
        "none": {**plain, "attach": True},
        "off": {**plain, "attach": True, "grace": {"enabled": False}},
        "shadow": {**plain, "attach": True, "grace": {**GRACE, "mode": "shadow"}},
        "uniform": {**plain, "attach": True, "grace": {**CONTENT, "recipe": "uniform"}},
        "plain_workers": {**plain, "args": {**plain["args"], **WORKERS}},
        "shadow_workers": {**plain, "attach": True, "grace": {**CONTENT, "mode": "shadow"}, "args": {**plain["args"], **WORKERS}},
        **run_and_resume("base", {"grace": kept["base"]}),
        **run_and_resume("workers", {"grace": kept["workers"], "args": WORKERS, "stage": 1}),
        **run_and_resume("lora", {"grace": GRACE, "lora": True, "bf16": True, "trusted": True}, at=(5,)),
        "evaluated": {"grace": CONTENT, "args": EVALUATING, "peek": True},
        "unskipped": {"grace": CONTENT, "resume": "base/checkpoint-5", "args": {**SAVING, "ignore_data_skip": True}},
        "own_dataset": {"grace": CONTENT, "data": "plain"},
        "norms": {"grace": GRACE, "compare_norms": True, "args": {"learning_rate": 0.0}},
        "norms_of_means": {
            "grace": GRACE,
            "compare_norms": True,
            "args": {"learning_rate": 0.0, "average_tokens_across_devices": False},
        },
        "again": {"grace": CONTENT, "again": True, "args": {"max_steps": 2}},
        "iterable": {"grace": CONTENT, "data": "iterable"},
        "grouped": {"grace": CONTENT, "args": {"train_sampling_strategy": "group_by_length"}},
        "dispatched": {"grace": CONTENT, "args": {"accelerator_config": {"dispatch_batches": True}}},
        "split": {"grace": CONTENT, "args": {"accelerator_config": {"split_batches": True}}},
        "found": {"grace": CONTENT, "args": {"auto_find_batch_size": True}},
        "typo": {"grace": {**CONTENT, "bugdet": 0.3}},
        "without": {"no_deepspeed": True},
        "leaking": {"grace": CONTENT, "trusted": True, "trusted_salt": 7},
        "other_accumulation": {
            "grace": CONTENT,
            "resume": "base/checkpoint-5",
            "args": {**SAVING, "gradient_accumulation_steps": 1},
        },
    }
    return run_trainers(folder, jobs, 2)


@pytest.fixture(scope="module")
def one(folder: Path) -> Records:
    """Under ``grace_ds.run``, which puts our ``initialize`` in the place of the one that accelerate calls."""
    run_dir = {**CONTENT, "run_dir": str(folder / "single")}
    jobs = run_and_resume("single", {"grace": run_dir, "stage": 0, "lora": True})
    return run_trainers(folder / "one", jobs, 1, unchanged=True)


@pytest.fixture(scope="module")
def sharded(folder: Path) -> Records:
    """ZeRO-3 in a process of its own: it replaces functions of torch."""
    jobs = run_and_resume("sharded", {"grace": {**GRACE, "run_dir": str(folder / "sharded")}, "stage": 3, "trusted": True})
    plain = {"attach": False, "stage": 3, "args": EVALUATING}
    jobs |= {"plain": plain, "shadow": {**plain, "attach": True, "grace": {**GRACE, "mode": "shadow"}}}
    return run_trainers(folder / "three", jobs, 2)


def flat(record: dict[str, Any], first: int = 0) -> list[int]:
    """What a rank has trained on from step ``first`` of the record on, in order."""
    return [i for step in record["steps"][first:] for micro in step for i in micro]


def trained_as_scheduled(records: list[dict[str, Any]], run_dir: Path) -> None:
    """Micro-batch q of rank r holds the schedule's positions (q·ranks + r)·rows and on, in that order."""
    book, ranks = load_book(run_dir / "schedules"), len(records)
    for rank, record in enumerate(records):
        micros = [micro for step in record["steps"] for micro in step]
        due = [book.slots((q * ranks + rank) * ROWS, ROWS).ids.tolist() for q in range(len(micros))]
        assert micros == due


def same_from(resumed: list[dict[str, Any]], base: list[dict[str, Any]], step: int) -> None:
    """The resumed run is the undisturbed one's rest: samples, losses, parameters, and where it says it stands."""
    for again, whole in zip(resumed, base, strict=True):
        assert again["steps"] == whole["steps"][step:]
        assert again["params"] == whole["params"]
        assert again["epoch"] == whole["epoch"]
        assert again["losses"][-1] == whole["losses"][-1]  # the Trainer keeps the history of before


@pytest.mark.parametrize("kind", ["base", "workers"])
def test_what_is_trained_on_is_the_schedule(two: Records, folder: Path, kind: str) -> None:
    trained_as_scheduled(two[kind], folder / kind)
    lengths = [len(step) for step in two[kind][0]["steps"]]
    assert lengths == [2] * 7 + [1] + [2] * 4  # as many micro-batches as the Trainer has in an epoch without us
    assert two[kind][0]["metrics"]["refreshes"] >= 3
    assert len(set(flat(two[kind][0]) + flat(two[kind][1]))) < 60  # and it is a coreset


def test_and_on_one_rank_too(one: Records, folder: Path) -> None:
    trained_as_scheduled(one["single"], folder / "single")


@pytest.mark.parametrize("step", [5, 10])  # in the first epoch, and in the second
@pytest.mark.parametrize("kind", ["base", "workers"])
def test_a_resumed_run_trains_on_what_the_undisturbed_one_does(two: Records, kind: str, step: int) -> None:
    same_from(two[f"{kind}_from{step}"], two[kind], step)


@pytest.mark.parametrize("step", [5, 10])
def test_so_does_one_on_one_rank_with_adapters(one: Records, step: int) -> None:
    same_from(one[f"single_from{step}"], one["single"], step)


@pytest.mark.parametrize("step", [5, 10])
def test_so_does_one_under_zero_3_with_gradient_sketches(sharded: Records, folder: Path, step: int) -> None:
    trained_as_scheduled(sharded["sharded"], folder / "sharded")
    same_from(sharded[f"sharded_from{step}"], sharded["sharded"], step)


def test_a_resume_that_skips_no_data_goes_on_where_training_stood(two: Records) -> None:
    # An epoch begins anew there, so its half step comes elsewhere, and with it the next schedule.
    for again, whole in zip(two["unskipped"], two["base"], strict=True):
        assert again["steps"][:2] == whole["steps"][5:7]
        assert again["steps"][2][:1] == whole["steps"][7]


def test_neither_does_one_with_another_accumulation_skip_or_repeat_anything(two: Records) -> None:
    for again, whole in zip(two["other_accumulation"], two["base"], strict=True):
        assert flat(again)[:8] == flat(whole, 5)[:8]  # up to the next refresh, which comes after other samples


def test_evaluation_in_between_and_a_look_at_the_loader_disturb_nothing(two: Records) -> None:
    for ours, base in zip(two["evaluated"], two["base"], strict=True):
        assert ours["steps"] == base["steps"]
        assert ours["params"] == base["params"]
        assert len(ours["evals"]) == 4


def test_a_dataset_of_the_users_own_is_read_like_one_of_the_library(two: Records) -> None:
    for ours, base in zip(two["own_dataset"], two["base"], strict=True):
        assert ours["steps"] == base["steps"]


@pytest.mark.parametrize("kind", ["none", "off", "shadow"])
def test_without_a_block_and_in_shadow_a_trainer_is_bit_for_bit_what_it_was(two: Records, kind: str) -> None:
    for ours, theirs in zip(two[kind], two["plain"], strict=True):
        for key in ("steps", "losses", "evals", "params", "epoch"):
            assert ours[key] == theirs[key], key
        assert ours["touched"] == (kind == "shadow")
    assert len(two["plain"][0]["evals"]) == 4


def test_where_nothing_is_chosen_a_trainer_is_bit_for_bit_what_it_was(two: Records) -> None:
    for ours, theirs in zip(two["uniform"], two["plain"], strict=True):
        assert ours["steps"] == theirs["steps"] and len(theirs["steps"]) == STEPS  # beyond the first epoch
        assert (ours["losses"], ours["params"]) == (theirs["losses"], theirs["params"])


def test_in_shadow_with_workers_and_under_zero_3_too(two: Records, sharded: Records) -> None:
    pairs = [(two["shadow_workers"], two["plain_workers"]), (sharded["shadow"], sharded["plain"])]
    for ours, theirs in (pair for records in pairs for pair in zip(*records, strict=True)):
        for key in ("steps", "losses", "evals", "params"):
            assert ours[key] == theirs[key], key


def test_adapters_are_sketched_and_what_they_stand_on_is_not(two: Records) -> None:
    for rank in two["lora"]:
        assert rank["failures"] == 0
        assert len(rank["layers"]) == 6  # A and B of three layers of the last block
        assert all(".lora_A." in name or ".lora_B." in name for name in rank["layers"])
    trained = {i for rank in two["lora"] for i in flat(rank)}
    collected = {int(i) for rank in two["lora"] for i in rank["table"]}
    assert collected
    assert collected <= trained
    same_from(two["lora_from5"], two["lora"], 5)


@pytest.mark.parametrize("kind", ["norms", "norms_of_means"])
def test_a_harvested_row_is_the_gradient_of_the_samples_own_mean_loss(two: Records, kind: str) -> None:
    """However the Trainer has divided the loss: by the tokens of all ranks and micro-batches, or of this rank's."""
    pairs = [pair for rank in two[kind] for pair in rank["norms"]]
    assert len(pairs) >= 8
    for collected, alone in pairs:
        assert collected == pytest.approx(alone, rel=2e-3)


@pytest.mark.parametrize(
    ("kind", "error", "said"),
    [
        ("iterable", "DataError", "load_dataset without streaming"),
        ("grouped", "ConfigError", "train_sampling_strategy = 'group_by_length'"),
        ("dispatched", "ConfigError", "dispatch_batches = True"),
        ("split", "ConfigError", "split_batches = True"),
        ("found", "ConfigError", "auto_find_batch_size = True"),
        ("typo", "ConfigError", "did you mean 'budget'"),
        ("without", "ConfigError", "TrainingArguments(deepspeed="),
        ("leaking", "DataError", "is validation sample"),
        ("again", "GraceError", "a new Trainer to train again"),
    ],
)
def test_what_cannot_be_had_is_refused_on_every_rank(two: Records, kind: str, error: str, said: str) -> None:
    for rank in two[kind]:
        assert rank["error"].startswith(error), rank["error"]
        assert said in rank["error"]
