"""List the samples of one global batch, from the schedules that a run has kept: ``grace-ds trace``."""

from __future__ import annotations

import itertools
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from grace_ds.data.schedule import ScheduleBook, load_book
from grace_ds.errors import DataError, GraceError
from grace_ds.integrations.checkpoint_state import MANIFEST
from grace_ds.monitor.trained import Trained, read_trained
from grace_ds.records import Role, Schedule
from grace_ds.report.load import Options, decoder, explanations, read_map, shown_from
from grace_ds.report.samples import reason, text_of
from grace_ds.utils.reading import opened, parse_json, read_json, read_npy, read_yaml
from grace_ds.utils.screen import plain

_ROLES = {
    Role.CORE: "chosen",
    Role.EXPLORE: "from outside of the coreset, to learn about it",
    Role.AUDIT: "drawn uniformly, to compare the chosen ones with",
}
_TOKENS = 96  # of a sample of ``--data`` that are decoded
_NARROWEST = 40
_LINE = 1 << 26  # bytes of a line of ``--data``, at most
_LARGEST_BATCH = 1 << 24  # samples of a step: each is listed


@dataclass(frozen=True)
class Shown:
    """What tells the samples' text where the run has not kept it.

    Attributes:
        data: the dataset, .jsonl or .npy (n, tokens), in the order of its ids; None: the quickstart's, if there is one.
        tokenizer: a ``tokenizer.json``; None: the quickstart's, if there is one.
    """

    data: Path | None = None
    tokenizer: Path | None = None


def trace(where: str, step: int, shown: Shown | None = None, *, as_json: bool = False, width: int = 110) -> str:
    """Return the samples of optimizer step ``step`` (from 0) as text or JSON.

    Of each: position, id, role, weight, version of the schedule, reason, and the start of the text (null if it is not known).

    Args:
        where: a run_dir, its ``schedules`` folder, the ``grace_ds`` folder of a checkpoint, or the ``--out`` folder of a
            quickstart.
        step: number of the optimizer step.
        shown: what tells the text.
        as_json: return JSON.
        width: columns of the text.

    Raises:
        GraceError: there are no schedules, or the run has not trained on this step; of a checkpoint, its schedules do not
            reach this step.
    """
    shown, folder = shown or Shown(), schedules_of(Path(where))
    run_dir = folder.parent if folder.name == "schedules" else folder
    book = load_book(folder, run_dir)
    batch = _batch(book, folder)
    if any(schedule.meta["batch"] != batch for schedule in book.schedules):
        raise GraceError(
            f"the batch has changed in the run of {folder}, so the samples of a step cannot be counted; read the positions that "
            "the job has logged, or replay the run"
        )
    start = step * batch
    if step < 0 or start < book.schedules[0].start:
        first = -(-book.schedules[0].start // batch)
        raise GraceError(f"step {step} lies before the first schedule kept in {folder}; the first whole step there is {first}")
    saved = _saved(run_dir)
    trained = None if saved is not None else read_trained(run_dir)
    _refuse_untrained(book, trained, step, batch, folder)
    slots, schedules = book.slots(start, batch), {schedule.version: schedule for schedule in book.schedules}
    with shown_from(run_dir):
        accounts = _Accounts(run_dir, shown, sorted(set(slots.ids.tolist())))
        rows: list[dict[str, Any]] = [
            {
                "position": start + i,
                "id": int(slots.ids[i]),
                "role": Role(int(slots.roles[i])).name.lower(),
                "weight": round(float(slots.weights[i]), 6),
                "version": int(slots.versions[i]),
                "reason": accounts.reason(int(slots.ids[i]), Role(int(slots.roles[i])), schedules[int(slots.versions[i])]),
                "text": accounts.text(int(slots.ids[i])),
            }
            for i in range(batch)
        ]
    drawn = any(schedules[row["version"]].meta.get("objective") == "sample" for row in rows)
    notes = ["weight: 1 / the chance of being drawn, 1 in the mean over the coreset"] if drawn else []
    notes += _notes(run_dir, trained, saved, step, rows)
    if as_json:
        return json.dumps({"step": step, "batch": batch, "samples": rows, "notes": notes}, indent=1) + "\n"
    with shown_from(run_dir):
        made = [_made(schedules[version]) for version in sorted(set(slots.versions.tolist()))]
    return _text(step, rows, [*made, *notes], max(width, _NARROWEST))


def schedules_of(where: Path) -> Path:
    """Return the folder of the schedules at or below ``where``.

    Raises:
        GraceError: there is no such folder, or it holds no run.
    """
    if not where.is_dir():
        raise GraceError(f"there is no folder {where}; give the one that run_dir names in the job's grace block")
    # The last two are of a quickstart's --out folder.
    for below in ("schedules", "grace_ds", "grace/grace/schedules", "grace/schedules"):
        if (where / below).is_dir():
            return where / below
    return where


def _batch(book: ScheduleBook, folder: Path) -> int:
    """Return the samples of a step, by the first schedule.

    Raises:
        GraceError: a schedule does not say it.
    """
    for schedule in book.schedules:
        batch = schedule.meta.get("batch")
        if type(batch) is not int or not 0 < batch <= _LARGEST_BATCH:
            raise GraceError(f"schedule {schedule.version} of {folder} says that a step has {batch!r} samples; restore it")
    first: int = book.schedules[0].meta["batch"]
    return first


def _saved(folder: Path) -> Trained | None:
    """Return where the run of a checkpoint stood when it was saved; None if ``folder`` is none of a checkpoint."""
    try:
        manifest = read_json(folder / MANIFEST, root=folder)
        return Trained(int(manifest["step"]), int(manifest["cursor"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None


def _refuse_untrained(book: ScheduleBook, trained: Trained | None, step: int, batch: int, folder: Path) -> None:
    if trained is not None and step >= trained.step:
        raise GraceError(f"step {step} was never trained on: the run of {folder} made {trained.step}; give a step below that")
    end = (book.schedules[-1].start + len(book.schedules[-1])) // batch
    if trained is None and step >= end:
        raise GraceError(f"step {step} lies beyond the last schedule kept in {folder}; give a step below {end}")


def _notes(run_dir: Path, trained: Trained | None, saved: Trained | None, step: int, rows: list[dict[str, Any]]) -> list[str]:
    notes: list[str] = []
    try:
        config = yaml.safe_load(read_yaml(run_dir / "grace_resolved.yaml", root=run_dir))
        if isinstance(config, dict) and config.get("mode") == "shadow":
            notes.append("Shadow mode: the job trained in its own order; these samples are those that would have been given.")
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        pass  # a checkpoint, or a folder of schedules alone
    if saved is not None and step >= saved.step:
        ahead = "a run that goes on from it trains on these samples, unless it refreshes before"
        notes.append(f"The checkpoint is of step {saved.step}: {ahead}.")
    if trained is None and saved is None:
        notes.append("The run has not recorded how far it trained: the step is in its schedule, and may lie after its end.")
    silent = sum(row["text"] is None for row in rows)
    if silent:
        notes.append(f"Of {silent} of {len(rows)} samples the run has kept no text; --data FILE shows it.")
    return notes


def _made(schedule: Schedule) -> str:
    """Return in words when a schedule was made, of what, and what the guard said."""
    meta = schedule.meta
    uniform = meta.get("objective") == "uniform"
    what = "all of them in uniform order" if uniform else f"{meta.get('coreset')} chosen by recipe {meta.get('drawn_by')}"
    said = str((meta.get("guard") or {}).get("reason") or "")
    when = f"schedule {schedule.version}, made at step {meta.get('decided_at_step')}: of {meta.get('window')} samples {what}"
    return f"{when} ({said})" if said else when


class _Accounts:
    """What the run has kept about samples, and what the dataset tells.

    Args:
        run_dir: with ``reports``, or without.
        shown: files that the user names.
        ids: the samples in question, sorted.
    """

    def __init__(self, run_dir: Path, shown: Shown, ids: list[int]) -> None:
        notes: list[str] = []  # a damaged report is as good as none here
        self.decode = decoder(Options(tokenizer=shown.tokenizer), run_dir, notes)
        reports = explanations(run_dir, notes)
        self.weighed = {(version, int(s["id"])): s for version, report in reports.items() for s in report["samples"]}
        self.kept: dict[int, dict[str, Any]] = {}
        self.mapped: dict[tuple[int, int], str] = {}
        if (chart := read_map(run_dir, notes)) is not None:
            self.kept = dict(zip(chart["ids"], chart["shown"], strict=True))
            values = zip(chart["ids"], chart["chance"], chart["influence"], strict=True)
            self.mapped = {(chart["version"], sample): _on_the_map(*value) for sample, *value in values}
        self.kept |= {sample: entry for (_, sample), entry in self.weighed.items()}
        data = shown.data
        if data is None and (own := run_dir.parent.parent / "data" / "train.npy").is_file():
            data = own
        self.items = _read(data, ids) if data is not None else {}

    def reason(self, sample: int, role: Role, schedule: Schedule) -> str:
        """Return why a sample stands in a schedule."""
        if schedule.meta.get("objective") == "uniform":
            return "nothing was chosen: uniform order"
        key = (schedule.version, sample)
        why = reason(self.weighed[key]) if key in self.weighed else self.mapped.get(key, "")
        return _ROLES[role] + (f": {why}" if why else "")

    def text(self, sample: int) -> str | None:
        """Return the start of a sample's text, or its token ids; None if they are not known.  Untrusted."""
        known: dict[str, Any] = self.items.get(sample) or self.kept.get(sample) or {}
        return text_of(self.decode, known) or None


def _on_the_map(chance: float | None, influence: float | None) -> str:
    """Return what the report's map tells of a sample; ``chance`` is a log10 relative to the likeliest sample."""
    parts = [f"chance {10**chance:.2g} of the likeliest sample's"] if chance is not None else []
    parts += [f"influence {influence:+.1f} deviations from the trusted"] if influence is not None else []
    return ", ".join(parts)


def _read(data: Path, ids: list[int]) -> dict[int, dict[str, Any]]:
    """Return ``text`` or ``tokens`` of the samples ``ids`` of a dataset's file.

    Raises:
        DataError: the file cannot be read, or has too few samples.
    """
    wanted = "give .jsonl with text or input_ids, one sample a line in the order of the dataset, or .npy of shape (n, tokens)"
    found: dict[int, dict[str, Any]] = {}
    try:
        if data.suffix == ".npy":
            array = read_npy(data, mapped=True)
            return {i: {"tokens": array[i, :_TOKENS].tolist()} for i in ids}
        left = set(ids)
        with opened(data, 1 << 62) as file:
            for number in itertools.count():
                line = file.readline(_LINE)
                if not line or len(line) == _LINE:
                    break
                if number in left:
                    item = parse_json(line)
                    found[number] = {"text": item["text"]} if "text" in item else {"tokens": item["input_ids"][:_TOKENS]}
                    left.discard(number)
                if not left:
                    return found
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        said = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise DataError(f"--data {data} cannot be used ({said}); {wanted}") from error
    raise DataError(f"--data {data} has no sample {min(left)}: it is not the dataset of this run; {wanted}")


def _text(step: int, rows: list[dict[str, Any]], notes: list[str], width: int) -> str:
    first, last = rows[0]["position"], rows[-1]["position"]
    lines = [
        f"step {step}: positions {first} to {last}",
        *(textwrap.fill(plain(note), width, subsequent_indent="  ") for note in notes),
        "  position         id  role     weight  version",
    ]
    for r in rows:
        lines.append(f"{r['position']:>10} {r['id']:>10}  {r['role']:<7} {r['weight']:>7.3f}  {r['version']:>7}")
        lines.append(textwrap.fill(plain(r["reason"]), width, initial_indent="    why   ", subsequent_indent=" " * 10))
        if r["text"] is not None:
            lines.append(_two_lines(plain(r["text"]), width))
    return "\n".join(lines) + "\n"


def _two_lines(text: str, width: int) -> str:
    """Return the start of a text on two lines at most."""
    return textwrap.fill(
        text,
        width,
        initial_indent="    text  ",
        subsequent_indent=" " * 10,
        max_lines=2,
        placeholder=" …",
        break_on_hyphens=False,
    )
