"""The files that users copy: configs/ and the launch scripts' own checks."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from grace_ds.config.schema import GraceConfig

ROOT = Path(__file__).parents[2]


def test_base_yaml_holds_every_key_with_its_default():
    given = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/base.yaml"))
    assert given == dataclasses.asdict(GraceConfig())


@pytest.mark.parametrize(("name", "stage"), [("ds_zero1", 1), ("ds_zero2", 2), ("ds_zero3", 3), ("huggingface", 2)])
def test_example_configs_hold_the_flag_at_its_place(name, stage):
    config = json.loads((ROOT / f"configs/{name}.json").read_text())
    assert config["zero_optimization"]["stage"] == stage
    sampling = config["data_efficiency"]["data_sampling"]
    assert config["data_efficiency"]["enabled"] and sampling["enabled"] and sampling["grace"]["enabled"]
    OmegaConf.merge(OmegaConf.structured(GraceConfig), sampling["grace"])  # raises on a key or type that is unknown


def shell(command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", command], cwd="/", env={**os.environ, **env}, timeout=30, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("script", "args"),
    [
        ("mpirun.sh", "train.py"),
        ("mpirun.sh", "2 train.py"),
        ("deepspeed.sh", "--num_accelerators 2"),
        ("deepspeed.sh", "--"),
        ("huggingface.sh", "--steps 3"),
    ],
)
def test_scripts_say_how_they_are_used(script, args):
    done = shell(f"bash {ROOT}/launch/{script} {args}")
    assert done.returncode == 1 and f"usage: launch/{script}" in done.stderr


def test_a_python_that_is_too_old_or_missing_is_named():
    done = shell(f"bash {ROOT}/launch/quickstart.sh", GRACE_PYTHON="/nonexistent/python", GRACE_VENV="/nonexistent/venv")
    assert done.returncode == 1 and "GRACE_PYTHON=/nonexistent/python is not a Python >= 3.10" in done.stderr


def test_ci_runs_exactly_the_test_script():
    commands = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line and not line.startswith("#")]
    assert commands[-1] == "exec bash launch/test.sh --all"
