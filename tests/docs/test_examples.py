"""What the documentation shows works: what can be run is run, in real processes, and the rest is at least well-formed."""

from __future__ import annotations

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from grace_ds.config.load import find_block, load_config
from tests.docs.blocks import LANGUAGES, ROOT, Block, blocks, every_block, pages
from tests.multirank.harness import run_command

BLOCKS = every_block()
JOB_SECONDS = 400.0  # hard limit of one block


def of(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


def test_every_block_says_what_it_is() -> None:
    for block in BLOCKS:
        assert block.language in LANGUAGES, f"{block}: the fence needs a language among {LANGUAGES}"
        if block.language == "bash":
            assert {"run", "needs"} & set(block.marks), f"{block}: mark it run, run=job or needs=… (see tests/docs/blocks.py)"
        assert set(block.marks) <= {"run", "needs", "file", "grace", "status"}, (
            f"{block}: unknown mark among {sorted(block.marks)}"
        )


@pytest.mark.parametrize("block", of("bash"), ids=str)
def test_shell_is_well_formed(block: Block) -> None:
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", of("python"), ids=str)
def test_python_is_well_formed_and_names_what_there_is(block: Block) -> None:
    import grace_ds
    import grace_ds.huggingface
    import grace_ds.megatron

    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "grace_ds":
            assert hasattr(grace_ds, node.attr), f"{block}: grace_ds.{node.attr}"


@pytest.mark.parametrize("block", of("json", "yaml"), ids=str)
def test_configurations_are_read_by_the_real_loader(block: Block) -> None:
    loaded = json.loads(block.text) if block.language == "json" else yaml.safe_load(block.text)
    if "grace" in block.marks:
        load_config(loaded)
    elif isinstance(loaded, dict):
        found = find_block(loaded)
        if found is not None:
            load_config(found[1], found[0])


def test_the_examples_configurations_are_sound() -> None:
    files = sorted((ROOT / "examples" / "train").glob("*.json"))
    assert files
    for file in files:
        found = find_block(json.loads(file.read_text()))
        if found is not None:
            load_config(found[1], found[0])


def runnable() -> list[object]:
    found: list[object] = []
    for page in pages():
        runs = [block.marks["run"] for block in blocks(page) if "run" in block.marks]
        if runs:
            marks = [pytest.mark.multirank] if "job" in runs else []
            found.append(pytest.param(page, id=str(page.relative_to(ROOT)), marks=[*marks, pytest.mark.timeout(900)]))
    return found


@pytest.mark.parametrize("page", runnable())
def test_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path) -> None:
    for folder in ("examples/train", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    scripts = str(Path(sys.executable).parent)
    env = {
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "PYTHONPATH": "",
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "MASTER_PORT": str(_free_port()),
        "COLUMNS": "120",
    }
    for block in blocks(page):
        if "file" in block.marks:
            target = tmp_path / block.marks["file"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text)
        if "run" in block.marks:
            allowed = block.marks.get("status", "0").replace(",", "|")
            script = f"cd {tmp_path}\nset +e\n(set -euo pipefail\n{block.text}\n)\ncase $? in {allowed}) ;; *) exit 1 ;; esac"
            run_command(["bash", "-c", script], timeout=JOB_SECONDS, env=env)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
