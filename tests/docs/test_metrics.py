"""docs/metrics.md names every metric that jobs tell, and none that does not exist."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from grace_ds.monitor.metrics import Metrics
from tests.docs.blocks import ROOT
from tests.multirank.launch import COLLECTING, Records, run_jobs

# Where names of events are written down.
SOURCES = (
    "monitor/metrics.py",
    "integrations/step_watch.py",
    "integrations/controller.py",
    "refresh/runner.py",
    "refresh/line.py",
)


def named(heading: str) -> set[str]:
    """The names in the first column of the table under a heading of the page; of ``A/NAME`` all that are said beside it."""
    text = (ROOT / "docs" / "metrics.md").read_text("utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    found: set[str] = set()
    for line in text.splitlines():
        if line.startswith("| `"):
            names, _, meaning = (cell.strip() for cell in line.strip("|").split(" | "))
            for name in re.findall(r"`([^`]+)`", names):
                parts = re.findall(r"`([^`]+)`", meaning) if name.endswith("/NAME") else [""]
                found |= {name.replace("NAME", part) for part in parts}
    return found


EVENTS, KEYS = named("`Grace/*` in the monitor"), named("`engine.grace_ds.metrics`")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    folder = tmp_path_factory.mktemp("metrics")
    # Plenty of audit slots, a guard that does not call the toy clean, and a run_dir: whatever is told is told by one of them.
    grace = {
        **COLLECTING,
        "guard": {"clean_share": 1.0},
        "selection": {"audit": 0.3},
        "run_dir": str(folder / "a"),
    }
    jobs: dict[str, Any] = {
        "grace": {"steps": 14, "grace": grace},
        "content": {"steps": 6, "grace": {**COLLECTING, "recipe": "content", "pseudo_trusted": True}},
    }
    return run_jobs(folder, jobs, timeout=200)[0]


@pytest.mark.multirank
@pytest.mark.timeout(260)
def test_what_jobs_tell_is_on_the_page(records: Records) -> None:
    told = {name for ranks in records.values() for rank in ranks for name in rank["metrics"]["events"]}
    assert told <= EVENTS, f"docs/metrics.md lacks {sorted(told - EVENTS)}"
    assert len(told) > 20
    for ranks in records.values():
        assert set(ranks[0]["metrics"]) == KEYS


def test_the_page_names_nothing_that_is_not_there() -> None:
    strings = {
        node.value
        for source in SOURCES
        for node in ast.walk(ast.parse(Path(ROOT / "grace_ds" / source).read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    for name in EVENTS:
        assert name in strings or name.rpartition("/")[2] in strings, f"docs/metrics.md: no event {name}"
    assert {f.name for f in dataclasses.fields(Metrics)} <= KEYS
    assert {key for key in KEYS if key not in strings and key not in {f.name for f in dataclasses.fields(Metrics)}} == set()
