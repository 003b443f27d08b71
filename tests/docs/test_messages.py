"""Every error message of ours says what to do, by itself or in docs/cures.yaml, and stands in one place of the page."""

from __future__ import annotations

import sys

import pytest

from tests.docs.blocks import ROOT

sys.path.insert(0, str(ROOT / "docs" / "_ext"))

import messages

EVERY = messages.messages()
WRITTEN = messages.cures()


def test_there_are_messages_and_known_ones_are_among_them() -> None:
    assert len(EVERY) > 200
    texts = {(m.kind, m.text) for m in EVERY}
    assert ("DataError", "the dataset is empty: there is nothing to select from") in texts
    assert any(kind == "exit" and text.startswith("usage: launch/mpirun.sh RANKS") for kind, text in texts)
    assert any(text.startswith("refresh given up: rank(s)") for _, text in texts)


@pytest.mark.parametrize("message", EVERY, ids=lambda m: f"{m.file}:{m.line}")
def test_a_message_says_its_cure(message: messages.Message) -> None:
    cure = messages.cure_of(message, WRITTEN["cures"])
    assert cure, f"{message.text!r} ({message.kind}) says no cure: say it there, or in docs/cures.yaml"


@pytest.mark.parametrize("message", EVERY, ids=lambda m: f"{m.file}:{m.line}")
def test_a_message_belongs_to_an_area(message: messages.Message) -> None:
    assert messages.area_of(message, WRITTEN["areas"]), f"name {message.file} under an area of docs/cures.yaml"


def test_no_cure_is_written_for_a_message_that_is_gone() -> None:
    for start in WRITTEN["cures"]:
        assert any(m.text.startswith(start) for m in EVERY), f"docs/cures.yaml: nothing begins with {start!r} any more"
