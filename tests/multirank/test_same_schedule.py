"""The number of ranks decides nothing: 1, 2, 3 and 4 ranks make the same tables and the same schedules of the same rows."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grace_ds.records import Columns, Role, Schedule
from grace_ds.refresh.table import Table
from tests.multirank.harness import run_ranks
from tests.multirank.schedule_job import (
    BATCH,
    CASES,
    EXCLUDE,
    EXPLORE,
    INCLUDE,
    INTERVAL,
    OBJECTIVES,
    PARTS,
    SLACK,
    STEPS,
    TINY,
    WINDOW,
    Case,
    Made,
    N,
    collected,
    is_junk,
    pool_of,
    read,
    source_of,
    work,
)

pytestmark = pytest.mark.timeout(400)

RECORD = Path(__file__).with_name("schedules.json")
SIZES = (1, 2, 3, 4)
VERSIONS = range(len(STEPS))
SLOTS = (INTERVAL + SLACK) * BATCH
Worlds = dict[int, list[dict[str, list[Made]]]]


@pytest.fixture(scope="module")
def worlds() -> Worlds:
    """For each number of ranks what every rank made of every case."""
    return {size: run_ranks(work, size, timeout=150) for size in SIZES}


def digests(made: list[Made]) -> list[str]:
    """Of each schedule's samples in order, with their roles."""
    found = []
    for one in made:
        s = one.schedule
        content = np.asarray(s.ids, "<i8").tobytes() + np.asarray(s.roles, "u1").tobytes()
        found.append(hashlib.sha256(content).hexdigest()[:32])
    return found


def schedule(worlds: Worlds, name: str, version: int = 0) -> Schedule:
    return worlds[1][0][name][version].schedule


def level_of(s: Schedule) -> str | None:
    """What the guard has let the schedule use; None where it was not asked."""
    level: str | None = s.meta.get("guard", {}).get("level")
    return level


def core(worlds: Worlds, name: str, version: int = 0) -> np.ndarray:
    s = schedule(worlds, name, version)
    return np.unique(s.ids[s.roles == Role.CORE])


def records(rows: Columns) -> list[bytes]:
    """Each row's bytes."""
    columns = [getattr(rows, f.name) for f in fields(rows)]
    return [b"".join(np.ascontiguousarray(c[i]).tobytes() for c in columns) for i in range(len(rows))]


def usable(case: Case, version: int) -> Iterator[tuple[int, int, bytes]]:
    """(id, step, bytes) of the rows that a table takes: of the window, and finite where they must be."""
    rows, window = collected(case, version), set(pool_of(case).window_at(version).tolist())
    for i, record in enumerate(records(rows)):
        if int(rows.ids[i]) in window and np.isfinite(rows.sketch[i]).all() and np.isfinite(rows.norm[i]):
            yield int(rows.ids[i]), int(rows.step[i]), record


def remembered(case: Case) -> list[dict[int, set[bytes]]]:
    """For each version, row by row: id → the rows of its latest step."""
    after, latest, last = [], dict[int, set[bytes]](), dict[int, int]()
    for version in VERSIONS:
        window = set(pool_of(case).window_at(version).tolist())
        latest = {i: x for i, x in latest.items() if i in window}
        for i, step, record in usable(case, version):
            if i not in latest or step > last[i]:
                latest[i], last[i] = set(), step
            latest[i].add(record)
        after.append({i: set(x) for i, x in latest.items()})
    return after


def union(tables: Sequence[Table[Any]]) -> dict[int, bytes]:
    """Id → the row's bytes over all ranks."""
    held: dict[int, bytes] = {}
    for table in tables:
        for i, record in zip(table.ids.tolist(), records(table.rows), strict=True):
            assert i not in held, f"two ranks hold sample {i}"
            held[i] = record
    return held


@pytest.mark.parametrize("name", CASES)
def test_schedules_are_equal(worlds: Worlds, name: str) -> None:
    for version in VERSIONS:
        one = schedule(worlds, name, version)
        for size, ranks in worlds.items():
            for rank, made in enumerate(ranks):
                other = made[name][version].schedule
                where = f"version {version}, rank {rank} of {size}"
                assert np.array_equal(other.ids, one.ids), where
                assert other.digest() == one.digest(), where
                assert other.meta == one.meta, where


@pytest.mark.parametrize("name", CASES)
def test_schedules_are_those_on_record(worlds: Worlds, name: str) -> None:
    """Moving code must not move a sample.

    A change that is meant is recorded with GRACE_RECORD_SCHEDULES=1.
    """
    found = digests(worlds[1][0][name])
    if os.environ.get("GRACE_RECORD_SCHEDULES"):
        on_record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        RECORD.write_text(json.dumps({**on_record, name: found}, indent=1, sort_keys=True) + "\n")
    assert json.loads(RECORD.read_text())[name] == found


@pytest.mark.parametrize("name", CASES)
def test_tables_are_equal_and_hold_the_latest_rows(worlds: Worlds, name: str) -> None:
    for version, latest in enumerate(remembered(CASES[name])):
        one = union([worlds[1][0][name][version].table])
        assert set(one) == set(latest) and all(record in latest[i] for i, record in one.items())
        for size in SIZES[1:]:
            assert union([made[name][version].table for made in worlds[size]]) == one, f"version {version}, {size} ranks"


@pytest.mark.parametrize("name", CASES)
def test_losses_are_kept_of_the_steps_that_are_not_collected_too(worlds: Worlds, name: str) -> None:
    """Each sample's latest finite loss, whoever read it, on any number of ranks."""
    held: dict[int, tuple[int, set[float]]] = {}
    for version in VERSIONS:
        window = set(pool_of(CASES[name]).window_at(version).tolist())
        held = {i: x for i, x in held.items() if i in window}
        rows = read(CASES[name], version)
        for i, step, loss in zip(rows.ids.tolist(), rows.step.tolist(), rows.loss.tolist(), strict=True):
            if i in window and np.isfinite(loss) and step >= held.get(i, (0,))[0]:
                held[i] = (step, {loss} | (held[i][1] if i in held and held[i][0] == step else set()))
        one = worlds[1][0][name][version].seen
        assert dict(zip(one.ids.tolist(), one.last.tolist(), strict=True)) == {i: step for i, (step, _) in held.items()}
        assert all(loss in held[i][1] for i, loss in zip(one.ids.tolist(), one.rows.loss.tolist(), strict=True))
        for size in SIZES[1:]:
            parts = [made[name][version].seen for made in worlds[size]]
            assert union(parts) == union([one]), f"version {version}, {size} ranks"


@pytest.mark.parametrize("name", CASES)
def test_every_harvested_row_is_accounted_for(worlds: Worlds, name: str) -> None:
    for version in VERSIONS:
        rows = collected(CASES[name], version)
        for ranks in worlds.values():
            counts = [made[name][version].counts for made in ranks]
            parts = ("received", "padding_dropped", "nonfinite_dropped")
            assert sum(c[part] for c in counts for part in parts) == len(rows)


def test_schedules_hold_what_they_should(worlds: Worlds) -> None:
    """The equal schedules are not equally empty: slots of every role, forced ids, and the objectives' own choices."""
    for name, case in CASES.items():
        for version in VERSIONS:
            s = schedule(worlds, name, version)
            roles = np.bincount(s.roles, minlength=3).tolist()
            assert (s.version, s.start, len(s)) == (version, STEPS[version] * BATCH + BATCH, SLOTS)
            if case.window != TINY:
                guests = [0, 0]
                if s.meta["objective"] == case.objective and case.objective not in ("rs2", "uniform"):
                    collects = level_of(s) == "grace" and bool({"gradients", "loss"} - set(case.ablate))
                    guests = [round(EXPLORE * SLOTS), round(case.audit * SLOTS) if collects else 0]
                assert roles == [SLOTS - sum(guests), *guests], name
            else:
                assert all(roles), name
            assert not set(s.ids[s.roles == Role.EXPLORE]) & set(core(worlds, name, version)), name
            if case.forced:
                window = pool_of(case).window_at(version)
                assert set(INCLUDE) & set(window) <= set(core(worlds, name, version))
                assert not (set(EXCLUDE) - set(INCLUDE)) & set(s.ids)
    for version in VERSIONS:
        assert len({schedule(worlds, name, version).digest() for name in OBJECTIVES}) == len(OBJECTIVES)
        assert schedule(worlds, "sample", version).digest() != schedule(worlds, "nothing collected", version).digest()


def test_a_level_of_its_own_for_each_recipe(worlds: Worlds) -> None:
    for version in VERSIONS:
        names = ("sample", "content", "density", "no features")
        assert [level_of(schedule(worlds, name, version)) for name in names] == ["grace", "content", "density", "uniform"]
        parts = [f"without {part}" for part in PARTS]
        assert len({schedule(worlds, name, version).digest() for name in (*names, *parts)}) == len(names) + len(PARTS)
        chance = is_junk(core(worlds, "uniform", version)).mean()
        assert is_junk(core(worlds, "content", version)).mean() < chance / 2 < is_junk(core(worlds, "density", version)).mean()


# -- what is measured decides, and only that ------------------------------------------------------------------------------


def test_a_changed_loss_of_collected_rows_changes_the_choice(worlds: Worlds) -> None:
    even = {}
    for name in ("losses raised", "losses lowered"):
        made = worlds[1][0][name]
        measured = [np.intersect1d(core(worlds, name, version), made[version].table.ids) for version in VERSIONS]
        even[name] = (np.concatenate(measured) % 2 == 0).mean()
    assert even["losses raised"] > even["losses lowered"] + 0.1
    for version in VERSIONS:
        assert len({schedule(worlds, name, version).digest() for name in (*even, "sample")}) == 3


def test_a_part_that_is_switched_off_is_as_if_nothing_of_it_had_been_measured(worlds: Worlds) -> None:
    for version in VERSIONS:
        for off, absent in (("without loss", "losses unknown"), ("without gradients", "influences unknown")):
            a, b = (schedule(worlds, name, version) for name in (off, absent))
            assert a.digest() == b.digest() != schedule(worlds, "sample", version).digest()
        a, b = (schedule(worlds, name, version) for name in ("without any part", "content"))
        assert a.digest() == b.digest()


def joined(worlds: Worlds, size: int, name: str, version: int) -> dict[str, np.ndarray] | None:
    """The graph over all ranks, and what its rows have learned, in order of id; None without a graph."""
    graphs = [(made[name][version].graph, made[name][version].learned) for made in worlds[size]]
    found = [pair for pair in graphs if pair[0] is not None]
    if not found:
        return None
    assert len(found) == size
    ids = np.concatenate([graph.ids for graph, _ in found if graph is not None])
    order = np.argsort(ids)
    columns = {"ids": ids[order]}
    for column in ("keys", "X"):
        columns[column] = np.concatenate([getattr(graph, column) for graph, _ in found if graph is not None])[order]
    if found[0][1] is not None:
        columns["learned"] = np.concatenate([learned[1] for _, learned in found if learned is not None])[order]
    return columns


@pytest.mark.parametrize("name", CASES)
def test_graphs_are_equal_and_built_where_one_is_asked_for(worlds: Worlds, name: str) -> None:
    case = CASES[name]
    asks = case.objective == "facility_location"
    asks |= case.recipe == "grace" and "graph" not in case.ablate and case.objective not in ("rs2", "uniform")
    for version in VERSIONS:
        one = joined(worlds, 1, name, version)
        paused = level_of(schedule(worlds, name, 0)) == "uniform" and version > 0  # of a clean window nobody asks
        assert (one is not None) == (asks and not paused)
        if one is None:
            continue
        assert ("learned" in one) == (case.recipe == "grace" and "sketches" not in case.ablate)
        window = pool_of(case).window_at(0 if case.uniform else version)
        assert one["ids"].tolist() == window.tolist()
        for size in SIZES[1:]:
            other = joined(worlds, size, name, version)
            assert other is not None and other.keys() == one.keys()
            for column, wanted in one.items():
                assert other[column].tobytes() == wanted.tobytes(), f"{column} of version {version} on {size} ranks"


def test_a_window_that_stands_still_is_not_searched_again(worlds: Worlds) -> None:
    for size, ranks in worlds.items():
        for made in ranks:
            first, second = (made["still"][version].graph for version in VERSIONS)
            assert first is not None and second is not None
            assert (first.change, second.change, second.searched) == ("built", "none", 0)
            assert second.keys.tobytes() == first.keys.tobytes()
        counted = [sum(made["still"][version].counts["graph_searched"] for made in ranks) for version in VERSIONS]
        assert counted == [N, 0], size


def test_a_window_that_moves_on_has_its_graph_repaired(worlds: Worlds) -> None:
    for made in worlds[1]:
        for name in ("without sketches", "nothing collected"):
            first, second = (made[name][version].graph for version in VERSIONS)
            assert first is not None and second is not None
            assert (first.change, second.change) == ("built", "repaired") and second.searched < WINDOW
    for name in CASES:
        for version in VERSIONS:
            for column in ("propagated", "graph_searched"):
                totals = {size: sum(made[name][version].counts.get(column, 0) for made in worlds[size]) for size in SIZES}
                assert len(set(totals.values())) == 1, (name, version, column)
    reached = worlds[1][0]["sample"][0].counts["propagated"]
    assert 0 < reached <= WINDOW - len(worlds[1][0]["sample"][0].table)


def test_of_a_clean_window_everything_is_trained_on(worlds: Worlds) -> None:
    for version in VERSIONS:
        alike = [schedule(worlds, name, version) for name in ("clean", "no features")]
        assert all(s.meta["objective"] == "uniform" and (s.weights == 1).all() for s in alike)
        assert all(np.array_equal(s.ids, alike[0].ids) for s in alike)
        assert len(set(alike[0].ids)) == SLOTS
        assert [level_of(s) for s in alike] == ["uniform", "uniform"]
        assert "clean" in alike[0].meta["guard"]["reason"]


def test_the_guard_compares_core_and_audit(worlds: Worlds) -> None:
    for name, level, harm in (("judged", "grace", False), ("harmful", "content", True)):
        first, second = (schedule(worlds, name, version).meta["guard"] for version in VERSIONS)
        assert first["level"] == "grace"
        assert "low" not in first  # nothing had been chosen before
        assert (second["level"], second["high"] < 0) == (level, harm)
        assert second["low"] < second["core_minus_audit"] < second["high"]
        assert (second["misses"], second["look"]) == ((1, 3) if harm else (0, 0))


def test_the_signals_reach_the_schedules(worlds: Worlds) -> None:
    bare = "neither graph nor trusted set"
    for version in VERSIONS:
        chance = is_junk(core(worlds, "uniform", version)).mean()
        for name in ("sample", "facility_location", "topk"):
            assert is_junk(core(worlds, name, version)).mean() < chance / 2, name
        # Content and neighbours pass on what was collected: everything is known of everyone, without them of the collected only.
        spread, alone = (schedule(worlds, name, version).meta for name in ("sample", bare))
        assert spread["known_loss"] == spread["known_influence"] == WINDOW
        assert alone["known_influence"] == 0 < alone["known_loss"] < len(worlds[1][0][bare][version].table)
        assert schedule(worlds, "tied sample", version).meta["known_influence"] == 0
        assert schedule(worlds, "nothing collected", version).meta["known_loss"] == 0


def test_ties_go_to_the_lower_ids(worlds: Worlds) -> None:
    for version in VERSIONS:
        window = pool_of(CASES["tied topk"]).window_at(version)
        assert core(worlds, "tied topk", version).tolist() == window[: WINDOW // 10].tolist()


def test_ranks_without_samples_or_rows_took_part(worlds: Worlds) -> None:
    tiny = [made["tiny sample"][0] for made in worlds[4]]
    assert min(len(m.table) for m in tiny) == 0 < sum(len(m.table) for m in tiny)
    for size in SIZES[1:]:
        idle = worlds[size][-1]["forced sample"][0].counts
        assert idle["padding_dropped"] == idle["nonfinite_dropped"] == 0 < idle["received"]


@pytest.mark.parametrize("objective", OBJECTIVES[:2])
def test_a_blend_keeps_its_shares_in_every_coreset(worlds: Worlds, objective: str) -> None:
    for version in VERSIONS:
        told = schedule(worlds, f"blend {objective}", version).meta["sources"]
        window = pool_of(CASES["blend sample"]).window_at(version)
        assert told["names"] == [0, 1] and told["window"] == np.bincount(source_of(window)).tolist()
        kept = sum(told["coreset"]) * np.array(told["window"]) / len(window)
        assert np.abs(np.array(told["coreset"]) - kept).max() <= 1
    free = source_of(core(worlds, objective)).mean()
    assert free < 0.9 * source_of(pool_of(CASES[objective]).window_at(0)).mean()  # the filter alone would have shifted it
