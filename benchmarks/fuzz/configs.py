"""Configs: whole DeepSpeed configs in JSON, and blocks in YAML, mutated by bytes or built with one thing changed.

Text has no checksum, so a change may be meant.  Accepted is right if every value is taken for what the text says: of the same
type, under the key that it stands under, and with nothing from the environment that the block does not ask for.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import hjson
import yaml
from hypothesis import strategies as st
from omegaconf import OmegaConf

from benchmarks.fuzz.mutate import mutated
from benchmarks.fuzz.target import SAME, SILENT, TAKEN, Target
from grace_ds.config.load import find_block, load_config, read_ds_config, refuse_curriculum
from grace_ds.config.schema import GraceConfig

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
TEXT_KEYS = ("trusted", "run_dir", "replay", "tokenizer", "mode", "comm")


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
def one_changed(draw: st.DrawFn) -> dict[str, Any]:
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


@st.composite
def bomb(draw: st.DrawFn) -> bytes:
    """A YAML block that is small, and large once its aliases, interpolations or brackets are followed."""
    wide, deep = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    how = draw(st.sampled_from(["aliases", "interpolations", "brackets", "itself", "call"]))
    if how == "aliases":
        lines = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * wide)}]" for i in range(1, deep))]
    elif how == "interpolations":
        keys = TEXT_KEYS[: max(deep // 2, 1)]
        lines = [f"{a}: '{('${' + b + '}') * wide}'" for a, b in zip(keys, (*keys[1:], "seed"), strict=True)]
    elif how == "brackets":
        lines = ["ablate: " + "[" * 4 ** min(deep, 7)]
    elif how == "itself":
        lines = ["collect: &a {layers: *a}" if wide % 2 else "ablate: &a [*a]"]
    else:
        names = ["oc.env:HOME", "oc.decode:'${oc.env:HOME}'", "oc.${mode}:HOME", "oc.create:'a'", " oc.env :HOME"]
        name = draw(st.sampled_from(names))
        lines = [f'run_dir: "x${{{name}}}"', "mode: env"]
    return "\n".join(lines).encode()


def as_written(value: Any, resolved: Any) -> bool:
    """Whether a value was taken for what it says: not only equal, for 1 is equal to true."""
    if dataclasses.is_dataclass(resolved):
        return all(as_written(v, getattr(resolved, k)) for k, v in value.items())
    meant = {"${budget}": BLOCK["budget"], "${oc.env:HOME}": os.environ.get("HOME")}
    if isinstance(value, str) and value in meant:
        return bool(resolved in (meant[value], str(meant[value])))
    if isinstance(value, str) and "${" in value:  # what it stands for is checked by the types alone
        return True
    if isinstance(value, list) and isinstance(resolved, list):
        return len(value) == len(resolved) and all(as_written(a, b) for a, b in zip(value, resolved, strict=True))
    number = {type(value), type(resolved)} == {int, float}  # DeepSpeed's reader of JSON makes 60 of 60.0
    return (number or isinstance(resolved, type(value))) and bool(value == resolved)


def asks_for(block: dict[str, Any]) -> bool:
    """Whether the environment is read only if the block asks for it."""
    asked = block.get("resolvers") or []
    return "oc.env:" not in json.dumps(block, default=str).replace(" ", "") or "oc.env" in asked


def resolve(path: Path) -> GraceConfig | None:
    """As ``initialize`` reads it."""
    given = read_ds_config(path)
    found = find_block(given)
    if found is None:
        return None
    config = load_config(found[1], found[0])
    refuse_curriculum(given)
    return config


def targets(folder: Path) -> list[Target]:
    """The two forms of a config; files go into ``folder``."""
    in_json, in_yaml = folder / "ds.json", folder / "block.yaml"
    whole, block = json.dumps(WHOLE, indent=1).encode(), yaml.safe_dump(BLOCK, sort_keys=False).encode()

    def judge_json(value: Any) -> str:
        text = value if isinstance(value, bytes) else json.dumps(value).encode()
        in_json.write_bytes(text)
        resolved = resolve(in_json)
        try:
            says = json.loads(text)
        except ValueError:  # with comments, say: by the reader that DeepSpeed has
            says = hjson.loads(text.decode())
        found = find_block(says)
        if found is None or resolved is None:
            return TAKEN if found is None and resolved is None else SILENT
        same = found[1] == BLOCK
        return (SAME if same else TAKEN) if as_written(found[1], resolved) and asks_for(found[1]) else SILENT

    def judge_yaml(value: bytes) -> str:
        in_yaml.write_bytes(value)
        resolved = load_config({"file": str(in_yaml)})
        says: Any = OmegaConf.to_container(OmegaConf.create(value.decode()), resolve=False)
        return (SAME if says == BLOCK else TAKEN) if as_written(says, resolved) and asks_for(says) else SILENT

    return [
        Target("config, JSON", 0.03, lambda rng: mutated(whole, rng), judge_json, one_changed(), 0.5),
        Target("config, YAML", 0.03, lambda rng: mutated(block, rng), judge_yaml, bomb(), 0.3),
    ]
