"""Describe the samples that a refresh has recorded: their text, and why they are likely or unlikely to be chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from grace_ds.report.load import Run

CHARACTERS = 300
GROUPS = {
    "most": "most kept",
    "least": "least kept",
    "chosen": "chosen, at random",
    "passed_over": "passed over, at random",
}


@dataclass(frozen=True)
class Row:
    """One sample; ``text`` is untrusted.

    Attributes:
        chance: relative to the likeliest sample of its window.
        role: in the schedule; None if it is not in the schedule.
    """

    id: int
    group: str
    chance: float | None
    role: str | None
    reason: str
    text: str


def shown(run: Run) -> dict[str, Any] | None:
    """Return the explanation whose samples are shown.

    This is the last one used to draw a coreset, or the last one if there is none.
    """
    used = [p for p in run.explanations.values() if p.get("used")]
    kept = used or list(run.explanations.values())
    return kept[-1] if kept else None


def rows(run: Run, explanation: dict[str, Any]) -> list[Row]:
    """Return the explanation's samples, with text if it is available."""
    return [
        Row(int(s["id"]), GROUPS.get(s["group"], str(s["group"])), s["chance"], s["role"], reason(s), text_of(run.decode, s))
        for s in explanation["samples"]
    ]


def reason(sample: dict[str, Any]) -> str:
    """Describe each factor of the chance, and the signal that it rests on."""
    f, s = sample["factors"], sample["signals"]
    parts = []
    if "quality" in f:
        parts.append(f"quality {f['quality']:.2f} ({_judged(f['quality'])})")
    if "copies" in f:
        copies = s["density"] or 0
        parts.append(f"× {f['copies']:.2f} " + (f"({copies:.0f} near-duplicates)" if copies >= 0.5 else "(no near-duplicate)"))
    if "loss" in f:
        loss = "loss unknown" if s["loss"] is None else f"loss {s['loss']:+.2f} to the mean"
        parts.append(f"× {f['loss']:.2f} ({loss})")
    if "influence" in f:
        influence = (
            "influence unknown" if s["influence"] is None else f"influence {s['influence']:+.1f} deviations from the trusted"
        )
        parts.append(f"× {f['influence']:.2f} ({influence})")
    if "crowding" in f:
        crowded = "no neighbours" if s.get("crowding") is None else f"density of the graph {s['crowding']:.2f}"
        parts.append(f"× {f['crowding']:.2f} ({crowded})")
    return " ".join(parts).removeprefix("× ") or "all samples alike"


def _judged(quality: float) -> str:
    if 0.2 <= quality <= 0.8:
        return "at the filter's edge"
    return "like the trusted set" if quality > 0.8 else "unlike the trusted set"


def text_of(decode: Callable[[list[int]], str] | None, sample: dict[str, Any]) -> str:
    """Return the recorded text of a sample, or its token ids, decoded if possible.

    Untrusted; empty without either.
    """
    if isinstance(sample.get("text"), str):
        return str(sample["text"])[:CHARACTERS]
    tokens = sample.get("tokens")
    if not isinstance(tokens, list):
        return ""
    if decode is not None:
        try:
            return decode([int(t) for t in tokens])[:CHARACTERS]
        except (ValueError, TypeError, OverflowError):
            pass  # ids that the tokenizer does not know are shown as they are
    return "token ids " + " ".join(str(t) for t in tokens)[: CHARACTERS - 10]
