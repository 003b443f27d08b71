"""The same in a shell, by rich."""

from __future__ import annotations

import io

from grace_ds.errors import ConfigError
from grace_ds.report.facts import facts
from grace_ds.report.load import Run
from grace_ds.report.samples import rows, shown
from grace_ds.report.summary import cards, chosen_by, loss_said

_SAMPLES = 3  # of each group


def terminal(run: Run, width: int | None = None, colour: bool = False) -> str:
    """The chief numbers, the guard's decisions and a few samples."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise ConfigError("--terminal needs rich; pip install 'grace_ds[report]'") from error
    found, out = facts(run), io.StringIO()
    # Text, never markup: a sample may hold [red] or control characters.
    console = Console(file=out, width=width, force_terminal=colour, highlight=False)
    numbers = Table(title=Text(str(run.folder)), show_header=False)
    for cells in cards(run, found):
        numbers.add_row(*(Text(c) for c in cells))
    console.print(numbers)
    for line in (chosen_by(run, found), loss_said(run, found)):
        console.print(Text(line))
    table = Table("schedule", "step", "coreset", "churn", "seconds", "level", title="refreshes")
    for g in found.generations[-20:]:
        churn = "–" if g.churn is None else f"{g.churn:.0%}"
        level = "uniform order" if g.uniform else g.level
        table.add_row(*map(Text, (str(g.version), str(g.step), f"{g.size:,}", churn, f"{sum(g.seconds.values()):.3f}", level)))
    console.print(table)
    explanation = shown(run)
    if explanation is not None:
        samples, taken = Table("group", "sample", "why", "text", title="samples"), dict[str, int]()
        for row in rows(run, explanation):
            taken[row.group] = taken.get(row.group, 0) + 1
            if taken[row.group] <= _SAMPLES:
                samples.add_row(*map(Text, (row.group, str(row.id), row.reason, _plain(row.text)[:120])))
        console.print(samples)
    for note in run.notes:
        console.print(Text(f"– {note}"))
    return out.getvalue()


def _plain(text: str) -> str:
    """On one line, without what a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
