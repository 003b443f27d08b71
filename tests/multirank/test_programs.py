"""Programs that know nothing of GRACE, under ``grace-ds run``: own loaders, Trainers, accelerate, Fabric, TRL's command.

Of each: what is trained on is the schedule, a resume is exact, shadow mode is bit for bit the job without GRACE, and the
evaluation in between sees what it saw without.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from grace_ds.cli.trace import trace
from grace_ds.data.schedule import load_book
from tests.extras import needs
from tests.multirank.harness import run_command
from tests.multirank.launch import COLLECTING, Records, environment, free_port, stream

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(1200)]

BIN = Path(sys.executable).parent
HERE = Path(__file__).parent
CONTENT: dict[str, Any] = {**COLLECTING, "recipe": "content"}
SHADOW: dict[str, Any] = {**COLLECTING, "mode": "shadow"}
Told = list[dict[str, Any]]


def read(folder: Path, name: str) -> Told:
    return [json.loads((folder / f"{name}-{r}.json").read_text()) for r in range(2)]


def offline(folder: Path) -> dict[str, str]:
    """The environment of jobs of Hugging Face's libraries and of launchers that are found by name."""
    cache = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "0"}
    return {**environment(folder), **cache, "PATH": f"{BIN}:/usr/bin:/bin"}


def trained_as_scheduled(told: Told, run_dir: Path, rows: int = 4) -> None:
    """Micro-batch q of rank r holds the schedule's positions (q·ranks + r)·rows and on, in that order, from the first one on."""
    book = load_book(run_dir / "schedules")
    for rank, record in enumerate(told):
        ids = [i for step in record["steps"] for i in step]
        micros = [ids[at : at + rows] for at in range(0, len(ids), rows)]
        assert micros == [book.slots((q * 2 + rank) * rows, rows).ids.tolist() for q in range(len(micros))]
    assert len(book.schedules) >= 3


def traced(run_dir: Path, step: int) -> list[int]:
    """The samples of an optimizer step, as ``grace-ds trace`` tells them."""
    return sorted(row["id"] for row in json.loads(trace(str(run_dir), step, as_json=True))["samples"])


def same(ours: Told, theirs: Told, *keys: str) -> None:
    for a, b in zip(ours, theirs, strict=True):
        for key in keys:
            assert a[key] == b[key], key


def block(folder: Path, name: str, config: dict[str, Any]) -> list[str]:
    """The options that hand a block to a job whose DeepSpeed config has none."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["--grace", str(path)]


# -- loaders of the job's own --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def own(folder: Path) -> tuple[Records, str]:
    def kept(name: str, grace: dict[str, Any] = CONTENT) -> dict[str, Any]:
        return {**grace, "run_dir": str(folder / name)}

    saved = {"save_at": 6, "save": str(folder / "saved")}
    jobs: dict[str, Any] = {
        "plain": {},
        "shadow": {"grace": SHADOW, "save_at": 5, "save": str(folder / "in_shadow")},
        "shadow_resumed": {"grace": SHADOW, "load": str(folder / "in_shadow"), "from": 5, "skip": 5},
        "uniform": {"grace": {**CONTENT, "recipe": "uniform"}},
        "content": {"grace": kept("content"), "steps": 14, **saved},
        "resumed": {"grace": CONTENT, "steps": 14, "load": str(folder / "saved"), "from": 6},
        "workers": {"grace": kept("workers", COLLECTING), "gas": 2, "workers": 2},
        "random": {"grace": kept("random", {**CONTENT, "start_step": -1}), "steps": 10, "sampler": "random", "reference": True},
        "endless": {"grace": kept("endless"), "endless": True, "steps": 30},
        "skipping": {"grace": CONTENT, "load": str(folder / "saved"), "from": 6, "skip": 6},
        "stream": {"grace": CONTENT, "sampler": "stream"},
        "rows": {"grace": CONTENT, "rows": 2},
        "stray": {"grace": CONTENT, "stray": True},
    }
    specs = folder / "specs.json"
    specs.write_text(json.dumps({"out": str(folder), "jobs": jobs}))
    launcher = [BIN / "grace-ds", "run", "--num_accelerators", "2", "--master_port", str(free_port())]
    said = run_command([*launcher, HERE / "loader_job.py", specs], timeout=300, env=environment(folder))
    return {name: read(folder, name) for name in jobs}, said


@pytest.mark.parametrize("kind", ["content", "workers", "random", "endless"])
def test_a_jobs_own_loader_gives_the_schedule_from_the_first_step_on(own: tuple[Records, str], folder: Path, kind: str) -> None:
    told = own[0][kind]
    trained_as_scheduled(told, folder / kind)
    for record in told:
        assert record["touched"] and not record["other_touched"]
        assert record["metrics"]["unrecognised"] == record["metrics"]["position_slips"] == 0


def test_validation_loaders_are_not_touched(own: tuple[Records, str]) -> None:
    for kind in ("shadow", "content", "workers", "random", "endless"):
        for record in own[0][kind]:
            batches = record["validated"]
            assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]] * (len(batches) // 3)
            assert len(batches) >= 9


def test_in_shadow_the_job_is_bit_for_bit_what_it_was_and_its_samples_are_known(own: tuple[Records, str]) -> None:
    records = own[0]
    same(records["shadow"], records["plain"], "steps", "losses", "validated", "params")
    same(records["shadow_resumed"], records["plain"], "params")
    seen = {i for record in records["shadow"] for step in record["steps"][1:] for i in step}
    known = {int(i) for record in records["shadow"] for i in record["table"]}
    assert known and known <= seen


def test_where_nothing_is_chosen_the_order_of_the_jobs_sampler_goes_on(own: tuple[Records, str]) -> None:
    assert stream(own[0]["uniform"]) == stream(own[0]["plain"])


def test_a_resumed_job_goes_on_with_the_undisturbed_ones_samples(own: tuple[Records, str]) -> None:
    for again, whole in zip(own[0]["resumed"], own[0]["content"], strict=True):
        assert again["steps"] == whole["steps"][6:]
        assert again["params"] == whole["params"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("skipping", "leave the skipping out"),
        ("stream", "iterates an iterable dataset (Streamed)"),
        ("rows", "gives 2 samples a rank"),
        ("stray", "4 micro-batches have been through engine.backward without a step, where 1 make one"),
    ],
)
def test_what_cannot_be_adopted_is_refused_on_every_rank_with_the_cure(own: tuple[Records, str], kind: str, said: str) -> None:
    for record in own[0][kind]:
        assert said in record["error"], record["error"]


def test_one_line_says_what_is_on_and_one_that_nothing_is(own: tuple[Records, str]) -> None:
    said = own[1]
    assert "GRACE is off, and the job runs as it is: the DeepSpeed config of this job holds no block" in said
    assert "GRACE is on: recipe content, mode train, 192 samples, fed by the job's own DataLoader, adopted" in said


# -- transformers.Trainer ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(folder: Path) -> tuple[Records, str]:
    """Rows of several lengths, and packed ones, each evaluated every third step."""
    needs("huggingface", "transformers", "accelerate", "datasets", "peft")
    out = folder / "trainer"
    out.mkdir()
    saving = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 5}
    jobs: dict[str, Any] = {}
    for data in ("padded", "packed"):
        plain = {"attach": False, "data": data, "args": saving}
        kept = {**COLLECTING, "run_dir": str(out / f"{data}_run")}
        jobs |= {
            f"{data}_plain": plain,
            f"{data}_shadow": {**plain, "grace": SHADOW},
            f"{data}_base": {**plain, "grace": kept},
            f"{data}_again": {**plain, "grace": COLLECTING, "resume": f"{data}_base/checkpoint-5"},
        }
    specs = out / "specs.json"
    specs.write_text(json.dumps({"out": str(out), "jobs": jobs}))
    launcher = [BIN / "grace-ds", "run", "--num_accelerators", "2", "--master_port", str(free_port())]
    said = run_command([*launcher, HERE / "trainer_job.py", specs], timeout=300, env=offline(out))
    return {name: read(out, name) for name in jobs}, said


@pytest.mark.parametrize("data", ["padded", "packed"])
def test_a_trainer_is_attached_to_by_itself(trained: tuple[Records, str], folder: Path, data: str) -> None:
    records, said = trained
    plain, shadow, base, again = (records[f"{data}_{kind}"] for kind in ("plain", "shadow", "base", "again"))
    same(shadow, plain, "steps", "losses", "evals", "params")
    assert not plain[0]["touched"] and shadow[0]["touched"] and len(plain[0]["evals"]) == 4
    micros = [{**record, "steps": [[i for micro in step for i in micro] for step in record["steps"]]} for record in base]
    trained_as_scheduled(micros, folder / "trainer" / f"{data}_run", rows=2)
    assert traced(folder / "trainer" / f"{data}_run", 6) == stream(micros)[6]
    assert all(record["metrics"]["unrecognised"] == 0 and record["table"] for record in base)
    for resumed, whole in zip(again, base, strict=True):
        assert resumed["steps"] == whole["steps"][5:]
        assert resumed["params"] == whole["params"]
    assert "fed by the Trainer's own loader" in said


# -- accelerate launch ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def accelerated(folder: Path) -> dict[str, Told]:
    needs("huggingface", "accelerate")
    ds = folder / "accelerate.json"
    auto = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    ds.write_text(json.dumps({**auto, "zero_optimization": {"stage": 2}}))

    def launch(name: str, own_options: list[str], *more: str) -> None:
        command = ["accelerate", "launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
        command += ["--dynamo_backend", "no", "--use_deepspeed", "--deepspeed_config_file", str(ds)]
        command += ["--main_process_port", str(free_port()), str(HERE / "accelerate_job.py"), str(folder), f"acc_{name}", *more]
        run_command([BIN / "grace-ds", "run", *own_options, *command], timeout=300, env=offline(folder))

    launch("plain", [])
    launch("shadow", block(folder, "acc_shadow", SHADOW))
    launch("base", block(folder, "acc_base", {**COLLECTING, "run_dir": str(folder / "acc_run")}), "--save-at", "9")
    launch("resumed", block(folder, "acc_resumed", COLLECTING), "--resume", str(folder / "state"))
    return {name: read(folder, f"acc_{name}") for name in ("plain", "shadow", "base", "resumed")}


def test_a_plain_accelerate_loop_trains_on_the_schedule_gathers_and_resumes(accelerated: dict[str, Told], folder: Path) -> None:
    assert [record["processes"] for record in accelerated["base"]] == [2, 2]
    trained_as_scheduled(accelerated["base"], folder / "acc_run")
    assert traced(folder / "acc_run", 10) == stream(accelerated["base"])[10]
    same(accelerated["shadow"], accelerated["plain"], "steps", "losses", "evals", "evaluated", "params")
    same(accelerated["base"], accelerated["plain"], "evaluated")
    for again, whole in zip(accelerated["resumed"], accelerated["base"], strict=True):
        assert again["steps"] == whole["steps"][9:]
        assert (again["losses"], again["params"]) == (whole["losses"][9:], whole["params"])


# -- Lightning Fabric, under torchrun ------------------------------------------------------------------------------------


def test_fabric_trains_on_the_schedule_whose_steps_the_engine_does_not_see(folder: Path) -> None:
    needs("test", "lightning_fabric")
    out = folder / "fabric"
    out.mkdir()

    def launch(name: str, own_options: list[str], *more: str) -> Told:
        command = ["torchrun", "--nproc-per-node", "2", "--master-port", str(free_port())]
        command += [str(HERE / "fabric_job.py"), str(out), name, *more]
        run_command([BIN / "grace-ds", "run", *own_options, *command], timeout=300, env=offline(out))
        return read(out, name)

    plain = launch("plain", [])
    shadow = launch("shadow", block(out, "shadow", SHADOW))
    base = launch("base", block(out, "base", {**COLLECTING, "run_dir": str(folder / "fabric_run")}), "--save-at", "7")
    resumed = launch("resumed", block(out, "resumed", COLLECTING), "--resume", str(out / "state"))
    same(shadow, plain, "steps", "losses", "validated", "params")
    trained_as_scheduled(base, folder / "fabric_run")
    assert traced(folder / "fabric_run", 9) == stream(base)[9]
    same(base, plain, "validated")
    for again, whole in zip(resumed, base, strict=True):
        assert again["steps"] == whole["steps"][7:]
        assert again["params"] == whole["params"]
        assert whole["metrics"]["step"] == 12 and whole["table"]


# -- TRL's command -------------------------------------------------------------------------------------------------------


def texts(n: int, salt: int) -> str:
    rows = [
        " ".join(str((j * 3 + i * salt) % 60 if i % 2 else (i * i + 7 * j * salt) % 60) for j in range(6 + i % 9))
        for i in range(n)
    ]
    return "\n".join(json.dumps({"text": row}) for row in rows)


@pytest.fixture(scope="module")
def trl(folder: Path) -> tuple[Path, dict[str, str]]:
    """What ``trl sft`` printed: with no block, in shadow, on a coreset, and resumed from the sixth step of that."""
    needs("test", "trl", "transformers", "datasets")
    from tests.multirank.test_huggingface_example import tiny_model

    out = folder / "trl"
    (out / "data").mkdir(parents=True)
    tiny_model(out / "model")
    (out / "data" / "train.jsonl").write_text(texts(64, 1))
    (out / "data" / "test.jsonl").write_text(texts(12, 5))
    auto = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "zero_optimization": {"stage": 2}}
    blocks: dict[str, Any] = {"plain": {}, "shadow": {"grace_ds": SHADOW}, "again": {"grace_ds": COLLECTING}}
    blocks["base"] = {"grace_ds": {**COLLECTING, "run_dir": str(out / "run")}}
    settings = {
        "model_name_or_path": str(out / "model"),
        "dataset_name": str(out / "data"),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 12,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_steps": 6,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
    }
    (out / "sft.yaml").write_text(yaml.safe_dump(settings))
    env = offline(out)
    env["PYTHONPATH"] = f"{HERE / 'no_shm'}:{env['PYTHONPATH']}"

    def train(name: str, *more: str) -> str:
        (out / f"{name}.json").write_text(json.dumps({**auto, **blocks[name]}))
        command = ["trl", "sft", "--config", str(out / "sft.yaml"), "--deepspeed", str(out / f"{name}.json")]
        command += ["--output_dir", str(out / name), "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
        command += ["--dynamo_backend", "no", "--main_process_port", str(free_port()), *more]
        return run_command([BIN / "grace-ds", "run", *command], timeout=300, env=env)

    said = {name: train(name) for name in ("plain", "shadow", "base")}
    said["again"] = train("again", "--resume_from_checkpoint", str(out / "base" / "checkpoint-6"))
    return out, said


def told_by_trl(folder: Path, name: str) -> tuple[Any, list[dict[str, Any]]]:
    """The trained parameters, and the Trainer's log."""
    from safetensors.torch import load_file

    state = json.loads((folder / name / "checkpoint-12" / "trainer_state.json").read_text())
    return load_file(folder / name / "model.safetensors"), state["log_history"]


def logged(log: list[dict[str, Any]], key: str) -> list[float]:
    return [entry[key] for entry in log if key in entry]


@pytest.mark.slow
def test_the_command_of_trl_is_attached_to_by_itself(trl: tuple[Path, dict[str, str]]) -> None:
    folder, said = trl
    (plain, plain_log), (shadow, shadow_log) = told_by_trl(folder, "plain"), told_by_trl(folder, "shadow")
    (whole, whole_log), (again, again_log) = told_by_trl(folder, "base"), told_by_trl(folder, "again")
    assert all(plain[key].equal(shadow[key]) for key in plain)
    assert all(whole[key].equal(again[key]) for key in whole)
    assert not all(plain[key].equal(whole[key]) for key in plain)
    for key in ("loss", "eval_loss"):
        assert logged(plain_log, key) == logged(shadow_log, key)
        assert logged(whole_log, key) == logged(again_log, key)
    assert len(logged(whole_log, "eval_loss")) == 3
    assert "GRACE is off, and the job runs as it is: the DeepSpeed config of" in said["plain"]
    assert "64 samples, fed by the Trainer's own loader" in said["base"]


@pytest.mark.slow
def test_the_tokens_that_trl_counts_are_those_of_the_samples_that_trace_tells(trl: tuple[Path, dict[str, str]]) -> None:
    from transformers import AutoTokenizer

    folder, _ = trl
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    lengths = [len(tokenizer(json.loads(row)["text"]).input_ids) + 1 for row in texts(64, 1).splitlines()]  # and the end
    counted = [entry["num_tokens"] for entry in told_by_trl(folder, "base")[1] if "loss" in entry]
    steps = [now - before for before, now in zip([0.0, *counted], counted, strict=False)]
    assert steps == [sum(lengths[i] for i in traced(folder / "run", step)) for step in range(12)]
