"""The reference says what the schema says, of every key, and the page in docs/ is the one of today."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grace_ds.cli.main import main
from grace_ds.config.load import load_config
from grace_ds.config.reference import keys
from grace_ds.config.schema import GraceConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "config.md"


def test_every_key_can_be_set_to_its_default_and_has_a_meaning() -> None:
    every = list(keys())
    assert len({k.path for k in every}) == len(every) > 50
    for key in every:
        assert key.meaning, f"{key.path} has no comment in the schema"
        assert load_config({}, dotlist=[f"{key.path}={key.default}"]) == GraceConfig(), key.path


def test_every_key_is_there() -> None:
    tree = json.loads(json.dumps(GraceConfig(), default=vars))
    flat = {f"{k}.{n}" for k, v in tree.items() if isinstance(v, dict) for n in v} | {
        k for k, v in tree.items() if not isinstance(v, dict)
    }
    assert {k.path for k in keys()} == flat


def test_the_page_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--markdown"]) == 0
    assert PAGE.read_text() == capsys.readouterr().out, "run: grace-ds config --markdown > docs/config.md"
    assert main(["config"]) == 0
    assert "refresh.interval_steps" in capsys.readouterr().out
