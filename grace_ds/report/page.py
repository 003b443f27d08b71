"""Build the page: one self-contained HTML file, from the template ``page.html``.

All data of the run are escaped by the template; scripts run by digest only.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from grace_ds.report import chart, figures
from grace_ds.report.facts import Facts, Generation, facts
from grace_ds.report.load import Run, shown_from
from grace_ds.report.samples import GROUPS, rows, shown
from grace_ds.report.summary import cards, chosen_by, loss_verdict

SHOWN = 60  # refreshes in a table: the first and the latest


def page(run: Run) -> str:
    """Return the whole page as text.

    Raises:
        CheckpointError: the run's records do not have the form that a run gives them.
    """
    with shown_from(run.folder):
        return _page(run)


def _page(run: Run) -> str:
    template, style, *scripts = (
        files("grace_ds.report").joinpath(name).read_text("utf-8") for name in ("page.html", "style.css", "search.js", "map.js")
    )
    script, run_facts, explanation = "".join(scripts), facts(run), shown(run)
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    samples = [] if explanation is None else rows(run, explanation)
    histograms = [(figures.histograms(run, name), label) for name, label in figures.LABELS.items()]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'; "
        "base-uri 'none'; form-action 'none'",
        style=style,
        script=script,
        run=run,
        facts=run_facts,
        figures=figures,
        chart=chart,
        shown=SHOWN,
        cards=cards(run_facts),
        chosen_by=chosen_by(run, run_facts),
        loss_verdict=loss_verdict(run, run_facts),
        stages=_stages(run_facts),
        any_chosen=any(g.age is not None for g in run_facts.generations),
        generations=[_generation(g) for g in _some(run_facts.generations)],
        histograms=[(uri, label) for uri, label in histograms if uri is not None],
        idle=sum(not e.get("used") for e in run.explanations.values()),
        absent=[n for n in figures.LABELS if not any(n in e["histograms"] for e in run.explanations.values())],
        decisions=[_decision(g) for g in _some([g for g in run_facts.generations if g.level])],
        sources=[(n, f"{a:.1%}", f"{b:.1%}", f"{b / a:.2f}" if a else "–", "") for n, a, b in run_facts.shares[:200]],
        explanation=explanation,
        samples=samples,
        any_token_ids=any(row.text.startswith("token ids ") for row in samples),
        groups=GROUPS.values(),
        settings=json.dumps(run.config, indent=1, default=str),
    )


def _some(generations: list[Generation]) -> list[Generation]:
    """Return the refreshes that a table shows."""
    return generations if len(generations) <= SHOWN else [generations[0], *generations[1 - SHOWN :]]


def _stages(run_facts: Facts) -> list[tuple[str, ...]]:
    """Return stage, seconds, slowest, share and an empty cell of each stage, the longest first."""
    names = {name for g in run_facts.generations for name in g.seconds}
    stages = [(name, [g.seconds.get(name, 0.0) for g in run_facts.generations]) for name in names]
    total = sum(sum(seconds) for _, seconds in stages) or 1.0
    return [
        (name, f"{sum(seconds):.3f}", f"{max(seconds):.3f}", f"{sum(seconds) / total:.0%}", "")
        for name, seconds in sorted(stages, key=lambda s: (-sum(s[1]), s[0]))
    ]


def _generation(generation: Generation) -> tuple[str, ...]:
    return (
        str(generation.version),
        str(generation.step),
        f"{generation.size:,}",
        f"{generation.size / generation.window:.0%}" if generation.window else "–",
        "–" if generation.churn is None else f"{generation.churn:.0%}",
        "–" if generation.age is None else f"{generation.age.mean():.2f}",
        "uniform order" if generation.uniform else generation.level or "–",
    )


def _decision(generation: Generation) -> tuple[str, ...]:
    forms = {"effective_share": ".3f", "loss_share": ".3f", "core_minus_audit": "+.3f", "low": "+.3f", "high": "+.3f"}
    numbers = [format(generation.guard[key], form) if key in generation.guard else "–" for key, form in forms.items()]
    return (str(generation.version), str(generation.step), *numbers, f"{generation.level}: {generation.reason}")
