"""Two thousand DeepSpeed configs, each valid until one thing in it was changed: an error of ours, or just what was written."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import hjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grace_ds.config.load import find_block, load_config, read_ds_config, refuse_curriculum
from grace_ds.config.schema import GraceConfig
from grace_ds.errors import ConfigError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

BLOCK: dict[str, Any] = {
    "enabled": True,
    "recipe": "grace",
    "ablate": ["loss"],
    "budget": 0.3,
    "seed": 7,
    "start_step": 10,
    "stop_step": 900,
    "trusted": "trusted.jsonl",
    "run_dir": "runs/a",
    "resolvers": ["oc.env"],
    "refresh": {"interval_steps": 20, "cadence": "fixed", "timeout_seconds": 30.0},
    "collect": {"layers": ["blocks.*"], "exclude": [], "share": 0.5, "dim": 64},
    "features": {"enabled": True, "dim": 32},
    "graph": {"k": 9, "recall": 0.9, "hops": 3},
    "selection": {"objective": "sample", "explore": 0.1, "audit": 0.05},
    "guard": {"enabled": False, "confidence": 0.9},
    "checkpoint": {"on_missing_state": "error"},
}
WHOLE: dict[str, Any] = {
    "train_batch_size": 8,
    "zero_optimization": {"stage": 2},
    "data_efficiency": {"enabled": True, "data_sampling": {"enabled": True, "grace": BLOCK}},
}
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 3),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(["???", "${budget}", "${nowhere}", "${oc.env:HOME}", "true", "1e3", "0x10", "nan", "inf", "-1", "1_0", ""]),
    st.lists(st.one_of(st.integers(), st.text(max_size=3), st.none()), max_size=3),
    st.dictionaries(st.sampled_from(["enabled", "dim", "x"]), st.one_of(st.integers(), st.none()), max_size=2),
)


def places(node: Any, at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of every key."""
    found = []
    for key, value in node.items():
        found.append((*at, key))
        if isinstance(value, dict):
            found += places(value, (*at, key))
    return found


def holder(config: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for key in path[:-1]:
        config = config[key]
    return config


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """WHOLE with one change: a value, a key's name, a key added, dropped or moved."""
    config = copy.deepcopy(WHOLE)
    ours = [path for path in places(config) if path[:1] == ("data_efficiency",)]
    path = draw(st.sampled_from(ours))
    parent, key = holder(config, path), path[-1]
    how = draw(st.sampled_from(["value"] * 5 + ["rename", "drop", "add", "move", "nest"]))
    if how == "value":
        parent[key] = draw(ODD)
    elif how == "rename":
        at = draw(st.integers(0, len(key)))
        parent[key[:at] + draw(st.text("abcdefgh_.$ ", max_size=2)) + key[at + draw(st.integers(0, 1)) :]] = parent.pop(key)
    elif how == "drop":
        del parent[key]
    elif how == "add":
        parent[draw(st.sampled_from([*GraceConfig.__dataclass_fields__, "budjet", "", "a.b", "file", "grace_ds"]))] = draw(ODD)
    elif how == "move":
        holder(config, draw(st.sampled_from(places(config))))[key] = copy.deepcopy(parent[key])
    else:
        parent[key] = {key: parent[key]}
    return config


def resolve(path: Path) -> GraceConfig | None:
    """As ``initialize`` reads it."""
    given_config = read_ds_config(path)
    found = find_block(given_config)
    if found is None:
        return None
    config = load_config(found[1], found[0])
    refuse_curriculum(given_config)
    return config


MEANT = {"${budget}": BLOCK["budget"], "${oc.env:HOME}": os.environ.get("HOME")}


def as_written(value: Any, resolved: Any) -> bool:
    """Whether a value was taken for what it says: not only equal, for 1 is equal to true."""
    if dataclasses.is_dataclass(resolved):
        return all(as_written(v, getattr(resolved, k)) for k, v in value.items())
    if isinstance(value, str) and value in MEANT:
        return bool(resolved in (MEANT[value], str(MEANT[value])))
    number = type(value) is int and type(resolved) is float
    return (number or type(value) is type(resolved)) and bool(value == resolved)


def test_the_config_that_nothing_was_changed_in_is_taken_at_its_word(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(WHOLE))
    resolved = resolve(tmp_path / "ds.json")
    assert resolved is not None and as_written(BLOCK, resolved)


@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutated())
def test_a_mutated_config_is_refused_by_our_error_or_taken_at_its_word(config: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ds.json"
        path.write_text(json.dumps(config))
        try:
            resolved = resolve(path)
        except ConfigError as error:
            assert len(str(error)) > 20
            return
        found = find_block(hjson.loads(path.read_text()))
        assert (found is None) == (resolved is None)
        if found is not None:
            assert resolved is not None and as_written(found[1], resolved)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_file_with_bytes_changed_is_read_or_refused_by_our_error(data: st.DataObject) -> None:
    text = bytearray(json.dumps(WHOLE, indent=1).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(text)), st.integers(0, len(text))))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ds.json"
        path.write_bytes(bytes(text[:cut]))
        try:
            resolve(path)
        except ConfigError as error:
            assert len(str(error)) > 20
