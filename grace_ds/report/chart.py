"""Describe the map of the page: a figure, and the text of each sample that can be pointed at.

The figure is an image.  The positions of its points, and the text for each, are data of the page that its script reads.  They
are text, never markup: the template escapes both, and the script writes text alone.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np

from grace_ds.report import figures
from grace_ds.report.load import Run
from grace_ds.report.samples import text_of

CHARACTERS = 160


class Map(NamedTuple):
    """What the section shows of a map.

    Attributes:
        about: a paragraph on the samples and the axes.
        pictures: (image, meaning of its colour).
        points: JSON of each point's place on an image, from the left and from the top, and of its text.
    """

    about: str
    pictures: list[tuple[str, str]]
    points: str


def map_of(run: Run, chart: dict[str, Any]) -> Map:
    """Return what the section shows of the run's map."""
    drawn = [figures.chart(chart, name) for name in figures.MAPPED if np.isfinite(_floats(chart.get(name, []))).any()]
    left, top = np.round(drawn[0][2], 4).T.tolist()
    texts = [_description(run, chart, i) for i in range(len(chart["ids"]))]
    points = json.dumps({"left": left, "top": top, "texts": texts})
    return Map(_about(chart), [(uri, label) for uri, label, _ in drawn], points)


def _about(chart: dict[str, Any]) -> str:
    first, second = chart["explained"]
    idle = "" if chart["used"] else " That schedule was uniform all the same: this is what the filter says."
    drawn = (
        f"{len(chart['ids']):,} samples, drawn uniformly from a window of {chart['window']:,},"
        if (len(chart["ids"]) < chart["window"])
        else f"All {chart['window']:,} samples of the window"
    )
    return (
        f"{drawn} at schedule {chart['version']}, step {chart['step']}.{idle} Each lies by the words that it holds: TF-IDF "
        "vectors, by the formula of the k-NN graph, on their two principal axes, which hold "
        f"{first:.1%} and {second:.1%} of the variance. Groups are texts that share words, such as a language, a kind of junk or "
        "copies. The rest of the variance, gradients and the graph's edges are not in this picture: neighbours here may differ."
    )


def _description(run: Run, chart: dict[str, Any], i: int) -> str:
    chance, influence = chart["chance"][i], chart["influence"][i]
    facts = [f"sample {chart['ids'][i]}", "chosen" if chart["chosen"][i] else "not in the schedule by choice"]
    if run.sources is not None and chart["ids"][i] < len(run.sources[0]):
        facts.append(f"source {run.sources[1][run.sources[0][chart['ids'][i]]]}")
    if chance is not None:
        facts.append(f"chance {10**chance:.2g} of the likeliest")
    if influence is not None:
        facts.append(f"influence {influence:+.1f} deviations from the trusted")
    for name, unit in (("loss", "nats above the mean"), ("crowding", "density of the graph")):
        value = chart.get(name, [None] * (i + 1))[i]
        if value is not None:
            facts.append(f"{name} {value:.2f} ({unit})")
    text = text_of(run.decode, chart["shown"][i])[:CHARACTERS]
    return "; ".join(facts) + "\n" + (text or "(the dataset shows neither text nor token ids)")


def why_not(run: Run) -> str:
    """Return why the run has no map."""
    recipe, features = run.config.get("recipe"), run.config.get("features") or {}
    if recipe == "uniform" or features.get("enabled") is False:
        return "There is no map: samples are placed by their content, and this configuration does not read it."
    if not run.explanations:
        return "There is no map: no refresh of this run has weighed a sample yet."
    return (
        "There is no map: reports/map.json is missing or cannot be read. The run was made by an older version, or the map could "
        "not be made, which the job's log says."
    )


def _floats(values: list[float | None]) -> figures.Floats:
    return np.array([np.nan if v is None else v for v in values], np.float64)
