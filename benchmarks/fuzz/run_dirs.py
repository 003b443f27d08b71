"""What a run keeps in its run_dir, as ``trace``, ``report`` and a resumed Megatron job read it.

The run is a real one: three refreshes of 200 samples on one rank.  Its records are plain text without a checksum, but for the
schedules, and they are shown and not acted upon.  So here only errors that are not the project's and hangs are counted; that a
schedule is not taken for another is the business of its own target.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.fuzz.mutate import mutated
from benchmarks.fuzz.target import TAKEN, Target
from grace_ds.cli.trace import trace
from grace_ds.comm.local import LocalComm
from grace_ds.config.load import load_config, write_resolved
from grace_ds.data.sampler import Geometry
from grace_ds.data.schedule import VisitCounts
from grace_ds.errors import DataError
from grace_ds.integrations.megatron import resume
from grace_ds.integrations.setup import prepare, refresh_context
from grace_ds.integrations.trusted_set import UserInputs
from grace_ds.monitor.metrics import Recorder, preview_of
from grace_ds.records import Losses, SampleRecords
from grace_ds.refresh.line import refresh
from grace_ds.refresh.signals import RefreshInputs
from grace_ds.refresh.state import RefreshState
from grace_ds.refresh.table import Table
from grace_ds.report.load import load_run
from grace_ds.report.page import page

N, BATCH, INTERVAL, REFRESHES = 200, 8, 4, 3


class _Texts:
    """Every other sample is junk, the others count; each has its text."""

    def __init__(self, n: int, junk: bool = True) -> None:
        rng = np.random.default_rng(n)
        self.tokens = (rng.integers(0, 50, n)[:, None] + np.arange(24) * 3) % 97
        if junk:
            self.tokens[::2] = rng.integers(0, 97, self.tokens[::2].shape)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.tokens[i], "text": f"sample {i}"}


def recorded(folder: Path) -> None:
    """Keep a run's records in ``folder``."""
    data = _Texts(N)
    schedule = {"interval_steps": INTERVAL, "cadence": "fixed"}
    config = load_config({"budget": 0.2, "refresh": schedule, "run_dir": str(folder), "selection": {"sources": None}})
    geometry = Geometry(1, 0, BATCH, 1)
    inputs = UserInputs(trusted_data=_Texts(96, junk=False))
    context = refresh_context(LocalComm(), config, geometry, prepare(data, config, geometry, inputs))
    write_resolved(config, folder)
    resume.keep_facts(str(folder), "digest", N, BATCH)
    recorder = Recorder(str(folder), None, preview_of(data, "auto"))
    table, seen, kept = Table(SampleRecords.empty(config.collect.dim)), Table(Losses.empty()), RefreshState()
    for version in range(REFRESHES):
        step = version * INTERVAL
        nothing = SampleRecords.empty(config.collect.dim)
        numbers = (step, version, step * BATCH, INTERVAL)
        given = RefreshInputs(nothing, Losses.empty(), table, seen, VisitCounts(), *numbers, uniform=version == 0, kept=kept)
        outcome = refresh(context, given)
        recorder.made(outcome, {"train_seconds": 10.0 * version, "refresh_seconds": 0.5, "collect_seconds": 0.0, "failures": 0.0})
        recorder.settle()
        table, kept = outcome.table, outcome.kept
    recorder.trained(REFRESHES * INTERVAL, REFRESHES * INTERVAL * BATCH)
    recorder.close()


def targets(folder: Path) -> list[Target]:
    """The three readers of a run_dir; its files go into ``folder``, which is emptied."""
    shutil.rmtree(folder, ignore_errors=True)
    recorded(folder)
    kept = {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    facts: Any = SimpleNamespace(geometry=SimpleNamespace(batch=BATCH))

    def changed(source: random.Random) -> tuple[Path, bytes]:
        name = source.choice(list(kept))
        return name, mutated(kept[name], source)

    def judged_by(look: Callable[[], Any]) -> Callable[[tuple[Path, bytes]], str]:
        def judge(value: tuple[Path, bytes]) -> str:
            name, data = value
            (folder / name).write_bytes(data)
            try:
                look()
            finally:
                for abandoned in (folder / "schedules").glob("*.abandoned"):
                    abandoned.unlink()
                for written, content in kept.items():
                    if written == name or not (folder / written).exists():
                        (folder / written).write_bytes(content)
            return TAKEN

        return judge

    def resumed() -> None:
        if not resume._read(str(folder), "digest", facts, INTERVAL, INTERVAL * BATCH):
            raise DataError("nothing was found to resume: restore the run_dir")

    return [
        Target("run_dir, traced", 0.03, changed, judged_by(lambda: trace(str(folder), INTERVAL + 1))),
        Target("run_dir, resumed", 0.03, changed, judged_by(resumed)),
        Target("run_dir, report", 0.002, changed, judged_by(lambda: page(load_run(folder)))),
    ]
