"""The environment of all tests: one thread a process, DeepSpeed on the CPU, nothing compiled into a shared cache."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

# Before any test module imports torch or deepspeed: both read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes of the multi-rank tests share the cores
os.environ["DS_ACCELERATOR"] = "cpu"
for _size in ("COLUMNS", "LINES"):  # which workers of pytest-xdist may have: output would be wrapped there
    os.environ.pop(_size, None)
# A killed rank leaves a lock in the extensions cache on which every later job would wait for ever.
_EXTENSIONS = tempfile.mkdtemp(prefix="grace_ds_extensions_")
os.environ["TORCH_EXTENSIONS_DIR"] = _EXTENSIONS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark by place what starts several processes, and skip what needs a GPU where there is none."""
    for item in items:
        for lane in ("multirank", "cluster"):
            if lane in item.path.parts:
                item.add_marker(getattr(pytest.mark, lane))
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Adds what was skipped, with the reason, to the file GRACE_TEST_SKIPPED, for who runs pytest several times."""
    path = os.environ.get("GRACE_TEST_SKIPPED")
    if path is None or hasattr(terminalreporter.config, "workerinput"):  # a worker of xdist, whose reports come to all
        return
    root = terminalreporter.config.rootpath
    with open(path, "a") as out:
        for report in terminalreporter.stats.get("skipped", []):
            file, _, reason = report.longrepr
            out.write(f"{os.path.relpath(file, root)}: {reason.removeprefix('Skipped: ')}\n")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session", autouse=True)
def _private_extensions() -> Iterator[None]:
    yield
    shutil.rmtree(_EXTENSIONS, ignore_errors=True)
