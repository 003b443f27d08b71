"""A long job on two hosts to which everything happens: are its batches those of the undisturbed job, sample for sample?

Two hosts (network, mount, PID and UTS namespaces, joined by a bridge, pdsh over ssh) train a small model under recipe grace, on
2, 4, 1 and again 2 ranks: each leg goes on from the universal checkpoint of the one before. First the job runs undisturbed.
Then it runs again, and at random moments a rank is killed, a host is cut off, a rank is stopped for some seconds, the disk of
checkpoints and run_dir is filled, or the clock of a host jumps by up to a day. A job that ends is started again from its
last checkpoint. Checked are the samples of every step of every start, what a job that has lost a rank or a host leaves behind,
whether it ends in time, and whether the memory of the ranks grows. Needs root, iproute2, sshd, pdsh and a C compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.record import Claim, Record
from grace_ds.errors import ConfigError
from tests.cluster.hosts import ADDRESSES, NAMES, PATH, Hosts, missing

ROOT = Path(__file__).parents[1]
JOB = str(ROOT / "benchmarks" / "chaos_job.py")
LEGS = (2, 4, 1, 2)  # ranks
LIMIT = 60.0  # seconds: of the job's collectives
ENDS = 2.5 * LIMIT  # seconds in which a job must have ended on both hosts after a fault that it cannot survive
STARTS = 240.0  # seconds until a job makes its first step
DISK = 256 << 20  # bytes of the file system of checkpoints and run_dir
KINDS = ("kill", "kill", "cut", "late", "late", "disk", "clock")
GAP = (15.0, 45.0)  # seconds between the start of a job, or its last fault, and the next
SETTLED = 3  # refreshes of a start after which its memory must be flat
GOAL_GROWTH = 0.03


@dataclass
class Fault:
    """What befell the job, and what came of it.

    Attributes:
        at: seconds since the beginning.
        leg: number of the leg.
        kind: of the fault.
        what: details.
        outcome: absorbed | ended | hung.
        seconds: until the job had ended, or the fault was over.
        left: processes of the job that were found after it had ended.
    """

    at: float
    leg: int
    kind: str
    what: str = ""
    outcome: str = "absorbed"
    seconds: float = 0.0
    left: int = 0


@dataclass
class Start:
    """One start of the job; ``name`` is that of its files."""

    name: str
    leg: int
    status: int = 0
    said: str = ""


@dataclass
class Bench:
    """Two hosts, the disk of the job, and the clocks of the hosts."""

    at: Path
    hosts: Hosts
    starts: list[Start] = field(default_factory=list)

    @property
    def disk(self) -> Path:
        return self.at / "disk"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=1600, metavar="N", help="optimizer steps of each leg")
    parser.add_argument("--pace", type=float, default=0.3, help="seconds a step takes at least in the disturbed run")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")


def run(args: argparse.Namespace, console: Console) -> Record:
    why = missing("sshd", "ssh-keygen", "pdsh")
    if why or not shutil.which("cc"):
        raise ConfigError(f"no chaos here: {why or 'no C compiler: apt-get install gcc libc6-dev'}")
    with tempfile.TemporaryDirectory(prefix="grace_ds_chaos_") as folder:
        at = Path(folder)
        (at / "disk").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(at / "disk")], check=True)
        bench = Bench(at, Hosts(at / "hosts", ssh=True))
        try:
            bench.hosts.start()
            give_clocks(bench)
            return soak(args, bench, console)
        finally:
            bench.hosts.stop()
            subprocess.run(["umount", "-l", str(at / "disk")], check=False)


def soak(args: argparse.Namespace, bench: Bench, console: Console) -> Record:
    def nothing(leg: int, child: subprocess.Popen[bytes]) -> None:
        """No fault."""

    for leg in range(len(LEGS)):
        start = play(bench, "calm", leg, args.steps, 0.0, nothing)
        if start.status:
            raise SystemExit(f"the undisturbed job ended with {start.status}:\n{start.said[-5000:]}")
    wanted = steps_of(bench, "calm")
    shutil.rmtree(bench.disk / "calm")
    console.print(f"undisturbed: {len(wanted)} steps in {len(LEGS)} legs", highlight=False)
    draw, faults, began = random.Random(args.seed), [], time.monotonic()

    def disturb(leg: int, child: subprocess.Popen[bytes]) -> None:
        while child.poll() is None:
            due = time.monotonic() + draw.uniform(*GAP)
            while time.monotonic() < due and child.poll() is None:
                time.sleep(0.2)
            if child.poll() is not None:
                return
            fault = Fault(round(time.monotonic() - began, 1), leg, draw.choice(KINDS))
            faults.append(fault)
            FAULTS[fault.kind](bench, draw, fault, child)
            if not fault.what:  # the job had just ended: nothing befell it
                faults.pop()
                continue
            console.print(f"  {fault}", highlight=False)

    for leg in range(len(LEGS)):
        while not ended(bench, "chaos", leg, args.steps):
            play(bench, "chaos", leg, args.steps, args.pace, disturb)
            bench.hosts.heal("n2")
            settle(bench, faults)
    minutes = (time.monotonic() - began) / 60
    return judge(args, bench, wanted, faults, minutes)


def judge(args: argparse.Namespace, bench: Bench, wanted: dict[int, Any], faults: list[Fault], minutes: float) -> Record:
    """The record: the claims, the faults, the starts."""
    record = Record("chaos")
    history, unlike = steps_of(bench, "chaos"), 0
    for start in [s for s in bench.starts if s.name.startswith("chaos")]:
        unlike += sum(ids != wanted[step] for step, ids in read_steps(bench, start.name).items())
    batch = [sample for step in sorted(wanted) for ids in wanted[step] for sample in ids]
    trained = [sample for step in sorted(history) for ids in history[step] for sample in ids]
    lost, doubled = difference(batch, trained), difference(trained, batch)
    growth = max((g for start in bench.starts for g in growths(bench, start.name)), default=0.0)
    ends = [fault for fault in faults if fault.outcome != "absorbed"]
    record.rows["faults"] = [asdict(fault) for fault in faults]
    record.rows["starts"] = [{"name": s.name, "ranks": LEGS[s.leg], "status": s.status} for s in bench.starts]
    leftover = [path for path in bench.disk.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".tmp")]
    record.claims = [
        Claim("chaos_lost", float(lost), f"samples of {len(batch):,} that the disturbed run has not trained on", 0.0),
        Claim("chaos_doubled", float(doubled), "samples that it has trained on once more than the undisturbed", 0.0),
        Claim("chaos_unlike", float(unlike), "global batches, of any start, with other samples or another order", 0.0),
        Claim("chaos_hangs", float(sum(f.outcome == "hung" for f in faults)), f"faults after which it ran on {ENDS:g} s", 0.0),
        Claim("chaos_left_behind", float(sum(f.left for f in faults) + len(leftover)), "processes and unfinished files", 0.0),
        Claim("chaos_memory_growth", growth, f"of a rank's memory after refresh {SETTLED} of a start, the worst", GOAL_GROWTH),
        Claim("chaos_faults", float(len(faults)), f"faults, of which {len(ends)} ended the job", None),
        Claim("chaos_minutes", minutes, "min", 60.0, higher_is_better=True),
    ]
    record.notes.append(f"seed {args.seed}; {args.steps} steps a leg on {', '.join(map(str, LEGS))} ranks; every fault in rows")
    return record


def difference(some: list[int], other: list[int]) -> int:
    """How many samples of ``some`` are not in ``other``, counted as often as they are there."""
    return sum((Counter(some) - Counter(other)).values())


# -- the job -----------------------------------------------------------------------------------------------------------


def play(
    bench: Bench, run: str, leg: int, steps: int, pace: float, disturb: Callable[[int, subprocess.Popen[bytes]], None]
) -> Start:
    """Starts the job of a leg from its last checkpoint, or from that of the leg before, and waits for its end."""
    name = f"{run}-{leg}-{len(bench.starts)}"
    saves = bench.disk / run / f"leg{leg}"
    end = steps * (leg + 1)
    load, tag, universal = "", "", False
    if (saves / "latest").exists():
        load, tag = str(saves), (saves / "latest").read_text().strip()
    elif leg:
        load, tag, universal = str(bench.disk / run / f"leg{leg - 1}"), f"global_step{steps * leg}_universal", True
    spec = {
        "name": name,
        "limit": LIMIT,
        "run_dir": str(bench.disk / run / "run"),
        "load": load,
        "tag": tag,
        "universal": universal,
        "save": str(saves),
        "end": end,
        "out": str(bench.at),
        "pace": pace,
    }
    path = bench.at / f"{name}.json"
    path.write_text(json.dumps(spec))
    start = Start(name, leg)
    bench.starts.append(start)
    ranks = LEGS[leg]
    slots = [1] if ranks == 1 else [ranks // 2] * 2
    hostfile = bench.at / f"{name}.hosts"
    hostfile.write_text("".join(f"{host} slots={n}\n" for host, n in zip(NAMES, slots, strict=False)))
    port = 29500 + len(bench.starts) % 400
    env = {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "eth0" if ranks > 1 else "lo",
        "TORCH_EXTENSIONS_DIR": str(bench.at / "ext"),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}",
        "PYTHONUNBUFFERED": "1",
        "PATH": f"{Path(sys.executable).parent}:{PATH}",
        "LD_PRELOAD": str(bench.at / "clock.so"),
        "GRACE_CHAOS_CLOCK": str(bench.at / "clock"),
    }
    (bench.at / ".deepspeed_env").write_text("".join(f"{key}={value}\n" for key, value in env.items()))
    command = [str(Path(sys.executable).with_name("deepspeed")), "--hostfile", str(hostfile)]
    command += ["--master_addr", ADDRESSES[0], "--master_port", str(port), JOB, str(path)]
    out = bench.at / f"{name}.out"
    with out.open("w") as stream:
        child = bench.hosts.popen("n1", command, {**os.environ, **env}, bench.at, stream)
    try:
        deadline = time.monotonic() + STARTS
        while not any(read_steps(bench, name)) and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        disturb(leg, child)
        start.status = child.wait(steps * (pace + 2.0))
    finally:
        child.kill()
    start.said = out.read_text()
    if leg and (saves / "latest").exists():
        shutil.rmtree(bench.disk / run / f"leg{leg - 1}", ignore_errors=True)
    if start.status == 0 and ended(bench, run, leg, steps) and leg < len(LEGS) - 1:
        tool = [sys.executable, "-m", "tests.multirank.universal", str(saves / f"global_step{end}")]
        clean = {key: value for key, value in env.items() if key != "LD_PRELOAD"}
        subprocess.run(tool, check=True, timeout=300, cwd=ROOT, env={**os.environ, **clean}, capture_output=True)
    return start


def ended(bench: Bench, run: str, leg: int, steps: int) -> bool:
    """Whether a start of this leg came to its end."""
    names = [start.name for start in bench.starts if start.name.startswith(f"{run}-{leg}-")]
    return any(row.get("end") == steps * (leg + 1) for name in names for row in read_rows(bench, name, 0))


def read_rows(bench: Bench, name: str, rank: int) -> list[dict[str, Any]]:
    """What a rank has noted; a last line that a kill has cut is left out."""
    path = bench.at / f"{name}-{rank}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1] if line.endswith("}")]


def read_steps(bench: Bench, name: str) -> dict[int, list[list[int]]]:
    """Step → samples of each rank, of the steps that all ranks have noted."""
    ranks = LEGS[int(name.split("-")[1])]
    noted = [{row["step"]: row["ids"] for row in read_rows(bench, name, rank) if "step" in row} for rank in range(ranks)]
    return {step: [ids[step] for ids in noted] for step in noted[0] if all(step in ids for ids in noted)}


def steps_of(bench: Bench, run: str) -> dict[int, list[list[int]]]:
    """Step → samples of each rank, as the run's weights have met them: a later start replaces what it makes again."""
    history: dict[int, list[list[int]]] = {}
    for start in [s for s in bench.starts if s.name.startswith(run)]:
        rows = read_rows(bench, start.name, 0)
        if rows:
            history = {step: ids for step, ids in history.items() if step < rows[0]["from"]}
        history |= read_steps(bench, start.name)
    return history


def growths(bench: Bench, name: str) -> list[float]:
    """Of each rank: the growth of its memory after the refreshes in which it settles."""
    found = []
    for rank in range(LEGS[int(name.split("-")[1])]):
        sizes = [row["rss_mib"] for row in read_rows(bench, name, rank) if "rss_mib" in row]
        if len(sizes) > SETTLED:
            found.append(max(sizes[SETTLED:]) / sizes[SETTLED - 1] - 1)
    return found


# -- the faults --------------------------------------------------------------------------------------------------------


def kill(bench: Bench, draw: random.Random, fault: Fault, child: subprocess.Popen[bytes]) -> None:
    """A rank is killed: the job must end on both hosts."""
    pids = ranks_of(bench)
    if not pids:
        return
    pid = draw.choice(pids)
    fault.what = f"process {pids.index(pid)} of {len(pids)}"
    os.kill(pid, signal.SIGKILL)
    must_end(bench, fault, child)


def cut(bench: Bench, draw: random.Random, fault: Fault, child: subprocess.Popen[bytes]) -> None:
    """The second host is cut off: the job must end on both; the link comes back after that."""
    how = draw.choice(["link", "drop"])
    fault.what = how
    bench.hosts.cut("n2", how)
    if ranks_of(bench, "n2"):
        must_end(bench, fault, child)
    bench.hosts.heal("n2")


def late(bench: Bench, draw: random.Random, fault: Fault, child: subprocess.Popen[bytes]) -> None:
    """A rank stands still for a while, less than the limit: the job must go on."""
    pids = ranks_of(bench)
    if not pids:
        return
    pid, seconds = draw.choice(pids), draw.uniform(1.0, LIMIT / 6)
    fault.what, fault.seconds = f"{seconds:.1f} s", seconds
    os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    if Path(f"/proc/{pid}").exists():
        os.kill(pid, signal.SIGCONT)


def disk(bench: Bench, draw: random.Random, fault: Fault, child: subprocess.Popen[bytes]) -> None:
    """The disk is full for a while: the job goes on, or ends with an error and has its last checkpoint."""
    seconds = draw.uniform(4.0, 12.0)
    fault.what, ballast = f"{seconds:.1f} s", bench.disk / "ballast"
    until = time.monotonic() + seconds
    with ballast.open("ab", buffering=0) as out:
        while time.monotonic() < until and child.poll() is None:
            try:
                while True:
                    out.write(bytes(1 << 16))
            except OSError:
                time.sleep(0.05)
    ballast.unlink()
    if child.poll() is not None:
        fault.outcome = "ended"


def clock(bench: Bench, draw: random.Random, fault: Fault, child: subprocess.Popen[bytes]) -> None:
    """The clock of a host jumps: the job must go on."""
    host, seconds = draw.choice(NAMES), int(draw.choice([-86400, -3600, -61, 61, 3600, 86400]) * draw.random())
    fault.what = f"{host} {seconds:+d} s"
    (bench.at / f"clock-{host}").write_text(f"{seconds:+d}\n")


FAULTS = {"kill": kill, "cut": cut, "late": late, "disk": disk, "clock": clock}


def must_end(bench: Bench, fault: Fault, child: subprocess.Popen[bytes]) -> None:
    """Waits for the end of the job on both hosts; what is left after the limit is a hang, and is killed."""
    began = time.monotonic()
    while time.monotonic() < began + ENDS and (child.poll() is None or ranks_of(bench)):
        time.sleep(0.1)
    fault.seconds = round(time.monotonic() - began, 1)
    fault.outcome = "ended"
    if child.poll() is None or ranks_of(bench):
        fault.outcome = "hung"
        for pid in ranks_of(bench):
            os.kill(pid, signal.SIGKILL)


def settle(bench: Bench, faults: list[Fault]) -> None:
    """After the end of a job: what it has left running is counted with its last fault, and killed."""
    deadline = time.monotonic() + ENDS
    while processes(bench) and time.monotonic() < deadline:
        time.sleep(0.2)
    left = processes(bench)
    if left and faults:
        faults[-1].left = len(left)
    for pid in left:
        os.kill(pid, signal.SIGKILL)


def give_clocks(bench: Bench) -> None:
    """Each host gets a clock of its own: one path, under which each finds another file."""
    source = str(Path(__file__).with_name("chaos_clock.c"))
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(bench.at / "clock.so"), source, "-ldl"], check=True)
    (bench.at / "clock").write_text("+0\n")
    for name in NAMES:
        (bench.at / f"clock-{name}").write_text("+0\n")
        command = ["mount", "--bind", str(bench.at / f"clock-{name}"), str(bench.at / "clock")]
        child = bench.hosts.popen(name, command, {}, bench.at, (bench.at / "mount.log").open("a"))
        if child.wait(20):
            raise SystemExit(f"no clock on {name}: {(bench.at / 'mount.log').read_text()}")


def ranks_of(bench: Bench, host: str | None = None) -> list[int]:
    """Process ids out here of the job's ranks, on one host or both: children of deepspeed's launcher that run the script."""
    nets = {os.readlink(f"/proc/{bench.hosts.inside(name)}/ns/net") for name in ([host] if host else NAMES)}
    found = []
    for pid in processes(bench):
        try:
            parent = (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[1]
            launched = "deepspeed.launcher.launch" in words_of(parent) and JOB in words_of(pid)
            # ssh has the launcher's whole command among its words too, and a rank's helpers have the rank's.
            ssh = any(Path(words_of(one)[0]).name in ("pdsh", "ssh") for one in (pid, parent))
            if launched and not ssh and os.readlink(f"/proc/{pid}/ns/net") in nets:
                found.append(pid)
        except OSError:
            continue
    return found


def words_of(pid: int | str) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def processes(bench: Bench) -> list[int]:
    """Process ids out here of all that has the job's extensions folder in its environment."""
    mark, found = f"TORCH_EXTENSIONS_DIR={bench.at / 'ext'}".encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (path / "environ").read_bytes() and (path / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                found.append(int(path.name))
        except OSError:
            continue
    return sorted(found)
