"""Real ZeRO-2 jobs under the deepspeed launcher: pass-through, shadow, ids, resume, roles, faults."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from grace_ds.data.schedule import load_book
from tests.multirank.launch import COLLECTING, Records, refreshes, run_jobs, stream
from tests.multirank.toy import LENGTH, SAMPLES, Corpus

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(440)]

STEPS = 20
GRACE: dict[str, Any] = COLLECTING
SAVES = [2, 4, 5, 7, 8, 12]

FAULTS = {
    "gather": ("grace_ds.refresh.line", "activation"),
    "table": ("grace_ds.refresh.line", "owner_of"),
    "features": ("grace_ds.integrations.setup", "follow_window"),
    "embed": ("grace_ds.refresh.line", "learn"),
    "graph": ("grace_ds.refresh.line", "follow"),
    "propagate": ("grace_ds.refresh.signals", "propagate"),
    "select": ("grace_ds.refresh.line", "choose"),
    "broadcast": ("grace_ds.refresh.line", "broadcast_schedule"),
    "pending": ("grace_ds.gradients.collector", "_running_means"),
}


def grace(**more: Any) -> dict[str, Any]:
    return {**GRACE, **more}


def jobs(folder: Path) -> dict[str, Any]:
    trusted = folder / "trusted.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"input_ids": row.tolist(), "sid": [i]}) for i, row in enumerate(Corpus(160, salt=3).tokens[::2])]
    trusted.write_text("\n".join(lines))
    clean = folder / "clean.jsonl"
    rows = Corpus(160, salt=4, clean=True).tokens
    clean.write_text("\n".join(json.dumps({"input_ids": row.tolist(), "sid": [0]}) for row in rows))
    documents = Corpus(64, salt=3).tokens
    (folder / "bare.jsonl").write_text("\n".join(json.dumps({"input_ids": row.tolist()}) for row in documents))
    (folder / "bare.txt").write_text("\n\n".join(" ".join(map(str, row)) for row in documents))
    saved, plain = str(folder / "saved"), str(folder / "plain-saved")
    base = {"steps": STEPS, "grace": grace()}
    out: dict[str, Any] = {
        "plain": {"steps": 12, "via": "deepspeed", "save": plain, "save_at": [6]},
        "disabled": {"steps": 12, "grace": {"enabled": False}},
        "absent": {"steps": 12},
        "shadow": {"steps": 12, "grace": grace(mode="shadow")},
        "base": {**base, "save": saved, "save_at": SAVES},
        "undisturbed": base,
        "peek": {**base, "peek": True},
        "skip": {**base, "skip": True},
        "evaluate": {**base, "evaluate": True},
        "filter": {**base, "filter": True},
        "workers0": {**base, "workers": 0},
        "gas4": {**base, "batch": 16, "gas": 4, "steps": 10},
        "overflow": {**base, "overflow": 5},
        "late": {"steps": 12, "grace": grace(), "load": plain},
        "late_refused": {"grace": grace(checkpoint={"on_missing_state": "error"}), "load": plain},
        "window": {"steps": 18, "grace": grace(start_step=6, stop_step=14, run_dir=str(folder / "run"))},
        "trusted": {**base, "grace": grace(trusted=str(trusted))},
        "replay_source": {**base, "grace": grace(run_dir=str(folder / "source"))},
        "replay": {**base, "grace": grace(replay=str(folder / "source" / "schedules"))},
        "wrong_layers": {"grace": grace(collect={"layers": ["nowhere.*"]})},
        "uniform_recipe": {"steps": 10, "grace": grace(recipe="uniform")},
        "clean_uniform": {"steps": 10, "clean": True, "workers": 0, "grace": grace(recipe="uniform")},
        "overlap": {"grace": grace(trusted=str(trusted)), "validation": {"n": 160, "salt": 3}},
    }
    seldom = {"refresh": {**GRACE["refresh"], "interval_steps": 16}, "collect": {"share": 0.5}}
    out["seldom"] = {**base, "steps": 18, "grace": grace(**seldom)}
    content = grace(recipe="content", trusted=str(trusted))
    out["content"] = {"steps": 10, "grace": content, "validation": {"n": 32, "salt": 7}}  # shares nothing with the trusted set
    out["opened"] = {"steps": 10, "grace": {**content, "start_step": -1, "run_dir": str(folder / "opened")}}
    out["clean_plain"] = {"steps": 10, "clean": True, "via": "deepspeed"}
    # The guard as it is by default, of a corpus in which there is nothing to leave out.
    watched = grace(guard={}, trusted=str(clean), run_dir=str(folder / "clean"))
    out["clean"] = {"steps": 10, "clean": True, "workers": 0, "grace": watched}
    weighing = {"steps": 8, "gas": 2, "batch": 16, "weights": True}
    out["weighed"] = {**weighing, "grace": grace(weights="inverse_probability", run_dir=str(folder / "weighed"))}
    out["not_weighed"] = {**weighing, "steps": 5, "grace": grace()}
    for kind in ("jsonl", "txt"):
        told = grace(recipe="content", trusted=str(folder / f"bare.{kind}"))
        out[f"bare_{kind}"] = {"steps": 5, "bare": True, "workers": 0, "tokenize": kind == "txt", "grace": told}
    out["not_tokenized"] = {"bare": True, "grace": grace(recipe="content", trusted=str(folder / "bare.txt"))}
    out |= {f"resume{k}": {**base, "load": saved, "load_tag": f"global_step{k}"} for k in SAVES}
    out |= {o: {"steps": 10, "grace": grace(selection={"objective": o})} for o in ("topk", "uniform", "rs2", "facility_location")}
    for stage, (module, name) in FAULTS.items():
        after = 1 if stage not in ("graph", "features") else 0
        more = {"features": {"enabled": True}} if stage != "features" else {}
        out[f"fault_{stage}"] = {
            "steps": 14,
            "grace": grace(**more, **({"window": 150} if stage == "features" else {})),
            "fault": {"module": module, "name": name, "rank": 1, "after": max(after, 1)},
        }
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def launched(folder: Path) -> tuple[Records, str]:
    return run_jobs(folder, jobs(folder), timeout=420)


@pytest.fixture(scope="module")
def records(launched: tuple[Records, str]) -> Records:
    return launched[0]


@pytest.mark.parametrize("name", ["disabled", "absent", "shadow"])
def test_same_batches_and_parameters_as_without_grace(records: Records, name: str) -> None:
    for with_us, without in zip(records[name], records["plain"], strict=True):
        for key in ("steps", "losses", "params"):
            assert with_us[key] == without[key]


def test_shadow_harvests_and_refreshes(records: Records) -> None:
    metrics = records["shadow"][0]["metrics"]
    assert metrics["refreshes"] == refreshes(12)
    assert sum(len(r["table"]) for r in records["shadow"]) > 20


def test_all_ranks_hold_the_same_schedules_and_parameters(records: Records) -> None:
    for name, (a, b) in records.items():
        if "error" not in a:
            assert a["params"] == b["params"], name
            assert a.get("schedules") == b.get("schedules"), name


def test_the_coreset_is_fresh_and_within_its_budget(records: Records) -> None:
    metrics = records["base"][0]["metrics"]
    assert metrics["refreshes"] == refreshes(STEPS)
    assert metrics["coreset_size"] == round(0.3 * SAMPLES)
    assert all(0 < c <= 1 for c in metrics["churn"])


def committed(records: list[dict[str, Any]]) -> dict[int, int]:
    """Sample → optimizer step of its row, over all ranks."""
    return {int(i): v for r in records for i, v in r["table"].items()}


def latest(steps: list[list[int]], which: Iterable[int]) -> dict[int, int]:
    """Sample → the last of the steps ``which``, counted from 0, that trained on it, as the engine counts it."""
    return {i: k + 1 for k in which for i in steps[k]}


@pytest.mark.parametrize("name", ["base", "peek", "skip", "evaluate", "filter", "workers0", "gas4"])
def test_what_is_committed_is_what_was_trained_on(records: Records, name: str) -> None:
    # The table holds what the last refresh has seen; the first step only sets the scale of the layers.
    last = records[name][0]["metrics"]["step"] // 4 * 4
    assert committed(records[name]) == latest(stream(records[name]), range(1, last))


def test_gradients_are_collected_on_a_share_of_the_steps_and_losses_are_read_on_all(records: Records) -> None:
    job = records["seldom"]
    steps = stream(job)
    assert committed(job) == latest(steps, range(3, 16, 2))  # every other one; the first of them sets the scale of the layers
    read = {int(i): v for r in job for i, v in r["seen"].items()}
    assert read == latest(steps, (k for k in range(16) if k != 1))
    assert job[0]["metrics"]["collected_rows"] == 7 * 8


def test_filtered_samples_are_never_trained_on(records: Records) -> None:
    assert all(i % 16 for step in stream(records["filter"]) for i in step)


@pytest.mark.parametrize("name", ["peek", "evaluate", "workers0", "undisturbed"])
def test_peeks_evaluation_workers_and_saving_do_not_change_the_first_schedule(records: Records, name: str) -> None:
    assert stream(records[name])[:2] == stream(records["base"])[:2]


@pytest.mark.parametrize("name", ["peek", "evaluate", "undisturbed"])
def test_nor_the_run(records: Records, name: str) -> None:
    assert stream(records[name]) == stream(records["base"])
    assert records[name][0]["params"] == records["base"][0]["params"]


def test_an_overflow_moves_the_cursor_and_commits_no_rows(records: Records) -> None:
    steps = stream(records["overflow"])
    assert records["overflow"][0]["metrics"]["cursor"] == STEPS * 8
    assert committed(records["overflow"]) == latest(steps, (k for k in range(1, 20) if k != 5))


@pytest.mark.parametrize("step", SAVES)
def test_resume_at_the_same_size_repeats_nothing_and_skips_nothing(records: Records, step: int) -> None:
    resumed, base = records[f"resume{step}"], records["base"]
    assert stream(resumed) == stream(base)[step:]
    assert resumed[0]["params"] == base[0]["params"]
    assert resumed[0]["schedules"] == base[0]["schedules"]


def test_grace_takes_over_a_checkpoint_without_its_state(records: Records) -> None:
    assert records["late"][0]["metrics"]["cursor"] == 12 * 8
    assert records["late"][0]["metrics"]["refreshes"] >= 2
    for rank in records["late_refused"]:
        assert "CheckpointError" in rank["error"]
        assert "on_missing_state" in rank["error"]


def test_uniform_outside_of_start_and_stop(records: Records, folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "run" / "refreshes.jsonl").read_text().splitlines()]
    kinds = [(line["step"], line["objective"]) for line in lines]
    assert kinds[0] == (0, "uniform")
    assert kinds[1] == (6, "sample")
    assert kinds[-1][1] == "uniform"
    assert kinds[-1][0] >= 14
    assert (folder / "run" / "grace_resolved.yaml").exists()


def test_trace_reads_back_what_was_trained_on(records: Records, folder: Path) -> None:
    from grace_ds.cli.trace import trace

    steps = stream(records["replay_source"])
    for step in (0, 7, 19):
        told = json.loads(trace(str(folder / "source"), step, as_json=True))
        assert sorted(s["id"] for s in told["samples"]) == steps[step]
    assert "explore" in "".join(trace(str(folder / "source"), s) for s in range(20))


def test_replay_feeds_the_recorded_stream(records: Records) -> None:
    assert stream(records["replay"]) == stream(records["replay_source"])
    assert records["replay"][0]["params"] == records["replay_source"][0]["params"]


def test_trusted_set_gives_alignments_and_a_unit(records: Records) -> None:
    for rank in records["trusted"]:
        assert rank["influence"] > 0.1
        assert len(rank["reference"]) >= 2  # one for each basis
        assert min(map(int, rank["reference"])) == 1  # fitted at step 2, when the layers' scale is known
        assert max(map(int, rank["reference"])) <= rank["metrics"]["version"]
        assert any(v > 0 for v in rank["reference"].values())
        assert all(v >= 0 for v in rank["reference"].values())
        assert rank["metrics"]["probe_samples"] > 0


def test_a_pattern_without_layers_is_an_error_on_every_rank(records: Records) -> None:
    for rank in records["wrong_layers"]:
        assert "nowhere" in rank["error"]


@pytest.mark.parametrize("objective", ["topk", "uniform", "rs2", "facility_location"])
def test_every_objective_trains(records: Records, objective: str) -> None:
    metrics = records[objective][0]["metrics"]
    assert metrics["refresh_failures"] == 0
    # Those that ask for no gradients have no warm-up in two halves.
    assert metrics["refreshes"] == refreshes(10) - (objective in ("uniform", "rs2"))


@pytest.mark.parametrize("stage", list(FAULTS))
def test_a_fault_on_one_rank_keeps_the_old_schedule_and_the_job(records: Records, stage: str) -> None:
    a, b = records[f"fault_{stage}"]
    assert "error" not in a
    for rank in (a, b):
        assert rank["metrics"]["refresh_failures"] == 1
        assert rank["metrics"]["refreshes"] == refreshes(14) - 1
        assert not rank["metrics"]["frozen"]
    assert a["schedules"] == b["schedules"]
    assert len(stream([a, b])) == 14


def test_nothing_is_lost_by_a_failed_refresh(records: Records) -> None:
    assert committed(records["fault_gather"]) == latest(stream(records["fault_gather"]), range(1, 12))


def test_recipe_content_hooks_and_harvests_nothing(records: Records) -> None:
    for rank, plain in zip(records["content"], records["plain"], strict=True):
        assert rank["layer_hooks"] == plain["layer_hooks"] < records["base"][0]["layer_hooks"]
        assert rank["table"] == rank["reference"] == rank["scale"] == {}
        m = rank["metrics"]
        assert (m["collect_seconds"], m["probe_samples"], m["events"]["anchors"], m["events"]["received"]) == (0, 0, 0, 0)
        assert not {"collect_seconds", "rows_dropped", "hook_failures"} & set(m["events"])
        assert m["events"]["guard/level"] == 2
        assert (m["refreshes"], m["refresh_failures"]) == (3, 0)  # at steps 0, 4 and 8: it has no warm-up
        assert {level for _, level in rank["levels"]} == {"content"}
    assert stream(records["content"]) != stream(records["uniform_recipe"])
    assert records["uniform_recipe"][0]["layer_hooks"] == records["plain"][0]["layer_hooks"]


def test_by_default_a_run_opens_on_the_pool_as_it_is_and_chooses_after_one_interval(records: Records, folder: Path) -> None:
    first, *rest = load_book(folder / "opened" / "schedules").schedules
    assert (first.meta["objective"], first.meta["guard"]["level"]) == ("uniform", "content")
    assert [s.meta["objective"] for s in rest] == ["sample"] * len(rest) and len(rest) >= 2
    assert stream(records["opened"])[:4] == stream(records["uniform_recipe"])[:4] != stream(records["content"])[:4]
    assert stream(records["opened"])[:4] == stream(records["plain"])[:4]


def test_a_clean_corpus_is_trained_on_in_uniform_order_and_no_gradient_is_collected(
    launched: tuple[Records, str], folder: Path
) -> None:
    records, said = launched
    assert stream(records["clean"]) == stream(records["clean_uniform"])
    assert records["clean"][0]["params"] == records["clean_uniform"][0]["params"]
    assert stream(records["clean"]) == stream(records["clean_plain"])  # each step holds what it would without GRACE
    (first, *rest) = load_book(folder / "clean" / "schedules").schedules
    assert len(rest) >= 2
    for schedule in (first, *rest):
        assert schedule.meta["guard"]["level"] == schedule.meta["objective"] == "uniform"
        assert schedule.meta["guard"]["effective_share"] >= 0.8
    assert first.meta["decided_at_step"] == 0
    assert f"schedule 0: uniform: {first.meta['guard']['reason']}" in said
    assert "the window is clean" in first.meta["guard"]["reason"]
    for rank in records["clean"]:
        assert (rank["metrics"]["collected_rows"], rank["table"]) == (0, {})
        assert rank["metrics"]["events"]["guard/level"] == 0 and rank["metrics"]["events"]["guard/loss_share"] >= 0.8


def test_sample_weights_are_those_of_the_slots_that_are_trained_on(records: Records, folder: Path) -> None:
    book = load_book(folder / "weighed" / "schedules")
    found: set[float] = set()
    for step in range(8):
        slots = book.slots(16 * step, 16)
        ours = [pair for rank in records["weighed"] for pair in rank["weights"][step]]
        assert sorted(map(tuple, ours)) == sorted(zip(slots.ids.tolist(), slots.weights.tolist(), strict=True))
        for rank in records["weighed"]:
            assert [i for i, _ in rank["weights"][step]] == rank["steps"][step]
            found |= {w for _, w in rank["weights"][step]}
    assert len(found) > 5


def test_without_being_asked_for_all_weights_are_one(records: Records) -> None:
    for rank in records["not_weighed"]:
        assert {w for step in rank["weights"] for _, w in step} == {1.0}
        assert [len(step) for step in rank["weights"]] == [8] * 5


@pytest.mark.parametrize("name", ["weighed", "not_weighed"])
def test_sample_weights_before_the_first_forward_are_an_error(records: Records, name: str) -> None:
    for rank in records[name]:
        assert rank["too_early"].startswith("ConfigError: sample_weights() was called before the first training forward")
        assert "call it inside or after one" in rank["too_early"]


def test_a_trusted_sample_in_the_validation_set_is_an_error_on_every_rank(records: Records) -> None:
    for rank in records["overlap"]:
        assert rank["error"].startswith("DataError: trusted sample 0 is validation sample 0: ")
        assert "take it out of one of the two" in rank["error"]


def test_a_trusted_file_of_text_is_cut_into_samples_by_the_jobs_tokeniser(records: Records) -> None:
    assert records["bare_txt"][0]["schedules"] == records["bare_jsonl"][0]["schedules"]
    assert records["bare_txt"][0]["params"] == records["bare_jsonl"][0]["params"]
    assert {level for _, level in records["bare_txt"][0]["levels"]} == {"content"}
    for rank in records["not_tokenized"]:
        assert rank["error"].startswith("DataError: ")
        assert "tokenize" in rank["error"]


def test_corpus_is_as_the_job_says() -> None:
    assert Corpus()[5]["input_ids"].shape == (LENGTH,)
