"""Real ZeRO jobs that call their model in ways of their own: a probe makes the same call, or is not made at all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.multirank.harness import RanksFailed
from tests.multirank.launch import COLLECTING, Records, run_jobs, stream
from tests.multirank.toy import VOCAB, Corpus

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(280)]

STEPS = 9
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def ids_alone(file: Path) -> str:
    """The same trusted file with token ids alone."""
    file.write_text("\n".join(json.dumps({"input_ids": row.tolist()}) for row in Corpus(64, salt=3).tokens))
    return str(file)


def written(file: Path, row: int = 5, token: int | None = None, short: int | None = None) -> str:
    """A trusted file; one row has another ``token``, one is cut ``short``, where asked for."""
    rows = [{"input_ids": tokens.tolist(), "sid": [0]} for tokens in Corpus(64, salt=3).tokens]
    if token is not None:
        rows[row]["input_ids"][3] = token
    if short is not None:
        rows[row]["input_ids"] = rows[row]["input_ids"][:short]
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calls")


@pytest.fixture(scope="module")
def launched(folder: Path) -> tuple[Records, str]:
    grace = {**COLLECTING, "trusted": written(folder / "trusted.jsonl")}
    auto = {**grace, "recipe": "auto", "run_dir": str(folder / "run")}
    base: dict[str, Any] = {"steps": STEPS, "bf16": False, "workers": 0, "grace": grace}
    jobs = {
        "whole": base,
        "cuts": {**base, "call": []},
        "copies": {**base, "call": "copies"},
        "made": {**base, "call": [0, 1]},
        "made_on_one": {**base, "call": [1]},
        "made_loss_fn": {**base, "call": [0, 1], "loss_fn": {}},
        "made_auto": {**base, "call": [0, 1], "grace": auto},
        "ids_content": {**base, "grace": {**grace, "recipe": "content", "trusted": ids_alone(folder / "ids.jsonl")}},
        "named_content": {**base, "grace": {**grace, "recipe": "content"}},
        "ids_grace": {**base, "grace": {**grace, "trusted": str(folder / "ids.jsonl")}},
        "mixed": {**base, "grace": {**grace, "trusted": written(folder / "mixed.jsonl", short=7)}},
        "beyond": {**base, "grace": {**grace, "trusted": written(folder / "beyond.jsonl", token=VOCAB + 7)}},
        "beyond_zero3": {**base, "ds": ZERO3, "grace": {**grace, "trusted": str(folder / "beyond.jsonl")}},
    }
    return run_jobs(folder, jobs, timeout=200)


@pytest.fixture(scope="module")
def records(launched: tuple[Records, str]) -> Records:
    return launched[0]


@pytest.mark.parametrize("name", ["cuts", "copies"])
def test_tokens_and_targets_that_the_job_cuts_are_probed_as_the_whole_batch_is(records: Records, name: str) -> None:
    for rank, whole in zip(records[name], records["whole"], strict=True):
        assert rank["reference"] == whole["reference"] and len(rank["reference"]) >= 2
        assert rank["schedules"] == whole["schedules"] and rank["params"] == whole["params"]
        assert rank["metrics"]["probe_samples"] == whole["metrics"]["probe_samples"] > 0


@pytest.mark.parametrize("name", ["made", "made_on_one"])
def test_a_call_that_cannot_be_repeated_is_an_error_on_every_rank(records: Records, name: str) -> None:
    for rank in records[name]:
        assert rank["error"].startswith("ConfigError: recipe: grace has its probes repeat the job's call of its model")
        assert "argument 1, a tensor of shape (4, 16) with a row for each sample" in rank["error"]
        assert f"(rank {0 if name == 'made' else 1})" in rank["error"]
        assert "loss_fn=lambda module, batch" in rank["error"] and "recipe: content" in rank["error"]


def test_a_loss_fn_stands_in_for_such_a_call(records: Records) -> None:
    for rank in records["made_loss_fn"]:
        assert len(rank["reference"]) >= 2 and rank["metrics"]["refresh_failures"] == 0


def test_recipe_auto_goes_on_by_content_and_says_so_once(launched: tuple[Records, str], folder: Path) -> None:
    records, said = launched
    for rank in records["made_auto"]:
        assert rank["reference"] == rank["table"] == rank["seen"] == rank["scale"] == {}
        assert rank["layer_hooks"] < records["whole"][0]["layer_hooks"]
        assert (rank["metrics"]["refresh_failures"], rank["metrics"]["probe_samples"]) == (0, 0)
        assert rank["levels"][-1][1] == "content"
    assert len(stream(records["made_auto"])) == STEPS
    assert records["made_auto"][0]["schedules"] == records["made_auto"][1]["schedules"]
    assert len(re.findall(r"recipe: auto goes on as content: .*argument 1, .*pass loss_fn", said)) == 1
    assert "recipe: content" in (folder / "run" / "grace_resolved.yaml").read_text()


@pytest.mark.parametrize("name", ["beyond", "beyond_zero3"])
def test_a_trusted_token_that_the_model_has_no_embedding_for_is_an_error_on_every_rank(records: Records, name: str) -> None:
    for rank in records[name]:
        assert (
            f"DataError: trusted sample 5 holds token id {VOCAB + 7}, and the model's embedding has {VOCAB} rows" in rank["error"]
        )
        assert "resize the embedding" in rank["error"]


def test_trusted_token_ids_serve_a_job_whose_items_hold_more_where_only_text_is_read(records: Records) -> None:
    for rank, named in zip(records["ids_content"], records["named_content"], strict=True):
        assert rank["schedules"] == named["schedules"] and rank["params"] == named["params"]
    for rank in records["ids_grace"]:
        assert rank["error"].startswith("DataError: ") and "lacks ['sid']" in rank["error"]
        assert "trusted_data" in rank["error"] and "recipe: content" in rank["error"]


def test_trusted_samples_that_the_jobs_collate_cannot_join_are_an_error_on_every_rank(records: Records) -> None:
    for rank in records["mixed"]:
        assert "cannot join trusted samples (sample: tokens) 5: 7, 0: 17" in rank["error"]


def test_an_error_inside_of_a_zero3_probe_ends_the_job_at_once(folder: Path) -> None:
    """One rank raises where the other goes on to a gather, of which the job's own limit is half an hour."""
    grace = {**COLLECTING, "trusted": written(folder / "trusted3.jsonl")}
    job = {"steps": STEPS, "bf16": False, "workers": 0, "ds": ZERO3, "grace": grace, "loss_fn": {"rank": 1, "after": 2}}
    with pytest.raises(RanksFailed) as failed:
        run_jobs(folder / "zero3", {"fatal": {**job, "uncaught": True}}, launcher="deepspeed", timeout=110)
    said = str(failed.value)
    assert "did not finish" not in said
    assert "ProbeFailed: a probe failed under ZeRO-3 (RuntimeError: injected fault)" in said
    assert "failed on this rank" not in said and "training goes on" not in said
