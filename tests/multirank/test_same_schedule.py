"""The number of ranks decides nothing: 1, 2, 3 and 4 ranks make the same tables and the same schedules of the same rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import pytest

from grace_ds.records import Role, Rows, Schedule
from grace_ds.table import Table
from tests.multirank.harness import run_ranks
from tests.multirank.schedule_job import (
    BATCH,
    CASES,
    EXCLUDE,
    EXPLORE,
    INCLUDE,
    INTERVAL,
    OBJECTIVES,
    SLACK,
    STEPS,
    WINDOW,
    Case,
    Made,
    harvested,
    is_junk,
    pool_of,
    source_of,
    work,
)

SIZES = (1, 2, 3, 4)
VERSIONS = range(len(STEPS))
SLOTS = (INTERVAL + SLACK) * BATCH
Worlds = dict[int, list[dict[str, list[Made]]]]


@pytest.fixture(scope="module")
def worlds() -> Worlds:
    """For each number of ranks what every rank made of every case."""
    return {size: run_ranks(work, size, timeout=150) for size in SIZES}


def schedule(worlds: Worlds, name: str, version: int = 0) -> Schedule:
    return worlds[1][0][name][version].schedule


def level_of(s: Schedule) -> str | None:
    """What the guard has let the schedule use; None where it was not asked."""
    level: str | None = s.meta.get("guard", {}).get("level")
    return level


def core(worlds: Worlds, name: str, version: int = 0) -> np.ndarray:
    s = schedule(worlds, name, version)
    return np.unique(s.ids[s.roles == Role.CORE])


def records(rows: Rows) -> list[bytes]:
    """Each row's bytes."""
    columns = [getattr(rows, f.name) for f in fields(Rows)]
    return [b"".join(np.ascontiguousarray(c[i]).tobytes() for c in columns) for i in range(len(rows))]


def usable(case: Case, version: int) -> Iterator[tuple[int, int, bytes]]:
    """(id, step, bytes) of the rows that a table takes: of the window, and finite where they must be."""
    rows, window = harvested(case, version), set(pool_of(case).window_at(version).tolist())
    for i, record in enumerate(records(rows)):
        if int(rows.ids[i]) in window and np.isfinite(rows.sketch[i]).all() and np.isfinite(rows.norm[i]):
            yield int(rows.ids[i]), int(rows.step[i]), record


def remembered(case: Case) -> list[tuple[dict[int, set[bytes]], dict[int, int]]]:
    """For each version, row by row: id → the rows of its latest step, id → how often it was harvested."""
    after, latest, uses, last = [], dict[int, set[bytes]](), dict[int, int](), dict[int, int]()
    for version in VERSIONS:
        window = set(pool_of(case).window_at(version).tolist())
        latest, uses = ({i: x for i, x in d.items() if i in window} for d in (latest, uses))
        for i, step, record in usable(case, version):
            if i not in latest or step > last[i]:
                latest[i], last[i] = set(), step
            latest[i].add(record)
            uses[i] = uses.get(i, 0) + 1
        after.append(({i: set(x) for i, x in latest.items()}, dict(uses)))
    return after


def union(tables: list[Table]) -> dict[int, tuple[bytes, int]]:
    """Id → (the row's bytes, visits) over all ranks."""
    held: dict[int, tuple[bytes, int]] = {}
    for table in tables:
        for i, record, visits in zip(table.ids.tolist(), records(table.rows), table.visits.tolist(), strict=True):
            assert i not in held, f"two ranks hold sample {i}"
            held[i] = (record, visits)
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
def test_tables_are_equal_and_hold_the_latest_rows(worlds: Worlds, name: str) -> None:
    for version, (latest, uses) in enumerate(remembered(CASES[name])):
        one = union([worlds[1][0][name][version].table])
        assert {i: visits for i, (_, visits) in one.items()} == uses
        assert all(record in latest[i] for i, (record, _) in one.items())
        for size in SIZES[1:]:
            assert union([made[name][version].table for made in worlds[size]]) == one, f"version {version}, {size} ranks"


@pytest.mark.parametrize("name", CASES)
def test_every_harvested_row_is_accounted_for(worlds: Worlds, name: str) -> None:
    for version in VERSIONS:
        rows = harvested(CASES[name], version)
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
            if case.window == WINDOW:
                guests = [0, 0]
                if s.meta["objective"] == case.objective and case.objective not in ("rs2", "uniform"):
                    guests = [round(EXPLORE * SLOTS), round(case.audit * SLOTS) if level_of(s) == "grace" else 0]
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
        assert schedule(worlds, "sample", version).digest() != schedule(worlds, "nothing harvested", version).digest()


def test_a_level_of_its_own_for_each_recipe(worlds: Worlds) -> None:
    for version in VERSIONS:
        names = ("sample", "prior", "density", "no features")
        assert [level_of(schedule(worlds, name, version)) for name in names] == ["grace", "prior", "density", "uniform"]
        assert len({schedule(worlds, name, version).digest() for name in (*names, "residuals")}) == 5
        chance = is_junk(core(worlds, "uniform", version)).mean()
        assert is_junk(core(worlds, "prior", version)).mean() < chance / 2 < is_junk(core(worlds, "density", version)).mean()


def test_of_a_clean_window_everything_is_trained_on(worlds: Worlds) -> None:
    for version in VERSIONS:
        alike = [schedule(worlds, name, version) for name in ("clean", "no features")]
        assert all(s.meta["objective"] == "uniform" and (s.weights == 1).all() for s in alike)
        assert all(np.array_equal(s.ids, alike[0].ids) for s in alike)
        assert len(set(alike[0].ids)) == SLOTS
        assert [level_of(s) for s in alike] == ["uniform", "uniform"]
        assert "clean" in alike[0].meta["guard"]["reason"]


def test_the_guard_compares_core_and_audit(worlds: Worlds) -> None:
    for name, level, harm in (("judged", "grace", False), ("harmful", "prior", True)):
        first, second = (schedule(worlds, name, version).meta["guard"] for version in VERSIONS)
        assert first["level"] == "grace"
        assert "low" not in first  # nothing had been chosen before
        assert (second["level"], second["high"] < 0) == (level, harm)
        assert second["low"] < second["core_minus_audit"] < second["high"]
        assert (second["misses"], second["look"]) == ((1, 3) if harm else (0, 0))


def test_the_signals_reach_the_schedules(worlds: Worlds) -> None:
    for version in VERSIONS:
        chance = is_junk(core(worlds, "uniform", version)).mean()
        for name in ("sample", "facility_location", "topk"):
            assert is_junk(core(worlds, name, version)).mean() < chance / 2, name
        # Content and neighbours pass on what was harvested: everything is known of everyone, without them of the harvested only.
        spread, alone = (schedule(worlds, name, version).meta for name in ("sample", "no features"))
        assert spread["known_loss"] == spread["known_align"] == WINDOW
        assert alone["known_align"] == 0 < alone["known_loss"] < len(worlds[1][0]["no features"][version].table)
        assert schedule(worlds, "tied sample", version).meta["known_align"] == 0
        assert schedule(worlds, "nothing harvested", version).meta["known_loss"] == 0


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
