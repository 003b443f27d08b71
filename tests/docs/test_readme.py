"""The README stays short, and its figures and its picture are those of the records."""

from __future__ import annotations

import json
import re
import sys

from tests.docs.blocks import ROOT

sys.path.insert(0, str(ROOT / "docs" / "_ext"))

import loss_curves

README = (ROOT / "README.md").read_text("utf-8")
MEASURED = (ROOT / "docs" / "measured.md").read_text("utf-8")


def test_it_has_at_most_150_lines() -> None:
    assert len(README.splitlines()) <= 150


def test_its_figures_are_those_of_the_page_of_figures() -> None:
    figures = re.findall(r"[−+]?\d+\.\d+ ± \d+\.\d+(?: \(\d\.\d\d\))?", README)
    assert len(figures) > 20
    for figure in figures:
        assert figure in MEASURED, f"docs/measured.md has no {figure}"


def test_its_picture_is_drawn_from_the_record() -> None:
    drawn = loss_curves.PICTURE.read_text("utf-8")
    assert loss_curves.digest() in drawn, "the record has changed: run python docs/_ext/loss_curves.py"
    assert f"({loss_curves.PICTURE.relative_to(ROOT)})" in README


def test_what_is_said_of_the_picture_is_what_the_record_holds() -> None:
    record = json.loads(loss_curves.RECORD.read_text("utf-8"))
    told = {row["arm"]: row["test"] for row in record["rows"]["crawl, 400 steps"]}
    for arm in loss_curves.ARMS:
        steps, losses = loss_curves.curves(record, arm)
        assert steps[-1] == loss_curves.STEPS
        assert [len(row) for row in losses] == [3] * len(steps)
        mean = sum(losses[-1]) / 3
        assert abs(mean - told[arm]) < 1e-9
        assert f"ends at {mean:.3f}" in README or f"with GRACE at {mean:.3f}" in README
