"""The walks of docs/architecture.md name functions that are there; its table names every folder, in the order of the layers."""

from __future__ import annotations

import ast
import re
import sys

import pytest

from tests.docs.blocks import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
STEPS = re.findall(r"`([\w/]+\.py):([\w.]+)`", PAGE)


@pytest.mark.parametrize(("path", "name"), STEPS, ids=[f"{path}:{name}" for path, name in STEPS])
def test_a_step_of_a_walk_is_there(path: str, name: str) -> None:
    body = ast.parse((ROOT / "grace_ds" / path).read_text("utf-8")).body
    for part in name.split("."):
        found = [node for node in body if getattr(node, "name", None) == part]
        assert found, f"{part} is not in {path}"
        body = getattr(found[0], "body", [])


def test_the_table_names_every_folder_in_the_order_of_the_layers() -> None:
    rows = PAGE.split("| --- | --- | --- |\n")[1].split("\n\n")[0].splitlines()
    names = [name for row in rows for name in re.findall(r"`(\w+)(?:/|\.py)`", row.split(" | ")[0])]
    there = {p.stem for p in (ROOT / "grace_ds").iterdir() if not p.name.startswith("_") and (p.is_dir() or p.suffix == ".py")}
    assert set(names) == there
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"][0]["layers"]
    depth = {name: i for i, layer in enumerate(layers) for name in re.findall(r"\w+", layer)}
    assert [depth[name] for name in names] == sorted(depth[name] for name in names)
