"""A rank is killed, or its host cut off, in every stage of a refresh and in a training step, on two hosts.

The survivor says which rank is lost and where it noticed, ends with an error within the limits, and leaves no process;
the last checkpoint loads.  A host that is cut off in a refresh may come back: there GRACE is given up, and the job's own next
collective ends it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.fault_job import FAULT_STEP
from tests.cluster.hosts import ADDRESSES, NAMES, Hosts, missing
from tests.multirank.harness import run_module
from tests.multirank.launch import COLLECTING, environment
from tests.multirank.test_entries import wait_until
from tests.multirank.toy import Corpus, write_trusted
from tests.multirank.zygote import Zygote, mothers, session

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(420), pytest.mark.skipif(bool(missing()), reason=missing() or "-")]

LIMIT, MARGIN = 20.0, 10.0

# Where, and what the survivor says of it: in its last line, or where GRACE alone is given up, in a warning before.
PLACES: dict[str, tuple[Any, str]] = {
    "collect": (["grace_ds.gradients.collector", "GradientCollector.pending"], "stage collect"),
    "basis": (["grace_ds.gradients.basis", "BasisAccumulator.pack"], "stage trusted basis"),
    "gather": (["grace_ds.refresh.line", "activation"], "stage gather"),
    "table": (["grace_ds.refresh.line", "owner_of"], "in refresh"),
    "features": (["grace_ds.integrations.setup", "follow_window"], "in refresh"),
    "graph": (["grace_ds.refresh.line", "follow"], "stage graph"),
    "propagate": (["grace_ds.refresh.signals", "propagate"], "in refresh"),
    "select": (["grace_ds.refresh.line", "choose"], "stage select"),
    "broadcast": (["grace_ds.refresh.line", "broadcast_schedule"], "stage broadcast"),
    "agreement": (["grace_ds.refresh.runner", "RefreshRunner._agree"], "stage agreement"),
    "save": (["grace_ds.integrations.checkpoint", "_write_shared"], f"at the checkpoint of step {FAULT_STEP}"),
    "train": ("train", f"in training step {FAULT_STEP}"),
}
# (place, how, rank). Rank 0 keeps the store and chooses; it alone writes what all share.
FAULTS = [
    *[(place, "kill", 0 if place in ("save", "select") else 1) for place in PLACES],
    ("gather", "kill", 0),
    ("train", "kill", 0),
    ("gather", "link", 1),
    ("train", "link", 1),
    ("select", "drop", 0),
    ("train", "drop", 1),
]
IDS = [f"{place}-{how}-{rank}" for place, how, rank in FAULTS]


@dataclass(frozen=True)
class Played:
    """What came of a fault: exit status, seconds from the fault to the end, and output of each rank; what was left."""

    codes: list[int]
    seconds: list[float]
    said: list[str]
    left: dict[int, str]


def config_of(folder: Path) -> dict[str, Any]:
    grace = {
        **COLLECTING,
        "window": 150,  # one that moves has features to read at every refresh
        "trusted": str(folder.parent / "trusted.jsonl"),
        "refresh": {"interval_steps": 4, "cadence": "fixed", "timeout_seconds": LIMIT},
    }
    return {
        "train_batch_size": 8,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "steps_per_print": 10**9,
        "grace_ds": grace,
    }


def write_spec(folder: Path, name: str, **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    spec = {"config": config_of(folder), "folder": str(folder), "limit": LIMIT, **more}
    path = folder / name
    path.write_text(json.dumps(spec))
    return path


def variables(rank: int, address: str, port: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": str(port)}


def play(parents: list[Zygote], folder: Path, place: str, how: str, rank: int) -> Played:
    fault = {"rank": rank, "how": how, "place": PLACES[place][0]}
    spec = write_spec(folder, "spec.json", steps=2 * FAULT_STEP, save=str(folder / "saved"), fault=fault)
    hosts = Hosts(folder / "hosts")
    ranks: list[int] = []
    common = {**os.environ, **environment(folder), "OMP_NUM_THREADS": "1"}
    outs = [folder / f"out-{r}" for r in range(2)]
    try:
        hosts.start()
        for r, name in enumerate(NAMES):
            env = {**common, **variables(r, ADDRESSES[0], 29500), "GLOO_SOCKET_IFNAME": "eth0"}
            ranks.append(parents[r].start("tests.cluster.fault_job", [spec], env, outs[r], inside=hosts.inside(name)))
        if how == "kill":
            wait_until(lambda: parents[rank].exit_of(ranks[rank]) is not None, 120)
        else:
            wait_until(lambda: (folder / "here").exists() or parents[rank].exit_of(ranks[rank]) is not None, 120)
            hosts.cut(NAMES[rank], how)
            (folder / "cut").touch()
        struck = time.monotonic()
        seconds = [0.0, 0.0]
        deadline = struck + 2 * LIMIT + 3 * MARGIN
        while None in (codes := [z.exit_of(p) for z, p in zip(parents, ranks, strict=True)]) and time.monotonic() < deadline:
            now = time.monotonic() - struck
            seconds = [now if code is None else before for code, before in zip(codes, seconds, strict=True)]
            time.sleep(0.05)
        deadline = time.monotonic() + MARGIN
        while (left := session(ranks[0]) | session(ranks[1])) and time.monotonic() < deadline:
            time.sleep(0.2)
        return Played([code or 0 for code in codes], seconds, [o.read_text() for o in outs], left)
    finally:
        for leader in ranks:
            for pid in session(leader):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        hosts.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("faults")
    write_trusted(at / "trusted.jsonl", Corpus(64, salt=3).tokens)
    return at


@pytest.fixture(scope="module")
def played(folder: Path) -> dict[str, Played]:
    # Four at a time, those that wait for a time-out first.
    order = sorted(range(len(FAULTS)), key=lambda i: FAULTS[i][1] == "kill")
    parents = mothers()
    with ThreadPoolExecutor(4) as pool:
        ended = pool.map(lambda i: play(parents, folder / IDS[i], *FAULTS[i]), order)
        return {IDS[i]: end for i, end in zip(order, ended, strict=True)}


@pytest.mark.parametrize(("name", "place", "how", "rank"), [(n, *f) for n, f in zip(IDS, FAULTS, strict=True)], ids=IDS)
def test_survivors_say_who_is_lost_and_where_and_end_in_time(
    played: dict[str, Played], name: str, place: str, how: str, rank: int
) -> None:
    end = played[name]
    assert f"step {FAULT_STEP + 1}\n" not in end.said[0] + end.said[1]
    assert end.left == {}
    survivors = [1 - rank] if how == "kill" else [0, 1]  # whoever is cut off has lost the other
    goes_on = how != "kill" and place != "train"  # to the job's own next collective, and its limit
    last_seen = f"in training step {FAULT_STEP + 1}" if goes_on else PLACES[place][1]
    for r in survivors:
        assert end.codes[r] not in (0, 137, -9), end.said[r]
        assert end.seconds[r] < (2 if goes_on else 1) * (LIMIT + MARGIN), end.said[r]
        last = end.said[r].rstrip().splitlines()[-1]
        why = "its process has ended" if how == "kill" else "its host cannot be reached"
        assert f"lost: rank {1 - r} on {NAMES[1 - r]} ({why}); noticed by rank {r}" in last, end.said[r]
        assert last_seen in last
        mute = f"no answer from rank {1 - r} on {NAMES[1 - r]} ({why}); noticed by rank {r} in refresh"
        warned = [line for line in end.said[r].splitlines() if mute in line]
        assert bool(warned) == goes_on and all(PLACES[place][1] in line for line in warned), end.said[r]
        assert "start it again from its last checkpoint" in last


@pytest.fixture(scope="module")
def resumed(folder: Path, played: dict[str, Played]) -> dict[str, list[dict[str, Any]]]:
    """Every last checkpoint, taken up by two ranks of one host for two steps."""
    at = {name: folder / f"{name}-on" for name in played}
    specs = [str(write_spec(on, "spec.json", steps=2, load=str(folder / name / "saved"))) for name, on in at.items()]
    run_module("tests.cluster.fault_job", specs, 2, timeout=180, env=environment(folder))
    return {name: [json.loads((on / f"done-{r}.json").read_text()) for r in range(2)] for name, on in at.items()}


@pytest.mark.parametrize("name", IDS)
def test_the_last_checkpoint_loads(resumed: dict[str, list[dict[str, Any]]], name: str) -> None:
    for told in resumed[name]:
        assert told["first"] == 4  # that of step 8 was not whole yet
        assert len(told["steps"]) == 2
