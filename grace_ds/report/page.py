"""Build the page: one self-contained HTML file.  All data of the run are escaped; scripts run by digest only."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from grace_ds.report import chart, figures
from grace_ds.report.facts import Facts, Generation, facts
from grace_ds.report.load import Run
from grace_ds.report.samples import GROUPS, Row, rows, shown
from grace_ds.report.summary import cards, chosen_by, loss_verdict

SHOWN = 60  # refreshes in the table: the first and the latest


def page(run: Run) -> str:
    """Return the whole page as text."""
    run_facts = facts(run)
    style, *scripts = (
        files("grace_ds.report").joinpath(name).read_text("utf-8") for name in ("style.css", "search.js", "map.js")
    )
    script = "".join(scripts)
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'; "
        "base-uri 'none'; form-action 'none'"
    )
    name = escape(str(run.folder))
    body = "".join(
        (
            _summary(run, run_facts),
            _loss(run, run_facts),
            _cost(run_facts),
            _coreset(run_facts),
            _signals(run),
            _guard(run_facts),
            _sources(run, run_facts),
            _section("Map", chart.body(run)),
            _samples(run),
            _rest(run),
        )
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>GRACE: {name}</title><style>{style}</style></head><body>"
        f"<header><h1>What GRACE chose, why, and what it cost</h1><p class=dim>{name}</p></header>"
        f"<main>{body}</main><script>{script}</script></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _figure(uri: str, alt: str, caption: str = "") -> str:
    under = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img src="{uri}" alt="{escape(alt)}">{under}</figure>'


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a table with escaped cells; all columns except the first and the last are numbers."""
    last = len(head) - 1

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = (' class="n"' if 0 < i < last else "" for i in range(len(cells)))
        return "<tr>" + "".join(f"<{tag}{kind}>{escape(c)}</{tag}>" for kind, c in zip(kinds, cells, strict=True)) + "</tr>"

    inside = "".join(line(cells, "td") for cells in body)
    return f'<div class="wide"><table><thead>{line(head, "th")}</thead><tbody>{inside}</tbody></table></div>'


def _summary(run: Run, run_facts: Facts) -> str:
    boxes = "".join(
        f'<div class="card"><span>{escape(label)}</span><b>{escape(value)}</b><span>{escape(under)}</span></div>'
        for label, value, under in cards(run_facts)
    )
    return f'<section><div class="cards">{boxes}</div><p>{escape(chosen_by(run, run_facts))}</p></section>'


def _loss(run: Run, run_facts: Facts) -> str:
    paragraph = f"<p>{escape(loss_verdict(run, run_facts))}</p>"
    if not run.curves:
        return _section("Loss", paragraph)
    return _section(
        "Loss", f'<div class="figures">{_figure(figures.loss(run), "loss of each arm against steps")}</div>{paragraph}'
    )


def _cost(run_facts: Facts) -> str:
    if not run_facts.generations:
        return _section("What it cost", "<p>No refresh is recorded.</p>")
    names = {s for g in run_facts.generations for s in g.seconds}
    stages = [(name, [g.seconds.get(name, 0.0) for g in run_facts.generations]) for name in names]
    total = sum(sum(seconds) for _, seconds in stages) or 1.0
    lines = [
        (name, f"{sum(seconds):.3f}", f"{max(seconds):.3f}", f"{sum(seconds) / total:.0%}", "")
        for name, seconds in sorted(stages, key=lambda s: (-sum(s[1]), s[0]))
    ]
    table = _table(("stage", "seconds", "slowest", "share", ""), lines)
    picture = _figure(
        figures.overhead(run_facts), "seconds of each refresh by stage", "The first refresh reads the whole window."
    )
    note = (
        '<p class="dim">Seconds of rank 0, refreshes that count. The collection happens in the training steps, the trusted basis '
        "before the first stage: both are in the totals above, not in the stages. “explanation” is what is kept for this page, "
        "but for reading the samples' texts.</p>"
    )
    return _section("What it cost", f'<div class="figures">{picture}<div>{table}</div></div>{note}')


def _coreset(run_facts: Facts) -> str:
    if not run_facts.generations:
        return _section("Coreset", "<p>No refresh is recorded.</p>")
    chosen = [g for g in run_facts.generations if g.age is not None]
    picture = _figure(figures.coreset(run_facts), "churn and age of the core by refresh") if chosen else ""
    none = "" if chosen else "<p>No schedule was chosen (or none can be read): there is no churn and no age.</p>"
    gap = "" if len(run_facts.generations) <= SHOWN else f'<p class="dim">The first and the latest {SHOWN - 1} refreshes.</p>'
    kept = (
        run_facts.generations
        if len(run_facts.generations) <= SHOWN
        else [run_facts.generations[0], *run_facts.generations[1 - SHOWN :]]
    )
    head = ("schedule", "step", "coreset", "of window", "churn", "mean age", "level")
    table = _table(head, [_generation(g) for g in kept])
    explanation = (
        '<p class="dim">Churn: share of a scheduled core that the schedule before did not hold. Age: schedules in a row that a '
        "sample has stood in. Both count scheduled samples; a coreset may hold more than its schedule has slots for.</p>"
    )
    return _section("Coreset", f'<div class="figures">{picture}<div>{none}{table}{gap}</div></div>{explanation}')


def _generation(generation: Generation) -> tuple[str, ...]:
    churn = "–" if generation.churn is None else f"{generation.churn:.0%}"
    age = "–" if generation.age is None else f"{generation.age.mean():.2f}"
    share = f"{generation.size / generation.window:.0%}" if generation.window else "–"
    return (
        str(generation.version),
        str(generation.step),
        f"{generation.size:,}",
        share,
        churn,
        age,
        "uniform order" if generation.uniform else generation.level or "–",
    )


def _signals(run: Run) -> str:
    pictures = []
    for name, label in figures.LABELS.items():
        uri = figures.histograms(run, name)
        if uri is not None:
            pictures.append(_figure(uri, f"histograms by refresh: {label}"))
    if not pictures:
        return _section("Signals", "<p>No histogram was kept: no refresh of this run has weighed a sample.</p>")
    idle = [p for p in run.explanations.values() if not p.get("used")]
    note = f" {len(idle)} of {len(run.explanations)} weighed the window but trained on it uniformly." if idle else ""
    more = f" {figures.PANELS} refreshes of {len(run.explanations)} are drawn." if len(run.explanations) > figures.PANELS else ""
    absent = [name for name in figures.LABELS if not any(name in p["histograms"] for p in run.explanations.values())]
    unknown = f" Not known in this run: {', '.join(absent)}." if absent else ""
    legend = f"<p>Grey: the window. Blue: what the schedule took from it. Each sums to one.{note}{more}{unknown}</p>"
    return _section("Signals", f'{legend}<div class="figures">{"".join(pictures)}</div>')


def _guard(run_facts: Facts) -> str:
    decided = [g for g in run_facts.generations if g.level]
    if not decided:
        return _section("The guard", "<p>No decision is recorded: no refresh of this run has weighed a sample.</p>")

    def number(generation: Generation, key: str, form: str) -> str:
        return format(generation.guard[key], form) if key in generation.guard else "–"

    head = ("schedule", "step", "effective share", "losses' share", "core − audit", "low", "high", "level: reason")
    lines = [
        (
            str(g.version),
            str(g.step),
            *(number(g, key, ".3f") for key in ("effective_share", "loss_share")),
            *(number(g, key, "+.3f") for key in ("core_minus_audit", "low", "high")),
            f"{g.level}: {g.reason}",
        )
        for g in (decided if len(decided) <= SHOWN else [decided[0], *decided[1 - SHOWN :]])
    ]
    explanation = (
        '<p class="dim">Effective share: 1 where content finds nothing to leave out. Losses\' share: of what losses pass. '
        "Core − audit: by how much more chosen samples lower the trusted loss than unchosen ones (recipe grace only), with its "
        "bootstrap interval.</p>"
    )
    return _section("The guard", _table(head, lines) + explanation)


def _sources(run: Run, run_facts: Facts) -> str:
    if not run_facts.shares:
        unnamed = "this run names none; give --sources FILE.npy, one label a sample"
        why = "no schedule was chosen" if run.sources is not None else unnamed
        return _section("Sources", f"<p>Not shown: {why}.</p>")
    table = _table(
        ("source", "share of pool", "share of chosen", "factor", ""),
        [(n, f"{a:.1%}", f"{b:.1%}", f"{b / a:.2f}" if a else "–", "") for n, a, b in run_facts.shares[:200]],
    )
    picture = _figure(figures.shares(run_facts), "share of each source in pool and coreset")
    return _section("Sources", f'<div class="figures">{picture}<div>{table}</div></div>')


def _samples(run: Run) -> str:
    explanation = shown(run)
    if explanation is None:
        return _section("Samples", "<p>No sample was kept to be shown.</p>")
    table = rows(run, explanation)
    head = "".join(f"<th>{label}</th>" for label in ("Sample", "Group", "Chance", "Why", "Text"))
    body = "".join(map(_sample, table))
    options = "".join(f"<option>{escape(label)}</option>" for label in GROUPS.values())
    bare = "" if any(r.text for r in table) else " The dataset shows neither text nor token ids."
    ids = any(r.text.startswith("token ids ") for r in table)
    bare += " Give --tokenizer tokenizer.json to read them as text." if ids else ""
    used = "" if explanation.get("used") else " That schedule was uniform all the same: this is what the filter says."
    return _section(
        "Samples",
        f"<p>From schedule {int(explanation['version'])} at step {int(explanation['step'])}.{used}{bare} "
        "Chance is relative to the likeliest sample; the factors multiply to it, but for one constant.</p>"
        '<p><label>Search <input id="search" type="search" placeholder="words, an id, a reason"></label> '
        f'<label>Group <select id="group"><option value="">all</option>{options}</select></label> '
        '<span id="found" class="dim" role="status"></span></p>'
        f'<div class="wide"><table id="samples"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>',
    )


def _sample(row: Row) -> str:
    """Return a row of the table; only ``row.id`` is known to be safe, all other values are escaped."""
    place = f"in the schedule as {row.role}" if row.role else "not in the schedule"
    chance = "–" if row.chance is None else f"{row.chance:.3g}"
    return (
        f'<tr data-group="{escape(row.group)}"><td data-label="Sample">{row.id}</td>'
        f'<td data-label="Group">{escape(row.group)}; {escape(place)}</td><td data-label="Chance">{chance}</td>'
        f'<td data-label="Why">{escape(row.reason)}</td><td data-label="Text"><pre>{escape(row.text)}</pre></td></tr>'
    )


def _rest(run: Run) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in run.notes)
    missing = _section("What this page could not show", f"<ul>{notes}</ul>") if notes else ""
    if not run.config:
        return missing
    settings = escape(json.dumps(run.config, indent=1, default=str))
    return missing + _section("Settings", f"<details><summary>the resolved config</summary><pre>{settings}</pre></details>")
