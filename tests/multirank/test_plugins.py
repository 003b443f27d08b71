"""A recipe, an objective, a graph back end, a transport and a layer rule from outside of the package, by the config alone."""

from __future__ import annotations

from typing import Any

import pytest

from tests.multirank.launch import COLLECTING, Records, run_jobs, stream
from tests.multirank.toy import SAMPLES

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(300)]

PLUGIN = {"plugins": ["tests.multirank.plugin"]}
CHOSEN_ALONE = {"explore": 0.0, "audit": 0.0}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Records, str]:
    def grace(**more: Any) -> dict[str, Any]:
        return {"steps": 8, "grace": {**COLLECTING, **PLUGIN, **more}}

    return run_jobs(
        tmp_path_factory.mktemp("plugins"),
        {
            "recipe": grace(recipe="evens", selection=CHOSEN_ALONE),
            "objective": grace(selection={**CHOSEN_ALONE, "objective": "newest"}, graph={"backend": "dense"}, comm="named"),
            "transport": grace(comm="upside-down"),
            "absent": grace(plugins=["no_such_module"]),
            "unknown": grace(plugins=[], recipe="nobodys"),
        },
    )


def test_a_recipe_weighs(jobs: tuple[Records, str]) -> None:
    ids = {i for step in stream(jobs[0]["recipe"]) for i in step}
    assert ids and all(i % 2 == 0 for i in ids)


def test_an_objective_draws_along_with_a_back_end_a_transport_and_a_rule(jobs: tuple[Records, str]) -> None:
    records, output = jobs
    ids = {i for step in stream(records["objective"]) for i in step}
    coreset = records["objective"][0]["metrics"]["coreset_size"]
    assert ids <= set(range(SAMPLES - coreset, SAMPLES)) and records["objective"][0]["metrics"]["refresh_failures"] == 0
    assert all(rank["comm"] == "named" for rank in records["objective"])
    assert "dense: " in output and "own rule" in output


def test_what_does_not_fit_is_refused_on_every_rank(jobs: tuple[Records, str]) -> None:
    for rank in jobs[0]["transport"]:
        assert "TransportError: comm: upside-down cannot be used: rank 0 is 1 of 2 in it, and 0 of 2 in the job" in rank["error"]
    for rank in jobs[0]["absent"]:
        assert "plugins: 'no_such_module' cannot be imported (ModuleNotFoundError" in rank["error"]
    for rank in jobs[0]["unknown"]:
        assert "recipe = 'nobodys'; it must be one of auto, " in rank["error"]
