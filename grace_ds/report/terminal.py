"""Print the report in a terminal, with rich."""

from __future__ import annotations

import io
from typing import Any

from grace_ds.errors import ConfigError
from grace_ds.report.facts import facts
from grace_ds.report.load import Run, shown_from
from grace_ds.report.samples import rows, shown
from grace_ds.report.summary import cards, chosen_by, loss_verdict
from grace_ds.utils.screen import plain

_SAMPLES = 3  # of each group


def terminal(run: Run, width: int | None = None, colour: bool = False) -> str:
    """Return the main numbers, the guard's decisions and a few samples as text for a terminal.

    Raises:
        CheckpointError: the run's records do not have the form that a run gives them.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        raise ConfigError("--terminal needs rich; pip install 'grace_ds[report]'") from error
    buffer = io.StringIO()
    with shown_from(run.folder):
        _print(run, Console(file=buffer, width=width, force_terminal=colour, highlight=False))
    return buffer.getvalue()


def _print(run: Run, console: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    def text(words: str) -> Any:
        return Text(plain(words))  # never markup: a sample may contain [red] or control characters

    run_facts = facts(run)
    numbers = Table(title=text(str(run.folder)), show_header=False)
    for cells in cards(run_facts):
        numbers.add_row(*(text(c) for c in cells))
    console.print(numbers)
    for line in (chosen_by(run, run_facts), loss_verdict(run, run_facts)):
        console.print(text(line))
    table = Table("schedule", "step", "coreset", "churn", "seconds", "level", title="refreshes")
    for g in run_facts.generations[-20:]:
        churn = "–" if g.churn is None else f"{g.churn:.0%}"
        level = "uniform order" if g.uniform else g.level
        table.add_row(*map(text, (str(g.version), str(g.step), f"{g.size:,}", churn, f"{sum(g.seconds.values()):.3f}", level)))
    console.print(table)
    explanation = shown(run)
    if explanation is not None:
        samples, shown_per_group = Table("group", "sample", "why", "text", title="samples"), dict[str, int]()
        for row in rows(run, explanation):
            shown_per_group[row.group] = shown_per_group.get(row.group, 0) + 1
            if shown_per_group[row.group] <= _SAMPLES:
                samples.add_row(*map(text, (row.group, str(row.id), row.reason, row.text[:120])))
        console.print(samples)
    for note in run.notes:
        console.print(text(f"– {note}"))
