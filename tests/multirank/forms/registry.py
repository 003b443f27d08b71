"""What a form is, what may come of it, and all of them by area."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

COLLECTED, FED, COUNTED, LEFT_OUT, REFUSED = "collected", "fed", "counted", "left out", "refused"
MEANING = {
    COLLECTED: "recognised; gradients and losses are put down to the right samples",
    FED: "the schedule's samples, in its order; nothing is collected",
    COUNTED: "not recognised: samples are counted by steps, nothing is collected, the log says so",
    LEFT_OUT: "what is not the schedule's, or not certain, is left out; the rest is collected",
    REFUSED: "refused, with the cure",
}


@dataclass(frozen=True)
class Form:
    """One form of a job.

    Attributes:
        name: of its function.
        area: heading that it stands under.
        what: the job does, for the page.
        outcome: what GRACE makes of it, a key of :data:`MEANING`.
        words: that the refusal or the warning holds.
        run: trains; returns what it saw.
    """

    name: str
    area: str
    what: str
    outcome: str
    words: str
    run: Callable[[], dict[str, Any]]


FORMS: list[Form] = []


def form(area: str, what: str, outcome: str = COLLECTED, words: str = "") -> Callable[[Callable[[], Any]], Any]:
    """Registers a form."""

    def register(run: Callable[[], Any]) -> Any:
        FORMS.append(Form(run.__name__, area, what, outcome, words, run))
        return run

    return register


def markdown() -> str:
    """The forms as tables, a heading an area."""
    lines: list[str] = ["| outcome | meaning |", "| --- | --- |"]
    lines += [f"| *{name}* | {meaning} |" for name, meaning in MEANING.items()]
    for area in dict.fromkeys(f.area for f in FORMS):
        lines += ["", f"## {area}", "", "| the job | outcome |", "| --- | --- |"]
        lines += [f"| {f.what} | {f.outcome} |" for f in FORMS if f.area == area]
    return "\n".join(lines) + "\n"
