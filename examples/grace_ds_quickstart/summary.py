"""What the arms found: the table on the screen, ``summary.json`` and ``loss_curves.png``.

Keys of summary.json (every time in seconds, every overhead a share of the arm's ``train_seconds``; null: not known):

- ``pool``, ``steps``, ``seed``, ``ranks``, ``batch``, ``parameters``, ``data.rows``, ``data.kinds``, ``data.digest``
- ``launcher``: that both arms were started by, ``openmpi`` or ``deepspeed``
- ``uniform`` and ``grace``, where the arm was run: ``val_loss`` (nats per token after the last step), ``steps``,
  ``train_seconds`` (from initialize on, choosing included, validation not), ``wall_seconds`` (start-up and validation
  included), ``curve`` (list of ``step``, ``val_loss``, ``train_loss``, ``seconds``)
- ``grace`` besides: ``choosing_share`` (``collect_overhead`` of the collecting hooks plus ``refresh_overhead``),
  ``refreshes``, ``coreset_size``, ``churn`` (share of each coreset that was not in the one before), ``version``,
  ``collect_peak_mib`` (most that the hooks held on a rank)
- ``grace``, of its way from collecting to choosing: ``transport`` (``mpi`` or ``torch``), ``collected_rows`` and
  ``gathered_bytes`` (all ranks, whole run), ``graph_seconds.first`` and ``graph_seconds.repair`` (mean of the later
  refreshes), ``propagated_rows`` (whose influence came from their neighbours, last refresh)
- ``sources``: shares of ``unique``, ``duplicate``, ``generated`` and ``junk`` in ``pool``; with GRACE also in ``coreset`` (the
  distinct core samples of the schedule in force at the last step) and ``trained`` (every use of a sample in the run counts)
- ``delta``: grace.val_loss - uniform.val_loss, where both were run; below zero, GRACE is better
- ``versions`` of Python and the libraries, ``hardware``
"""

from __future__ import annotations

import io
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from grace_ds.data.schedule import load_book
from grace_ds.errors import CheckpointError
from grace_ds.records import Array, IntArray, Role
from grace_ds.utils.files import write_atomic
from grace_ds_quickstart.pollute import Kind

LIBRARIES = ("grace_ds", "torch", "deepspeed", "numpy", "tokenizers", "faiss-cpu", "mpi4py")
TOLD = ("refreshes", "coreset_size", "churn", "version", "transport", "collected_rows", "gathered_bytes", "propagated_rows")
SOURCES = {"unique": "unique", "duplicate": "near-duplicates", "generated": "machine-written", "junk": "junk"}  # key → label
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
        collect, refresh = (_share(metrics.get(f"{part}_seconds"), result["train_seconds"]) for part in ("collect", "refresh"))
        summary["collect_overhead"], summary["refresh_overhead"] = collect, refresh
        summary["choosing_share"] = None if collect is None or refresh is None else collect + refresh
        summary |= {key: metrics.get(key) for key in TOLD}
        summary["graph_seconds"] = {part: metrics.get(f"graph_{part}_seconds") for part in ("first", "repair")}
        summary["collect_peak_mib"] = (metrics.get("collect_peak_bytes") or 0.0) / 2**20
    return summary


def _share(seconds: float | None, whole: float) -> float | None:
    return None if seconds is None else seconds / whole


def count_sources(data: Path, run_dir: Path, trained: int) -> dict[str, Any]:
    """The shares of the sources, as documented at the top of this module under ``sources``.

    Args:
        data: folder of the corpus.
        run_dir: of the GRACE arm.
        trained: samples that it has trained on, over all ranks; 0 where it was not run.
    """
    kinds = np.load(data / "kinds.npy")
    found: dict[str, Any] = {"pool": source_shares(kinds, np.arange(len(kinds)))}
    if trained:
        try:
            book = load_book(run_dir / "schedules")
            last = book.at(trained - 1)
            used = book.slots(0, trained).ids
        except (CheckpointError, ValueError):  # training goes on where a schedule cannot be written
            return {**found, "coreset": None, "trained": None}
        core = np.unique(last.ids[last.roles == Role.CORE]) if last is not None else np.empty(0, np.int64)
        found |= {"coreset": source_shares(kinds, core), "trained": source_shares(kinds, used)}
    return found


def source_shares(kinds: Array, ids: IntArray) -> dict[str, float]:
    """The share of each source among samples.

    Args:
        kinds: (N,) uint8, :class:`Kind` of every sample.
        ids: (n,) int64, the samples, repeats counted; some.
    """
    counts = np.bincount(kinds[ids], minlength=len(Kind))
    return {name: float(counts[Kind[name.upper()]] / len(ids)) for name in SOURCES}


def summarise(
    pool: str,
    manifest: dict[str, Any],
    results: dict[str, dict[str, Any]],
    wall: dict[str, float],
    *,
    launcher: str,
    sources: dict[str, Any],
) -> dict[str, Any]:
    """The whole summary, as documented at the top of this module.

    Args:
        pool: name of the pool.
        manifest: of the corpus.
        results: ``result.json`` by arm, at least one.
        wall: wall seconds by arm.
        launcher: that both arms were started by.
        sources: of :func:`count_sources`.
    """
    first = next(iter(results.values()))
    summary: dict[str, Any] = {
        "pool": pool,
        **{key: first[key] for key in ("steps", "seed", "ranks", "batch", "parameters", "zero_stage")},
        "launcher": launcher,
        "data": {key: manifest[key] for key in ("rows", "kinds", "digest")},
        "sources": sources,
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
        ("training time, choosing included (s)", "train_seconds", ".1f"),
        ("wall time with start-up (s)", "wall_seconds", ".1f"),
        ("choosing, share of the training time", "choosing_share", ".1%"),
        ("  collecting gradients", "collect_overhead", ".1%"),
        ("  refreshes", "refresh_overhead", ".1%"),
        ("transport", "transport", "s"),
        ("rows collected", "collected_rows", ",d"),
        (f"gathered over {summary.get('grace', {}).get('transport') or 'the transport'} (MiB)", "gathered_mib", ".2f"),
        ("graph, first (s)", "graph_seconds.first", ".2f"),
        ("graph, repair (s)", "graph_seconds.repair", ".2f"),
        ("rows given influence by propagation", "propagated_rows", ",d"),
        ("memory of the hooks, peak (MiB a rank)", "collect_peak_mib", ".2f"),
        ("refreshes", "refreshes", "d"),
        ("coreset (samples)", "coreset_size", "d"),
        ("churn, mean", "churn", ".0%"),
    ]
    for label, key, form in rows:
        cells = [_cell(_value(summary[arm], key), form) for arm in arms]
        if any(cell != "–" for cell in cells):
            out.add_row(label, *cells)
    if "delta" in summary:
        out.caption = f"grace minus uniform: {summary['delta']:+.4f} nats/token"
    return out


def source_table(summary: dict[str, Any]) -> Table:
    """What the pool is made of, and what GRACE chose and trained on, one row a source."""
    out = Table(title="where the samples come from")
    out.add_column("")
    for part in ("pool", "coreset", "trained"):
        out.add_column({"trained": "trained on"}.get(part, part), justify="right", style="bold" if part == "coreset" else None)
    for name, label in SOURCES.items():
        out.add_row(label, *[_cell((shares or {}).get(name), ".1%") for shares in summary["sources"].values()])
    out.caption = "of the grace arm; coreset: the last one"
    return out


def _value(arm: dict[str, Any], key: str) -> Any:
    """The value of a row of the table; ``a.b`` is one level down."""
    if key == "gathered_mib":
        gathered = arm.get("gathered_bytes")
        return None if gathered is None else gathered / 2**20
    head, _, below = key.partition(".")
    found = arm.get(head)
    return found.get(below) if below and found else found


def _cell(value: Any, form: str) -> str:
    if isinstance(value, list):
        value = sum(value) / len(value) if value else None
    return "–" if value is None else format(int(value) if form.endswith("d") else value, form)


def write(summary: dict[str, Any], arms: list[str], folder: Path) -> None:
    """Write ``summary.json`` and ``loss_curves.png``; each replaces an older one whole."""
    write_atomic(folder / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    write_atomic(folder / "loss_curves.png", draw(summary, arms))


def draw(summary: dict[str, Any], arms: list[str]) -> bytes:
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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
