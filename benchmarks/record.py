"""What every benchmark leaves behind: claims with their goals, raw rows, command, versions and hardware."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from grace_ds_quickstart.summary import versions
from rich.console import Console
from rich.table import Table

from grace_ds.utils.files import write_atomic

SampleRecords = list[dict[str, Any]]


@dataclass(frozen=True)
class Claim:
    """One figure with the goal that was set for it before it was measured; the goal None is a figure without one."""

    name: str
    value: float
    unit: str
    goal: float | None
    higher_is_better: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the value reaches the goal; None without a goal."""
        if self.goal is None:
            return None
        return self.value >= self.goal if self.higher_is_better else self.value <= self.goal


@dataclass
class Record:
    """The result of one benchmark.

    Attributes:
        name: of the benchmark.
        claims: its claims.
        rows: groups of raw rows by name; all rows of a group have the same keys.
        notes: what a reader must know to read the figures.
        hidden: groups of rows that are kept but not shown.
    """

    name: str
    claims: list[Claim] = field(default_factory=list)
    rows: dict[str, SampleRecords] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return {
            "benchmark": self.name,
            "claims": [{**asdict(claim), "met": claim.met} for claim in self.claims],
            "rows": self.rows,
            "notes": self.notes,
            "command": " ".join(["python -m benchmarks", *map(without_place, sys.argv[1:])]),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "versions": versions(),
            "hardware": hardware(),
        }

    def write(self, path: Path) -> None:
        """Writes the JSON file, whole or not at all."""
        write_atomic(path, (json.dumps(_finite(self.as_dict()), indent=1, allow_nan=False) + "\n").encode())

    def show(self, console: Console) -> None:
        """The rows and the claims as tables."""
        for name, rows in self.rows.items():
            if rows and name not in self.hidden:
                console.print(_table(name, list(rows[0]), [[_cell(v) for v in row.values()] for row in rows]))
        met = {True: "yes", False: "NO", None: "–"}
        cells = [[c.name, _cell(c.value), c.unit, _cell(c.goal), met[c.met]] for c in self.claims]
        console.print(_table("claims", ["claim", "value", "unit", "goal", "met"], cells))
        for note in self.notes:
            console.print(f"  {note}", highlight=False)


def without_place(word: str) -> str:
    """An argument as it is recorded: of an absolute path the last part, for it says where, not what."""
    return Path(word).name if Path(word).is_absolute() else word


def hardware() -> dict[str, Any]:
    """What the figures were measured on."""
    model = ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        pass
    import torch

    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "gpu": None,
    }


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Median and the bounds of its distribution-free confidence interval, from order statistics.

    The number of values below the true median is binomial(n, 1/2); the interval is the narrowest symmetric pair of order
    statistics that covers ``level`` of it.
    """
    from math import comb

    ordered = np.sort(np.asarray(values, np.float64))
    n = len(ordered)
    cut, tail = 0, 0.0
    while tail + comb(n, cut) / 2**n <= (1 - level) / 2:
        tail += comb(n, cut) / 2**n
        cut += 1
    low = max(cut - 1, 0)
    return float(np.median(ordered)), float(ordered[low]), float(ordered[n - 1 - low])


def _finite(tree: Any) -> Any:
    """``tree`` with null in the place of what JSON has no number for: a loss never reached, a median of such."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not np.isfinite(tree) else tree


def _table(title: str, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in cells:
        table.add_row(*row)
    return table


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
