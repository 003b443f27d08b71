"""Whether anything that is read can be changed without a word, hang the reader, or raise what is not the project's own error.

Configs, schedules, checkpoints (rows, losses, visits, basis, manifest), trusted sets, id and source files, tokenizers, Megatron
indices, feature caches, frames between the ranks, and what a run_dir holds: each is changed by a byte mutator, or built by
hypothesis with one thing odd, and read as a job or a command reads it.  A case is right if it is refused by an error of the
project, or accepted with the meaning of the original; text without a checksum may also be accepted for exactly what it now says,
as an independent reader sees it.  One process; the cases follow from the seed.
"""

from __future__ import annotations

import argparse
import faulthandler
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from benchmarks.fuzz import claimed, configs, files, frames, run_dirs
from benchmarks.fuzz.target import FOREIGN, HANG, KINDS, SILENT, Tally, Target, fuzz, quiet
from benchmarks.record import Claim, Record

CASES = 20_000
ROOM = 4 << 30  # bytes of address space beyond what the process has: an allocation by a claim alone does not fit
STUCK_SECONDS = 300.0  # without a case's end, the process says where it is, and ends
CLAIMED_MIB = 16.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", type=int, default=CASES, metavar="N", help=f"over all targets (default: {CASES:,})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="WORD", help="targets whose name holds it")


def run(args: argparse.Namespace, console: Console) -> Record:
    began, before = time.perf_counter(), resource.getrlimit(resource.RLIMIT_AS)
    record = Record("fuzz", rows={"by target": [], "claimed": []})
    in_memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # schedules are written to disk for good, thousands of them
    with tempfile.TemporaryDirectory(prefix="grace_ds-fuzz-", dir=in_memory) as folder:
        chosen = [target for target in all_targets(Path(folder)) if (args.only or "") in target.name]
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + ROOM, before[1]))
        try:
            tallies = over(chosen, args.cases, args.seed, lambda name, tally: console.print(_row(name, tally)))
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
        with quiet():
            record.rows["claimed"] = [{"input": k, "MiB": v} for k, v in claimed.allocated(Path(folder) / "claimed").items()]
    record.rows["by target"] = [_row(name, tally) for name, tally in tallies.items()]
    cases = sum(tally.cases for tally in tallies.values())
    for kind, name in ((SILENT, "silent"), (HANG, "hangs"), (FOREIGN, "foreign_tracebacks")):
        value = sum(tally.kinds[kind] for tally in tallies.values())
        record.claims.append(Claim(f"fuzz_{name}", value, f"of {cases:,} cases", 0))
    record.claims += [
        Claim("fuzz_cases", cases, "cases", float(CASES), higher_is_better=True),
        Claim("fuzz_claimed_mib", max(row["MiB"] for row in record.rows["claimed"]), "MiB, of 10¹² rows", CLAIMED_MIB),
        Claim("fuzz_minutes", (time.perf_counter() - began) / 60, "min, one process", None),
    ]
    record.notes = [found for tally in tallies.values() for found in tally.found]
    for slow in (case for tally in tallies.values() for case in tally.slow):
        console.print(f"slow: {slow}", highlight=False, markup=False)
    return record


def all_targets(folder: Path) -> list[Target]:
    """Every target; their files go below ``folder``."""
    (folder / "configs").mkdir(parents=True)
    with quiet():
        return [
            *configs.targets(folder / "configs"),
            *files.targets(folder / "files"),
            *run_dirs.targets(folder / "run_dir"),
            *frames.targets(folder),
        ]


def over(targets: list[Target], cases: int, seed: int, told: Callable[[str, Tally], None]) -> dict[str, Tally]:
    """Judge ``cases`` cases of all targets together, by their shares; at least one of each."""
    whole, tallies = sum(target.share for target in targets), {}
    with quiet():
        for target in targets:
            faulthandler.dump_traceback_later(STUCK_SECONDS + cases, exit=True)
            tallies[target.name] = fuzz(target, -(-int(cases * target.share * 1000) // int(whole * 1000)), seed)
            told(target.name, tallies[target.name])
        faulthandler.cancel_dump_traceback_later()
    return tallies


def _row(name: str, tally: Tally) -> dict[str, str | int | float]:
    counts = {kind: tally.kinds[kind] for kind in KINDS}
    times = {"seconds": round(tally.seconds, 1), "slowest": round(tally.slowest, 3)}
    return {"target": name, "cases": tally.cases, **counts, **times}


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
