"""Draws the README's picture from a record: the loss over the steps, with GRACE and without.

Run it again after the record has changed, from the root of the repository::

    python docs/_ext/loss_curves.py

It reads ``benchmarks/results/selection-crawl.json`` and writes ``docs/_static/loss_curves.svg``.  Nothing is smoothed or
left out: every evaluation of the three seeds stands in the record.  ``tests/docs/test_readme.py`` fails if the two no
longer belong together.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "benchmarks" / "results" / "selection-crawl.json"
PICTURE = ROOT / "docs" / "_static" / "loss_curves.svg"
STEPS = 400
ARMS = {"uniform": ("without GRACE (uniform order)", "#6b7280"), "grace": ("with GRACE (the default)", "#0f766e")}


def curves(record: dict[str, Any], arm: str) -> tuple[list[int], list[list[float]]]:
    """The evaluations of an arm on the test rows.

    Returns:
        The steps, and for each of them the losses of all seeds, in nats a token.
    """
    runs = [
        run
        for run in record["rows"]["runs"]
        if run["arm"] == arm and run["steps"] == STEPS and run["order_seed"] == run["seed"]  # no run in another order
    ]
    steps = [point["step"] for point in runs[0]["curve"]]
    assert all([point["step"] for point in run["curve"]] == steps for run in runs)
    return steps, [[run["curve"][i]["test"] for run in runs] for i in range(len(steps))]


def digest() -> str:
    """Of the record; the picture holds it, so that a test can tell whether it was drawn from this one."""
    return hashlib.sha256(RECORD.read_bytes()).hexdigest()


def draw() -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    record = json.loads(RECORD.read_text("utf-8"))
    # Text becomes outlines: it looks the same where a font is missing.
    with pyplot.rc_context({"svg.hashsalt": "grace_ds", "svg.fonttype": "path", "font.size": 14, "axes.linewidth": 0.8}):
        figure, axes = pyplot.subplots(figsize=(6.0, 4.0), layout="constrained")
        for arm, (label, colour) in ARMS.items():
            steps, losses = curves(record, arm)
            means = [sum(row) / len(row) for row in losses]
            axes.fill_between(steps, [min(row) for row in losses], [max(row) for row in losses], color=colour, alpha=0.35, lw=0)
            axes.plot(steps, means, color=colour, lw=2, marker="o", ms=4, label=label)
            axes.annotate(
                f"{means[-1]:.3f}", (steps[-1], means[-1]), (8, 0), textcoords="offset points", va="center", color=colour
            )
        axes.set_xlabel("optimizer steps")
        axes.set_ylabel("test loss (nats a token)")
        axes.set_xlim(40, STEPS + 45)
        axes.set_xticks(steps)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(
            frameon=False, title="mean of 3 seeds; band: lowest to highest", fontsize=13, title_fontsize=13, alignment="left"
        )
        about = {"Date": None, "Creator": None, "Title": "Loss over the steps, with GRACE and without", "Identifier": digest()}
        figure.savefig(PICTURE, metadata=about, facecolor="white")
        pyplot.close(figure)


if __name__ == "__main__":
    draw()
