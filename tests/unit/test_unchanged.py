"""What an unchanged program meets: logging, imports that are changed, a prepared process, errors about wrong types."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grace_ds import _startup
from grace_ds.config.load import block_of
from grace_ds.config.schema import GraceConfig
from grace_ds.errors import ConfigError
from grace_ds.integrations import loader_watch
from grace_ds.integrations.adoption import DrawnOrder, await_loader
from grace_ds.integrations.engine import engine_of
from grace_ds.integrations.trusted_set import UserInputs
from grace_ds.integrations.world import check_accelerate

SPEAK = """
import logging, sys
{before}
from grace_ds.utils.screen import log_to_screen
log_to_screen({rank})
{after}
log = logging.getLogger("grace_ds")
log.info("an info"); log.warning("a warning")
"""


def spoken(before: str = "", after: str = "", rank: int = 0) -> str:
    script = SPEAK.format(before=before, after=after, rank=rank)
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return ran.stdout + ran.stderr


@pytest.mark.parametrize(
    "setup",
    [
        "",
        "logging.basicConfig(level=logging.WARNING)",
        "logging.basicConfig(level=logging.INFO)",
        "logging.basicConfig(level=logging.ERROR, stream=sys.stdout)",
        "logging.basicConfig(filename='/dev/null')",
        "logging.getLogger().addHandler(logging.NullHandler())",
        "h = logging.StreamHandler(); h.setLevel(logging.ERROR); logging.getLogger().addHandler(h)",
        "import logging.config; logging.getLogger('grace_ds'); logging.config.dictConfig({'version': 1})",
    ],
)
def test_rank_0_is_seen_once_whatever_logging_the_job_has(setup: str) -> None:
    # After ours, dictConfig disables the logger: that is the job's own decision.
    for said in [spoken(before=setup), *([] if "dictConfig" in setup else [spoken(after=setup)])]:
        assert said.count("an info") == said.count("a warning") == 1


def test_other_ranks_only_warn_and_a_level_of_the_jobs_own_stays() -> None:
    said = spoken(rank=1)
    assert (said.count("an info"), said.count("a warning")) == (0, 1)
    said = spoken(before="logging.getLogger('grace_ds').setLevel(logging.ERROR)")
    assert "an info" not in said and "a warning" not in said


def test_a_module_is_changed_right_after_its_import_and_only_then(tmp_path: Path) -> None:
    (tmp_path / "imported_later.py").write_text("value = 1")
    script = (
        "from grace_ds.utils.imports import after_import\nimport sys\n"
        "after_import('imported_later', lambda m: setattr(m, 'value', m.value + 1))\n"
        "assert 'imported_later' not in sys.modules\n"
        "import imported_later\nassert imported_later.value == 2\n"
        "after_import('imported_later', lambda m: setattr(m, 'value', 7))\nassert imported_later.value == 7\n"
    )
    path = ":".join([str(tmp_path), *filter(None, sys.path)])
    subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONPATH": path})


STARTUP = str(Path(_startup.__file__).parent)
IS_PREPARED = "from grace_ds.integrations import unchanged; print(unchanged._prepared)"


def start(script: str, *more: str, python: str | Path = sys.executable, path: str = "") -> tuple[list[str], str]:
    """Start a process as ``grace-ds run COMMAND`` has processes started; returns its lines, and its standard error."""
    ran = subprocess.run(
        [python, "-c", script], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join([STARTUP, *more, path])}
    )
    return ran.stdout.splitlines(), ran.stderr


def test_the_hidden_sitecustomize_of_an_environment_still_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("value = 7; print('the own one')")
    script = f"import sitecustomize; print(sitecustomize.value); {IS_PREPARED}"
    assert start(script, str(tmp_path), path=":".join(sys.path)) == (["the own one", "7", "True"], "")


def test_what_fails_in_the_hidden_one_is_shown_and_nothing_else_is_lost(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import a_module_that_is_not_there")
    lines, said = start(IS_PREPARED, str(tmp_path), path=":".join(sys.path))
    assert lines == ["True"] and "Error in sitecustomize" in said and "a_module_that_is_not_there" in said


def test_an_interpreter_without_grace_starts_as_ever() -> None:
    assert start("print(1)", python=Path(sys.base_exec_prefix, "bin", "python3")) == (["1"], "")


def test_a_command_is_prepared_also_if_it_is_this_python_itself() -> None:
    command = [Path(sys.executable).with_name("grace-ds"), "run", sys.executable, "-c", IS_PREPARED]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["True"]


def test_a_rank_that_trains_nothing_says_that_grace_is_off_and_what_it_starts_does_not() -> None:
    uses_torch = "import subprocess, sys; sys.modules['torch'] = sys"  # without the seconds of its import
    script = f"{uses_torch}; subprocess.run([sys.executable, '-c', {uses_torch!r}], check=True)"
    command = [Path(sys.executable).with_name("grace-ds"), "run", sys.executable, "-c", script]
    for rank, lines in (("0", 1), ("1", 0)):
        ran = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "RANK": rank})
        assert ran.stdout.count("GRACE is off, and the job runs as it is: it called neither") == lines


def test_a_torch_whose_loaders_cannot_be_watched_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class DataLoader:
        def __iter__(self) -> Any:
            return iter(())

    before = DataLoader.__iter__
    monkeypatch.setattr(loader_watch.WATCH, "missing", [])
    loader_watch.watch_loaders(types.SimpleNamespace(DataLoader=DataLoader))
    assert loader_watch.WATCH.missing == ["_BaseDataLoaderIter._next_index", "_BaseDataLoaderIter.__next__"]
    assert DataLoader.__iter__ is before
    with pytest.raises(ConfigError, match="has no _BaseDataLoaderIter._next_index and no .*pass the dataset to"):
        await_loader(types.SimpleNamespace(dp_world_size=1), GraceConfig(), UserInputs(None, None, None, None))


def test_the_wrapper_of_fabric_holds_the_engine() -> None:
    wrappers = pytest.importorskip("lightning_fabric.wrappers")
    from deepspeed.runtime.engine import DeepSpeedEngine

    engine = DeepSpeedEngine.__new__(DeepSpeedEngine)
    torch.nn.Module.__init__(engine)
    assert engine_of(wrappers._FabricModule(engine, strategy=None)) is engine_of(engine) is engine


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear, .* pass what deepspeed.initialize"),
        (object.__new__(torch.nn.parallel.DistributedDataParallel), "DistributedDataParallel, .* use a DeepSpeed config"),
    ],
)
def test_attach_names_the_type_that_is_no_engine(given: Any, said: str) -> None:
    pytest.importorskip("deepspeed")
    with pytest.raises(ConfigError, match=said):
        engine_of(given)


def test_accelerate_with_another_world_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    state = pytest.importorskip("accelerate.state")
    monkeypatch.setattr(state.PartialState, "_shared_state", {"num_processes": 1})
    check_accelerate(1)
    with pytest.raises(ConfigError, match="accelerate runs with 1 process"):
        check_accelerate(2)


def test_a_block_by_option_and_one_in_the_config_exclude_each_other(tmp_path: Path) -> None:
    given = {"GRACE_DS_BLOCK": str(tmp_path / "grace.yaml")}
    assert block_of({}, {}) is None
    assert block_of({}, given) == (given["GRACE_DS_BLOCK"], {"file": given["GRACE_DS_BLOCK"]})
    with pytest.raises(ConfigError, match="keep one"):
        block_of({"grace_ds": {"budget": 0.2}}, given)


def test_the_order_of_an_adopted_loader_begins_with_what_it_has_given() -> None:
    order = DrawnOrder(np.array([7, 3, 9]), 2, lambda positions: positions * 10)
    assert order(np.arange(7)).tolist() == [0, 10, 7, 3, 9, 50, 60]


def test_json_is_a_block_file_too(tmp_path: Path) -> None:
    from grace_ds.config.load import load_config

    path = tmp_path / "grace.json"
    path.write_text(json.dumps({"budget": 0.4}))
    found = block_of({}, {"GRACE_DS_BLOCK": str(path)})
    assert found is not None and load_config(found[1], found[0]).budget == 0.4


def test_a_stream_that_is_no_screen_counts_for_nothing() -> None:
    from grace_ds.utils.screen import _shows

    record = logging.LogRecord("grace_ds", logging.INFO, "", 0, "x", None, None)
    assert not _shows(logging.StreamHandler(io.StringIO()), record)
    assert _shows(logging.StreamHandler(sys.stderr), record)
