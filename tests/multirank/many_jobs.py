"""Many jobs in one launch: two processes import what takes long, and fork the ranks of one job after the other.

The ranks of a job have a world of their own and DeepSpeed's globals as they are after the import, so jobs of any layout and any
ZeRO stage follow one another, and one costs a second.
"""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tests.multirank.harness import World, run_ranks

# Engines import some of it late, which every rank would do again.
SLOW_TO_IMPORT = (
    "torch._inductor.compile_fx",
    "deepspeed.runtime.zero.muon.original_muon",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.module_inject.auto_ep_layer",
    "grace_ds.integrations.setup",
    "tests.multirank.cell_job",
)
PARENTS = 2
LINGER_SECONDS = 5  # for the peers of a rank that has failed, to fail too
Job = dict[str, Any]
Records = dict[str, list[dict[str, Any]]]


def run_many(folder: Path, jobs: dict[str, Job], *, seconds: float = 60.0, timeout: float = 600.0) -> Records:
    """Runs ``cell_job.run`` of each job on its ``ranks``; returns each job's records by rank.

    A record with ``error`` is of a rank that raised it (``by``: GRACE or engine), or that did not end by itself (``by``: time, or
    peer, if another rank had failed before).

    Args:
        seconds: limit of one job.
        timeout: limit of all.
    """
    parts = run_ranks(fork_jobs, PARENTS, str(folder), jobs, seconds, timeout=timeout, join=False)
    return {name: [parts[r % PARENTS][name][r] for r in range(job["ranks"])] for name, job in jobs.items()}


def fork_jobs(world: World, folder: str, jobs: dict[str, Job], seconds: float) -> dict[str, dict[int, dict[str, Any]]]:
    """Forks this parent's share of the ranks of every job; returns their records."""
    for module in SLOW_TO_IMPORT:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # not to be looked through, and so copied, in every rank
    found = {}
    for number, (name, job) in enumerate(jobs.items()):
        place = Path(folder, f"job{number}")
        place.mkdir(exist_ok=True)
        children = {}
        started = time.monotonic()
        for rank in range(world.rank, job["ranks"], world.size):
            pid = os.fork()
            if not pid:
                _run_rank(World(rank, job["ranks"], str(place / "rendezvous")), job, place)
            children[rank] = pid
        found[name] = _await(children, place, started + seconds)
        errors = [r.get("error", "")[:120] for r in found[name].values()]
        print(f"{name}: {time.monotonic() - started:.1f} s", *errors, flush=True)
    return found


def _run_rank(world: World, job: Job, place: Path) -> None:
    """Body of a rank; never returns."""
    try:
        out = os.open(place / f"out{world.rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        from grace_ds.errors import GraceError
        from tests.multirank import cell_job

        try:
            result = cell_job.run(world, job, place)
        except Exception as error:
            traceback.print_exc()
            by = "GRACE" if isinstance(error, GraceError) else "engine"
            result = {"by": by, "error": f"{type(error).__name__}: {error}"}
        (place / f"part{world.rank}").write_bytes(pickle.dumps(result))
        os.replace(place / f"part{world.rank}", place / f"result{world.rank}")
        if "error" in result:  # a peer may still be connecting to this rank, and be about to fail by itself
            results, limit = [place / f"result{r}" for r in range(world.size)], time.monotonic() + LINGER_SECONDS
            while time.monotonic() < limit and not all(r.exists() for r in results):
                time.sleep(0.02)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _await(children: dict[int, int], place: Path, deadline: float) -> dict[int, dict[str, Any]]:
    """What each rank has written; the ranks that wait for one that has failed, or too long, are ended."""
    found: dict[int, dict[str, Any]] = {}
    failed, soon = place / "failed", None
    while len(found) < len(children):
        time.sleep(0.02)
        for rank, pid in children.items():
            if rank not in found and os.waitpid(pid, os.WNOHANG)[0]:
                result = place / f"result{rank}"
                found[rank] = pickle.loads(result.read_bytes()) if result.exists() else {"by": "death", "error": "died"}
                if "error" in found[rank]:
                    failed.touch()
        now = time.monotonic()
        if soon is None and failed.exists():
            soon = now + LINGER_SECONDS
        if now > min(deadline, soon or deadline):
            by = "peer" if soon is not None else "time"
            failed.touch()
            for rank, pid in children.items():
                if rank not in found:
                    os.kill(pid, signal.SIGUSR1)  # it writes where it stands
                    time.sleep(0.5)
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    found[rank] = {"by": by, "error": f"did not end; see {place / f'out{rank}'}"}
    return found
