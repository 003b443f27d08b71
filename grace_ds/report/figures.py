"""Draw the page's figures with matplotlib as SVG in data URIs: no extra files, no script, sharp at any width."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from grace_ds.errors import ConfigError
from grace_ds.report.facts import Facts
from grace_ds.report.load import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = npt.NDArray[np.float64]
COLOURS = {"uniform": "#6b7280", "grace": "#1d4ed8"}
STAGES = ("gather", "table", "content", "embed", "graph", "propagate", "select", "explanation", "broadcast")
MAPPED = {
    "chance": "colour: log10 of the chance, 0 for the likeliest of the window",
    "influence": "colour: influence, robust deviations from trusted samples",
    "loss": "colour: loss above the running mean (nats per token)",
    "crowding": "colour: density of the k-NN graph",
}
PANELS = 6  # refreshes whose histograms are shown: the first, the last, and some between
BARS = 24  # maximum refreshes drawn as bars; more are drawn as a band
LABELS = {
    "quality": "quality: pass of the trusted filter",
    "density": "near-duplicates of a sample, log2(1 + copies)",
    "chance": "log10 of the unnormalised chance",
    "loss": "loss above the running mean (nats per token)",
    "influence": "influence, robust deviations from trusted samples",
    "crowding": "density of the k-NN graph",
}


def loss(run: Run) -> str:
    """Plot the loss of each arm against optimizer steps."""
    axes = _axes()
    for arm, curve in run.curves.items():
        # A dollar sign would start a formula.
        label = f"{arm}  {curve[-1][1]:.3f}".replace("$", r"\$") if curve else arm
        axes.plot(*zip(*curve, strict=True), marker="o", markersize=3, color=COLOURS.get(arm), label=label)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.legend(frameon=False)
    return _uri(axes)


def overhead(run_facts: Facts) -> str:
    """Plot the seconds of each refresh, by stage."""
    axes = _axes()
    steps = [str(g.step) for g in run_facts.generations]
    names = [*STAGES, *sorted({s for g in run_facts.generations for s in g.seconds} - set(STAGES))]
    seconds = {name: np.array([g.seconds.get(name, 0.0) for g in run_facts.generations]) for name in names}
    seconds = {name: values for name, values in seconds.items() if values.sum() > 0}
    if len(steps) <= BARS:
        bottom, positions = np.zeros(len(steps)), np.arange(len(steps))
        for name, values in seconds.items():
            axes.bar(positions, values, bottom=bottom, label=name)
            bottom += values
        every = -(-len(steps) // 8)
        axes.set_xticks(positions[::every], steps[::every])
    elif seconds:
        axes.stackplot([g.step for g in run_facts.generations], list(seconds.values()), labels=list(seconds))
    axes.set(xlabel="refresh at optimizer step", ylabel="seconds (root)")
    axes.legend(frameon=False, fontsize=8)
    return _uri(axes)


def coreset(run_facts: Facts) -> str:
    """Plot churn, and the ages of the core, against the step of the refresh."""
    axes = _axes()
    chosen = [g for g in run_facts.generations if g.age is not None]
    churn = [(g.step, g.churn) for g in chosen if g.churn is not None]
    axes.plot([step for step, _ in churn], [share for _, share in churn], "o-", label="churn")
    new = [float((g.age == 1).mean()) for g in chosen if g.age is not None]
    old = [float((g.age >= 3).mean()) for g in chosen if g.age is not None]
    axes.plot([g.step for g in chosen], new, "s--", label="age 1 (new)", alpha=0.6)
    axes.plot([g.step for g in chosen], old, "^:", label="age 3 schedules or more")
    axes.set(xlabel="refresh at optimizer step", ylabel="share of the scheduled core", ylim=(-0.03, 1.03))
    axes.legend(frameon=False)
    return _uri(axes)


def shares(run_facts: Facts) -> str:
    """Plot the share of each source in the pool and in the chosen samples."""
    axes = _axes()
    shown = sorted(run_facts.shares, key=lambda s: -max(s[1:]))[:12]
    positions = np.arange(len(shown))
    axes.barh(positions - 0.2, [s[1] for s in shown], 0.4, color=COLOURS["uniform"], label="pool")
    axes.barh(positions + 0.2, [s[2] for s in shown], 0.4, color=COLOURS["grace"], label="chosen")
    axes.set_yticks(positions, [s[0][:24].replace("$", r"\$") for s in shown])
    axes.invert_yaxis()
    axes.set(xlabel="share")
    axes.legend(frameon=False)
    return _uri(axes)


def panels(versions: list[int]) -> list[int]:
    """Return at most ``PANELS`` of the versions, evenly spread, including the first and the last."""
    return [versions[i] for i in sorted({round(x) for x in np.linspace(0, len(versions) - 1, min(PANELS, len(versions)))})]


def histograms(run: Run, name: str) -> str | None:
    """Plot a signal's histogram at several refreshes, one above the other: window (grey) and scheduled core (blue)."""
    shown = [p for v in panels(list(run.explanations)) if name in (p := run.explanations[v]).get("histograms", {})]
    if not shown:
        return None
    figure = _figure(0.9 + 0.85 * len(shown))
    parts: Any = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, explanation in zip(parts, shown, strict=True):
        h = explanation["histograms"][name]
        edges = np.asarray(h["edges"], float)
        for part, colour in (("window", COLOURS["uniform"]), ("core", COLOURS["grace"])):
            counts = np.asarray(h[part], float)
            if counts.sum():
                axes.stairs(counts / counts.sum(), edges, fill=True, alpha=0.45, color=colour)
        axes.set_ylabel(f"step {explanation['step']}", fontsize=8)
        axes.set_yticks([])
        axes.spines[["top", "right", "left"]].set_visible(False)
    parts[-1].set_xlabel(LABELS[name])
    return _render(figure)


def chart(map_data: dict[str, Any], name: str) -> tuple[str, str, Floats]:
    """Plot the map coloured by one of :data:`MAPPED`.

    Returns:
        The image; the meaning of its colour; and the positions of its points, (n, 2), as shares of the image's width from the
        left and of its height from the top, equal for any colour.
    """
    xy = np.array([map_data["x"], map_data["y"]], np.float64).T
    score = np.array([np.nan if v is None else v for v in map_data[name]], np.float64)
    chosen = np.array(map_data["chosen"], bool)
    figure = _figure(4.2)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0.1, 0.11, 0.74, 0.86))
    low, high = xy.min(0), xy.max(0)
    margin = np.maximum(0.04 * (high - low), 1e-6)
    axes.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
    # A few outliers would otherwise use up the colour scale.
    span = np.nanpercentile(score, [2, 98]) if name != "chance" else np.array([max(float(np.nanmin(score)), -4.0), 0.0])
    colours: Any = {"cmap": "viridis", "vmin": span[0], "vmax": max(span[1], span[0] + 1e-6), "plotnonfinite": True}
    axes.scatter(*xy[~chosen].T, s=9, c=score[~chosen], linewidths=0, alpha=0.7, **colours)
    ringed = axes.scatter(*xy[chosen].T, s=17, c=score[chosen], edgecolors="#b91c1c", linewidths=0.7, **colours)
    axes.set_xlabel(f"first axis: {map_data['explained'][0]:.1%} of the variance", fontsize=8)
    axes.set_ylabel(f"second axis: {map_data['explained'][1]:.1%} of the variance", fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
    figure.colorbar(ringed, cax=figure.add_axes((0.87, 0.11, 0.025, 0.86))).ax.tick_params(labelsize=7)
    places = axes.transData.transform(xy) / np.array([figure.bbox.width, figure.bbox.height])
    return _render(figure), MAPPED[name], np.stack([places[:, 0], 1 - places[:, 1]], 1)


def _figure(height: float) -> Any:
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("the page's figures need matplotlib; pip install 'grace_ds[report]', or use --terminal") from error
    figure = Figure(figsize=(4.6, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def _axes() -> Axes:
    axes: Axes = _figure(2.9).add_subplot()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _uri(axes: Axes) -> str:
    return _render(axes.figure)


def _render(figure: Any) -> str:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    # Without a date and with a fixed salt, two reports of one run are byte-identical.
    with rc_context({"svg.hashsalt": "grace_ds", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
