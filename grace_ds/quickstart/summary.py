"""What the arms found: the table on the screen, ``summary.json`` and ``loss_curves.png``.

Keys of summary.json (every time in seconds, every overhead a share of the arm's training time):

- ``pool``, ``steps``, ``seed``, ``ranks``, ``batch``, ``parameters``, ``data.rows``, ``data.kinds``, ``data.digest``
- ``uniform`` and ``grace``, where the arm was run: ``val_loss`` (nats per token after the last step), ``steps``,
  ``train_seconds`` (from initialize on, validation not counted), ``wall_seconds`` (start-up and validation included),
  ``curve`` (list of ``step``, ``val_loss``, ``train_loss``, ``seconds``)
- ``grace`` besides: ``harvest_overhead``, ``refresh_overhead``, ``refreshes``, ``coreset_size``, ``churn`` (share of
  each coreset that was not in the one before), ``version``, ``harvest_peak_mib`` (most that the hooks held on a rank)
- ``delta``: grace.val_loss - uniform.val_loss, where both were run; below zero, GRACE is better
- ``versions`` of Python and the libraries, ``hardware``
"""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.table import Table

from grace_ds.quickstart.corpus import write_text

LIBRARIES = ("grace_ds", "torch", "deepspeed", "numpy", "tokenizers", "faiss-cpu", "mpi4py")
COLOURS = {"uniform": "#6b7280", "grace": "#1d4ed8"}


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def arm_summary(result: dict[str, Any], wall_seconds: float) -> dict[str, Any]:
    """One arm's part of the summary, from its ``result.json``."""
    summary = {
        "val_loss": result["val_loss"],
        "steps": result["steps"],
        "train_seconds": result["train_seconds"],
        "wall_seconds": wall_seconds,
        "curve": result["curve"],
    }
    metrics = result.get("grace")
    if metrics:
        summary["harvest_overhead"] = metrics["harvest_seconds"] / result["train_seconds"]
        summary["refresh_overhead"] = metrics["refresh_seconds"] / result["train_seconds"]
        summary |= {key: metrics.get(key) for key in ("refreshes", "coreset_size", "churn", "version")}
        summary["harvest_peak_mib"] = (metrics.get("harvest_peak_bytes") or 0.0) / 2**20
    return summary


def summarise(pool: str, manifest: dict[str, Any], results: dict[str, dict[str, Any]], wall: dict[str, float]) -> dict[str, Any]:
    """The whole summary, as documented at the top of this module.

    Args:
        pool: name of the pool.
        manifest: of the corpus.
        results: ``result.json`` by arm, at least one.
        wall: wall seconds by arm.
    """
    first = next(iter(results.values()))
    summary: dict[str, Any] = {
        "pool": pool,
        **{key: first[key] for key in ("steps", "seed", "ranks", "batch", "parameters", "zero_stage")},
        "data": {key: manifest[key] for key in ("rows", "kinds", "digest")},
    }
    summary |= {arm: arm_summary(result, wall[arm]) for arm, result in results.items()}
    if {"uniform", "grace"} <= results.keys():
        summary["delta"] = results["grace"]["val_loss"] - results["uniform"]["val_loss"]
    summary["versions"] = versions()
    summary["hardware"] = {"cores": os.cpu_count(), "machine": platform.machine(), "system": platform.platform()}
    return summary


def table(summary: dict[str, Any], arms: list[str]) -> Table:
    """The table that the quickstart ends with, one column an arm."""
    out = Table(title=f"{summary['steps']} steps on the {summary['pool']} pool, {summary['ranks']} ranks")
    out.add_column("")
    for arm in arms:
        out.add_column(arm, justify="right", style="bold" if arm == "grace" else None)
    rows: list[tuple[str, str, str]] = [
        ("validation loss (nats/token)", "val_loss", ".4f"),
        ("optimizer steps", "steps", "d"),
        ("training time (s)", "train_seconds", ".1f"),
        ("wall time with start-up (s)", "wall_seconds", ".1f"),
        ("harvest overhead", "harvest_overhead", ".1%"),
        ("refresh overhead", "refresh_overhead", ".1%"),
        ("harvest peak memory (MiB a rank)", "harvest_peak_mib", ".2f"),
        ("refreshes", "refreshes", "d"),
        ("coreset size (samples)", "coreset_size", "d"),
        ("churn, mean", "churn", ".0%"),
    ]
    for label, key, form in rows:
        cells = [_cell(summary[arm].get(key), form) for arm in arms]
        if any(cell != "–" for cell in cells):
            out.add_row(label, *cells)
    if "delta" in summary:
        out.caption = f"grace minus uniform: {summary['delta']:+.4f} nats/token"
    return out


def _cell(value: Any, form: str) -> str:
    if isinstance(value, list):
        value = sum(value) / len(value) if value else None
    return "–" if value is None else format(int(value) if form == "d" else value, form)


def write(summary: dict[str, Any], arms: list[str], folder: Path) -> None:
    """Write ``summary.json`` and ``loss_curves.png``; each replaces an older one whole."""
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    temporary = folder / ".loss_curves.tmp.png"
    draw(summary, arms, temporary)
    os.replace(temporary, folder / "loss_curves.png")


def draw(summary: dict[str, Any], arms: list[str], path: Path) -> None:
    """The validation loss of each arm against optimizer steps, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The object interface and Agg by name: no display is looked for, and no global state of pyplot is touched.
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for arm in arms:
        curve = summary[arm]["curve"]
        label = f"{arm}  {summary[arm]['val_loss']:.3f}"
        axes.plot(
            [point["step"] for point in curve],
            [point["val_loss"] for point in curve],
            marker="o",
            markersize=4,
            linewidth=2,
            color=COLOURS.get(arm),
            label=label,
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title(f"{summary['pool']} pool, seed {summary['seed']}, equal steps")
    axes.grid(alpha=0.3)
    axes.legend(title="arm, final loss", frameon=False)
    figure.savefig(path, format="png")
