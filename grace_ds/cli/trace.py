"""List the samples of one global batch, from the schedules that a run has kept: ``grace-ds trace``."""

from __future__ import annotations

import json
from pathlib import Path

from grace_ds.data.schedule import load_book
from grace_ds.errors import GraceError
from grace_ds.records import Role


def trace(where: str, step: int, *, as_json: bool = False) -> str:
    """Return the samples of optimizer step ``step`` (from 0) as text or JSON: position, id, role, weight, version.

    Args:
        where: a run_dir, its ``schedules`` folder, or the ``grace_ds`` folder of a checkpoint.
        step: number of the optimizer step.
        as_json: return JSON.

    Raises:
        GraceError: there are no schedules, or the step lies before the first of them.
    """
    folder = Path(where)
    for candidate in (folder / "schedules", folder / "grace_ds"):
        if candidate.is_dir():
            folder = candidate
            break
    book = load_book(folder)
    batch = int(book.schedules[0].meta["batch"])
    start = step * batch
    if step < 0 or start < book.schedules[0].start:
        first = -(-book.schedules[0].start // batch)
        raise GraceError(f"step {step} lies before the first schedule kept in {folder}; the first whole step there is {first}")
    slots = book.slots(start, batch)
    rows = [
        {
            "position": start + i,
            "id": int(slots.ids[i]),
            "role": Role(int(slots.roles[i])).name.lower(),
            "weight": round(float(slots.weights[i]), 6),
            "version": int(slots.versions[i]),
        }
        for i in range(batch)
    ]
    if as_json:
        return json.dumps({"step": step, "batch": batch, "samples": rows}, indent=1) + "\n"
    lines = [
        f"step {step}: positions {start} to {start + batch - 1}",
        "  position         id  role     weight  version",
    ]
    lines += [f"{r['position']:>10} {r['id']:>10}  {r['role']:<7} {r['weight']:>7.3f}  {r['version']:>7}" for r in rows]
    return "\n".join(lines) + "\n"
