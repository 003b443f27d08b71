"""What the package says of itself, and what a wheel of it holds."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import grace_ds

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_wheel_holds_the_marker_of_types_the_pages_files_and_the_metadata(tmp_path: Path) -> None:
    source = tmp_path / "source"  # building writes beside the sources
    source.mkdir()
    for name in ("grace_ds", "examples", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    build = "import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        told = Parser().parsestr(file.read(metadata).decode())
    assert {"grace_ds/py.typed", "grace_ds_quickstart/py.typed", "grace_ds/report/page.html"} <= names
    assert not any(name.startswith(("tests", "benchmarks")) for name in names)
    assert told["Version"] == grace_ds.__version__ and told["Author"] == "The grace_ds authors"
    assert any("arxiv.org/abs/2604.11810" in url for url in told.get_all("Project-URL", []))
    classified = told.get_all("Classifier", [])
    assert "Programming Language :: Python :: 3.10" in classified and "Typing :: Typed" in classified
    assert told["Requires-Python"] == ">=3.10"
