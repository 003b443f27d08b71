"""The tables of docs/support.md, made from the cells and modes on record: ``python -m tests.multirank.support_page``."""

from __future__ import annotations

import json

from tests.multirank.cells import ALONE, CLOSE, EQUAL, PARALLEL, REASONS, RECIPE, RECORD, REFUSED, ZERO, Cell, chosen
from tests.multirank.harness import ROOT
from tests.multirank.modes import MODES

PAGE = ROOT / "docs" / "support.md"
BEGIN, END = "<!-- made by tests.multirank.support_page -->\n", "<!-- end of what is made -->\n"
WORDS = {EQUAL: "yes", CLOSE: "in line", ALONE: "yes"}
MARKS = dict(zip(REASONS, "abcdefgh", strict=False))


def tables() -> str:
    """Layouts with each recipe, then modes, then the reasons."""
    record = json.loads(RECORD.read_text())
    lines: list[str] = []
    for recipe in RECIPE:
        lines += ["", f"### Layouts, `recipe: {recipe}`", "", "| | " + " | ".join(f"ZeRO {zero}" for zero in ZERO) + " |"]
        lines += ["| --- |" + " --- |" * len(ZERO)]
        for parallel in PARALLEL:
            found = [_cell([record["matrix"][c.name] for c in _tried(zero, parallel, recipe)]) for zero in ZERO]
            lines.append(f"| {parallel} | " + " | ".join(found) + " |")
    lines += [
        "",
        "### Modes of the engine, on two data-parallel ranks",
        "",
        "| | | `content` | `grace` |",
        "| --- | --- | --- | --- |",
    ]
    for name, mode in MODES.items():
        found = [_cell([x] if (x := record["modes"].get(f"{name}, {recipe}")) else []) for recipe in RECIPE]
        lines.append(f"| {mode.area} | {mode.what} | " + " | ".join(found) + " |")
    lines += ["", *(f"({MARKS[key]}) {reason.text}.  " for key, reason in REASONS.items())]
    return "\n".join(lines).strip() + "\n"


def _tried(zero: str, parallel: str, recipe: str) -> list[Cell]:
    return [c for c in chosen() if (c.zero, c.parallel, c.recipe) == (zero, parallel, recipe)]


def _cell(outcomes: list[str]) -> str:
    """The entry for what was tried: the worst of it; a dash for nothing."""
    words = sorted({f"({MARKS[x.removeprefix(REFUSED)]})" if x.startswith(REFUSED) else WORDS[x] for x in outcomes})
    return words[0] if words else "–"


def page(text: str) -> str:
    """A page with its made part replaced."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + tables() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
