"""Record what a run does: its totals, the ``Grace/*`` events of each refresh, the schedules kept in ``run_dir``.

Nothing here may stop training: if something cannot be written, a warning goes to the log.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from grace_ds.config.load import write_resolved
from grace_ds.config.schema import GraceConfig
from grace_ds.data.schedule import put_aside, save_schedule
from grace_ds.data.tokens import tokens_of
from grace_ds.errors import DataError
from grace_ds.gradients.collector import GradientCollector
from grace_ds.monitor.trained import TrainedRecord
from grace_ds.recipes import depth
from grace_ds.records import IntArray, Role, Schedule
from grace_ds.refresh.line import RefreshResult
from grace_ds.utils.files import folder_below, open_below, write_atomic
from grace_ds.utils.reading import read_json
from grace_ds.utils.rng import undisturbed_rng

log = logging.getLogger("grace_ds")

PREVIEW_CHARACTERS, PREVIEW_TOKENS = 300, 96
PREVIEW_SECONDS = 10.0  # most time that rank 0 reads the dataset for one explanation; the other ranks wait in the next step
MAP, MAP_CHARACTERS, MAP_TOKENS = "map.json", 160, 48
Preview = Callable[[int], dict[str, Any]]  # dataset id → entries beside its reasons
EventWriter = Callable[[dict[str, float], int], None]  # events by name, samples trained on so far


@dataclass
class Metrics:
    """Totals of a run on this rank; ``events`` of the last refresh go to the engine's monitor as ``Grace/*``.

    Attributes:
        collected_rows: rows of gradients that all ranks have collected and gathered, at refreshes.
        gathered_bytes: bytes that all ranks have passed to the transport for it.
        propagated_rows: samples of all ranks without a row of their own that the last refresh has reached along the graph.
        graph_builds, graph_repairs: how often the graph was built, and how often it was repaired.
        graph_first_seconds: duration of the last build.
        graph_repair_seconds: mean duration of the repairs since; 0 before the first.
    """

    refreshes: int = 0
    refresh_failures: int = 0
    refresh_seconds: float = 0.0
    collect_seconds: float = 0.0
    train_seconds: float = 0.0
    coreset_size: int = 0
    churn: list[float] = field(default_factory=list)
    version: int = -1
    collected_rows: int = 0
    gathered_bytes: int = 0
    propagated_rows: int = 0
    graph_builds: int = 0
    graph_repairs: int = 0
    graph_first_seconds: float = 0.0
    graph_repair_seconds: float = 0.0
    events: dict[str, float] = field(default_factory=dict)

    def count(self, schedule: Schedule, previous: Schedule | None) -> None:
        """Count a refresh that has published ``schedule`` after ``previous``."""
        self.version, self.refreshes = schedule.version, self.refreshes + 1
        self.coreset_size = int(schedule.meta["coreset"])
        if previous is not None:
            self.churn.append(1.0 - float(np.isin(_core(schedule), _core(previous)).mean()))

    def report(self, seconds: float, outcome: RefreshResult | None, collector: GradientCollector | None) -> None:
        """Make the events of a refresh that took ``seconds``.

        Args:
            outcome: of the refresh; None if it was given up.
            collector: of this rank; None if nothing is collected.
        """
        events = {
            "version": float(self.version),
            "refresh_seconds": seconds,
            "refresh_failures": float(self.refresh_failures),
            "coreset_size": float(self.coreset_size),
            "churn": self.churn[-1] if self.churn else 1.0,
        }
        if collector is not None:
            self.collect_seconds = collector.total_seconds
            events["collect_seconds"] = self.collect_seconds
            events["collect_peak_bytes"] = float(collector.sketcher.peak_bytes)
        if outcome is not None:
            self._add_up(outcome)
            events |= {f"stage_seconds/{name}": value for name, value in outcome.seconds.items()}
            events |= dict(outcome.counts)
            share = outcome.schedule.meta.get("effective_share")
            if share is not None:
                events["effective_share"] = float(share)
                events["effective_samples"] = float(share) * int(outcome.schedule.meta["window"])
            if "labels" in outcome.schedule.meta:
                events["unknown_influence"] = 1 - int(outcome.schedule.meta["known_influence"]) / int(
                    outcome.schedule.meta["window"]
                )
            if "source_factors" in outcome.schedule.meta and "sources" in outcome.schedule.meta:
                sources = outcome.schedule.meta["sources"]
                total = max(sum(sources["coreset"]), 1)
                shares = zip(sources["names"], sources["coreset"], strict=True)
                events |= {f"source_share/{name}": count / total for name, count in shares}
            guard = outcome.schedule.meta.get("guard", {})
            if guard:
                # 0 is uniform, so a curve at 0 shows that the guard has stepped all the way down.
                events["guard/level"] = float(depth(guard["level"]))
            keys = ("loss_share", "core_minus_audit", "low", "high", "prediction_skill")
            events |= {f"guard/{key}": float(guard[key]) for key in keys if key in guard}
        self.events = events

    def _add_up(self, outcome: RefreshResult) -> None:
        """Add a successful refresh to the totals."""
        counts, seconds, graph = outcome.counts, outcome.seconds.get("graph", 0.0), outcome.kept.graph
        self.collected_rows += int(counts["received"])
        self.gathered_bytes += int(counts["gathered_bytes"])
        self.propagated_rows = int(counts.get("propagated", 0))
        if graph is None:
            return
        if graph.change == "built":
            self.graph_builds += 1
            self.graph_first_seconds = seconds
        else:
            self.graph_repairs += 1
            self.graph_repair_seconds += (seconds - self.graph_repair_seconds) / self.graph_repairs


def keep_config(config: GraceConfig) -> None:
    """Keep the resolved config in its ``run_dir``."""
    try:
        write_resolved(config, str(config.run_dir))
    except OSError as error:
        log.warning("the resolved config could not be kept in %s (%s); training goes on", config.run_dir, error)


class Recorder:
    """Records what a run does.

    Args:
        run_dir: where every schedule is kept for ``trace`` and ``replay``, with a line about its refresh; None: nowhere.
        write_events: receives the events; None: they are dropped.
        preview: returns what the dataset shows of a sample, JSON-able, to stand beside its reasons; None: nothing is shown.
    """

    def __init__(self, run_dir: str | None, write_events: EventWriter | None, preview: Preview | None = None) -> None:
        self.run_dir, self.write_events, self.preview = run_dir, write_events, preview
        self._waiting: tuple[RefreshResult, dict[str, float]] | None = None
        self._mapped: dict[int, dict[str, Any]] = {}
        self._trained = TrainedRecord(run_dir) if run_dir is not None else None

    def trained(self, step: int, position: int) -> None:
        """Note that ``step`` optimizer steps are done, up to stream position ``position``."""
        if self._trained is not None:
            self._trained.write(step, position)

    def close(self) -> None:
        """Close the files.  A second call does nothing."""
        if self._trained is not None:
            self._trained.close()

    def events(self, events: dict[str, float], samples: int) -> None:
        """Pass events on, with the number of samples trained on so far."""
        if self.write_events is not None:
            self.write_events(events, samples)

    def made(self, outcome: RefreshResult, totals: dict[str, float] | None = None) -> None:
        """Note a successful refresh and the run's ``totals`` before it; :meth:`settle` keeps both once training continues."""
        self._waiting = outcome, totals or {}

    def forget(self) -> None:
        """Drop the last refresh, which is not part of the run because a checkpoint has been loaded."""
        self._waiting = None

    def settle(self) -> None:
        """Keep the last refresh on disk."""
        waiting, self._waiting = self._waiting, None
        if waiting is None or self.run_dir is None:
            return
        outcome, totals = waiting
        schedule, folder = outcome.schedule, Path(self.run_dir) / "schedules"
        line = {
            "step": schedule.meta["decided_at_step"],
            "version": schedule.version,
            "run": schedule.run,
            **outcome.counts,
            **dict(schedule.meta),
            "seconds": outcome.seconds,
            "before": totals,
        }
        try:
            root = folder.parent
            with folder_below(root, folder, make=True):
                pass
            if put_aside(folder, schedule, root):
                log.warning(
                    "%s holds what another run has left there: it is renamed to *.abandoned; give every run a run_dir of its own",
                    self.run_dir,
                )
                for leftover in (root / "refreshes.jsonl", root / "reports"):
                    _set_aside(leftover)
            save_schedule(schedule, folder, root)
            with os.fdopen(open_below(root, root / "refreshes.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            log.warning("schedule %d could not be kept in %s (%s); training goes on", schedule.version, self.run_dir, error)
        if outcome.explanation is not None:
            keep_explanation(outcome.explanation, folder.parent / "reports", self.preview, self._mapped)


def _set_aside(path: Path) -> None:
    """Rename a file or folder, if it exists, to the first of ``STEM.abandoned``, ``STEM-1.abandoned`` … that is free."""
    if path.exists():
        names = itertools.chain([path.stem], (f"{path.stem}-{i}" for i in itertools.count(1)))
        path.rename(next(target for name in names if not (target := path.with_name(f"{name}.abandoned")).exists()))


def keep_explanation(
    explanation: dict[str, Any], folder: Path, preview: Preview | None, known: dict[int, dict[str, Any]]
) -> None:
    """Write ``report-VERSION.json`` and ``map.json`` with previews of their samples.

    Args:
        preview: of a sample; None: no previews.  It is called for :data:`PREVIEW_SECONDS`; later samples are shown by their ids.
        known: previews of the last map's samples, by id, which tend to be the same ones; updated in place.
    """
    version, ends, unread = explanation["version"], time.monotonic() + PREVIEW_SECONDS, 0

    def show(sample: int) -> dict[str, Any]:
        nonlocal unread
        if preview is None:
            return {}
        if time.monotonic() < ends:
            return preview(sample)
        unread += 1
        return {}

    try:
        samples, chart = explanation["samples"], explanation.get("map")
        with undisturbed_rng():
            samples = [{**sample, **show(sample["id"])} for sample in samples]
            if chart is not None:
                mapped = {i: known.get(i) or _short(show(i)) for i in chart["ids"]}
                known.clear()
                known.update(mapped)
        if unread:
            log.warning(
                "the explanation of refresh %d shows %d of its samples by their ids alone: the dataset was read for %g s",
                version,
                unread,
                PREVIEW_SECONDS,
            )
        write_atomic(
            folder / f"report-{version:06d}.json",
            json.dumps({**explanation, "samples": samples, "map": chart is not None}).encode(),
            root=folder.parent,
        )
        if chart is not None and (explanation["used"] or not _holds_a_used_map(folder, version)):
            facts = {key: explanation[key] for key in ("version", "step", "level", "used", "window")}
            shown = json.dumps({**facts, **chart, "shown": list(mapped.values())}).encode()
            write_atomic(folder / MAP, shown, root=folder.parent)
    except Exception as error:  # the dataset's own code runs here
        log.warning("no explanation of refresh %d is kept (%s: %s); training goes on", version, type(error).__name__, error)


def _short(shown: dict[str, Any]) -> dict[str, Any]:
    """Return a shorter preview than a table shows, because a map has many samples."""
    return {key: value[: MAP_CHARACTERS if key == "text" else MAP_TOKENS] for key, value in shown.items()}


def _holds_a_used_map(folder: Path, version: int) -> bool:
    """Return whether the existing map is of an earlier schedule with a coreset, which is worth more than one without."""
    try:
        existing = read_json(folder / MAP, root=folder.parent)
        return bool(existing["used"]) and int(existing["version"]) < version
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return False


def preview_of(dataset: Any, tokens_key: str) -> Preview:
    """Return a function that shows the start of a sample's ``text``, or its first token ids if its item holds no text."""

    def show(sample: int) -> dict[str, Any]:
        item = dataset[sample]
        text = item.get("text") if isinstance(item, Mapping) else item if isinstance(item, str) else None
        shown: dict[str, Any] = {}
        if isinstance(text, str):
            shown["text"] = text[:PREVIEW_CHARACTERS]
        else:
            with contextlib.suppress(DataError):  # an item without tokens is shown by its id alone
                shown["tokens"] = tokens_of(item, tokens_key)[:PREVIEW_TOKENS].tolist()
        return shown

    return show


def monitor_of(engine: Any) -> EventWriter:
    """Return a function that writes events to the engine's monitor, if one is enabled."""

    def write(events: dict[str, float], samples: int) -> None:
        monitor = getattr(engine, "monitor", None)
        if monitor is not None and monitor.enabled:
            try:
                monitor.write_events([(f"Grace/{name}", value, samples) for name, value in events.items()])
            except Exception as error:  # a full disk, a server that is gone: on this rank only
                log.warning("the monitor did not take the events (%s: %s); training goes on", type(error).__name__, error)

    return write


def _core(schedule: Schedule) -> IntArray:
    return np.unique(schedule.ids[schedule.roles == Role.CORE])
