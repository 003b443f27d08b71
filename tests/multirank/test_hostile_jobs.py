"""Every form of a job in :mod:`tests.multirank.forms`, on two ranks: right ids or a refusal, never silent, never a hang."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.multirank.forms import COLLECTED, COUNTED, FED, FORMS, LEFT_OUT, REFUSED, Form
from tests.multirank.harness import run_command
from tests.multirank.launch import environment, free_port

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(600)]

Told = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[Told]:
    """What every form came to, by rank."""
    folder = tmp_path_factory.mktemp("forms")
    (folder / "saved").mkdir()
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--hostfile", "/dev/null", "--num_accelerators", "2"]
    script = ["--module", "tests.multirank.forms", str(folder), str(folder)]
    run_command([*launcher, "--master_port", str(free_port()), *script], timeout=580, env=environment(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_there_are_forty_forms_or_more() -> None:
    assert len(FORMS) >= 40 and len({form.name for form in FORMS}) == len(FORMS)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_job_of_this_form(told: list[Told], form: Form) -> None:
    ranks = [rank[form.name] for rank in told]
    for rank in ranks:
        found, error = rank["found"], rank["error"]
        if form.outcome == REFUSED:
            assert error and not error.startswith("not ours") and form.words in error
            continue
        assert not error
        assert found["cursor"] == found["expected"], "the position moves by what was trained on"
        assert form.words in ranks[0]["log"]
        if form.outcome in (COLLECTED, LEFT_OUT):
            assert found["right"] and not found["wrong"]
            assert found["rows"] or found.get("recipe") == "content"
        if form.outcome == COLLECTED:
            assert not found["unbound"] and not found["slips"] and not found["mismatches"]
        if form.outcome in (COUNTED, FED):
            assert not found["right"] and not found["rows"]
        if form.outcome == COUNTED:
            assert found["unbound"]
        assert found["failures"] == found.get("gave_up", found["failures"])
    assert ranks[0]["found"].get("cursor") == ranks[1]["found"].get("cursor")
    assert bool(ranks[0]["error"]) == bool(ranks[1]["error"])


def test_each_of_two_engines_has_its_own_ids(told: list[Told]) -> None:
    for rank in told:
        other = rank["engine_two"]["found"]["other"]
        assert other["right"] and not other["wrong"] and other["cursor"] == other["expected"]


def test_compiled_modules_are_collected_from_on_the_steps_that_are_to_be_collected(told: list[Told]) -> None:
    plain = told[0]["output_tensor"]["found"]["rows"]
    for name in ("engine_compiled", "engine_of_compiled", "engine_compiled_in_place"):
        assert told[0][name]["found"]["rows"] == plain
