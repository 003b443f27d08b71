"""The page of what has been tried tells what the tests have on record, of exactly the jobs that they run."""

from __future__ import annotations

import json

from tests.multirank.cells import RECIPE, RECORD, chosen
from tests.multirank.modes import MODES
from tests.multirank.support_page import PAGE, page


def test_the_record_holds_the_jobs_that_are_run() -> None:
    record = json.loads(RECORD.read_text())
    assert list(record["matrix"]) == [cell.name for cell in chosen()]
    assert list(record["modes"]) == [f"{name}, {recipe}" for name in MODES for recipe in RECIPE]


def test_the_page_holds_the_record() -> None:
    """After a change: ``python -m tests.multirank.support_page``."""
    text = PAGE.read_text()
    assert page(text) == text
