"""What ``recipe: auto`` becomes: the most that the job's model allows."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from grace_ds.config.load import load_config
from grace_ds.errors import ConfigError
from grace_ds.integrations.setup import settled
from grace_ds.integrations.shared_model import sketcher_of
from tests.multirank.toy import Model

UNREADABLE = nn.Sequential(nn.Embedding(20, 8), nn.LayerNorm(8))  # no layer of a kind that gradients can be read from


def of(module: nn.Module, **block: Any) -> tuple[str, list[str], int]:
    """The recipe, what it does without, and how many layers are sketched."""
    engine = SimpleNamespace(module=module, dp_world_size=1)
    config, sketcher = settled(load_config(block), lambda config: sketcher_of(config, engine))
    return config.recipe, list(config.ablate), 0 if sketcher is None else len(sketcher.layers)


def test_auto_is_grace_where_gradients_can_be_read_and_content_where_they_cannot(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "grace_ds"):
        found = of(Model())
        assert found[:2] == ("grace", []) and found[2] > 0 and found == of(Model(), recipe="grace")
        assert "recipe: grace" in caplog.text
        caplog.clear()
        assert of(UNREADABLE) == ("content", [], 0)
        assert of(UNREADABLE, ablate=["graph"]) == ("content", [], 0)  # which has no graph to do without
    assert "recipe: auto is content here" in caplog.text and "no layer to sketch" in caplog.text


def test_what_was_asked_for_by_name_is_not_replaced() -> None:
    for block in ({"recipe": "grace"}, {"collect": {"layers": ["1"]}}, {"recipe": "grace", "ablate": ["gradients"]}):
        with pytest.raises(ConfigError, match=r"layer"):
            of(UNREADABLE, **block)
    assert of(Model(), collect={"layers": ["blocks.0.*"]}) == ("grace", [], 2)


@pytest.mark.parametrize(
    "block",
    [
        {"recipe": "content"},
        {"recipe": "uniform"},
        {"ablate": ["gradients", "loss"]},
        {"selection": {"objective": "rs2"}},
        {"replay": "somewhere"},
    ],
)
def test_where_nothing_is_collected_no_layer_is_looked_at(block: dict[str, Any]) -> None:
    found = of(UNREADABLE, **block)
    assert found == (block.get("recipe", "grace"), block.get("ablate", []), 0)
