"""An unchanged script on two hosts by ssh: deepspeed's pdsh and openmpi launchers on a hostfile, and a host that is lost."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from grace_ds.data.schedule import load_book
from tests.cluster.hosts import ADDRESSES, PATH, Hosts, missing
from tests.cluster.test_faults import LIMIT, MARGIN, PLACES, write_spec
from tests.multirank.launch import COLLECTING, environment, stream
from tests.multirank.test_entries import living, run_plain, wait_until, write_config
from tests.multirank.toy import Corpus, write_trusted

WHY = missing("sshd", "ssh-keygen", "pdsh")
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300), pytest.mark.skipif(bool(WHY), reason=WHY or "-")]

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
JOB = str(ROOT / "tests" / "multirank" / "plain_job.py")
STEPS = 12
# Each way: options of the deepspeed launcher, and the transport that the job must find.
WAYS = {
    "pdsh": (["--hostfile", "{hostfile}", "--master_addr", ADDRESSES[0], "--master_port", "29500"], "torch"),
    "openmpi": (["--hostfile", "{hostfile}", "--launcher", "openmpi", "--launcher_args=--allow-run-as-root"], "mpi"),
}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    pair = Hosts(tmp_path_factory.mktemp("hosts") / "at", ssh=True)
    try:
        pair.start()
        yield pair
    finally:
        pair.stop()


def hostfile(folder: Path) -> Path:
    """As in hostfile.example, of which the comments are read over."""
    example = (ROOT / "hostfile.example").read_text().splitlines()
    path = folder / "hostfile"
    path.write_text("\n".join(line.replace("node-", "n").replace("slots=8", "slots=1") for line in example) + "\n")
    return path


def start(hosts: Hosts, folder: Path, way: str, script: list[str]) -> tuple[subprocess.Popen[bytes], Path]:
    env = {**environment(folder), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "PATH": f"{BIN}:{PATH}"}
    # What deepspeed's launchers give to the ranks on the other hosts; it is read in the folder where they are started.
    (folder / ".deepspeed_env").write_text("".join(f"{key}={value}\n" for key, value in env.items()))
    options = [word.format(hostfile=hostfile(folder)) for word in WAYS[way][0]]
    out = folder / "out"
    command = [str(BIN / "deepspeed"), *options, *script]
    return hosts.popen("n1", command, {**os.environ, **env}, folder, out.open("w")), out


def script(folder: Path, *more: str) -> list[str]:
    config = write_config(folder / "on.json", {**COLLECTING, "run_dir": str(folder / "run")})
    return ["--module", "grace_ds.run", JOB, "--deepspeed_config", str(config), "--out", str(folder), *more]


@pytest.fixture(scope="module")
def made(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a whole run of each way, and of one on one host, without a launcher."""
    folders = {way: tmp_path_factory.mktemp(way.replace(" ", "-")) for way in WAYS}
    for way, folder in folders.items():
        child, out = start(hosts, folder, way, script(folder, "--steps", str(STEPS)))
        try:
            assert child.wait(120) == 0, f"{way}: {out.read_text()[-3000:]}"
            assert living(str(folder / "ext")) == {}
        finally:
            child.kill()
    folders["one host"] = tmp_path_factory.mktemp("one-host")
    config = write_config(folders["one host"] / "on.json", {**COLLECTING, "run_dir": str(folders["one host"] / "run")})
    run_plain(folders["one host"], config, "--steps", str(STEPS))
    return folders


def test_two_hosts_train_on_the_schedules_of_one(made: dict[str, Path]) -> None:
    books = [[s.digest() for s in load_book(folder / "run" / "schedules").schedules] for folder in made.values()]
    assert len(books[0]) >= 4 and books == [books[0]] * (len(WAYS) + 1)
    ids = [stream([json.loads((folder / f"first-{r}.json").read_text()) for r in range(2)]) for folder in made.values()]
    assert len(ids[0]) == STEPS and ids == [ids[0]] * (len(WAYS) + 1)


@pytest.mark.parametrize("way", list(WAYS))
def test_the_transport_is_that_of_the_launcher(made: dict[str, Path], way: str) -> None:
    assert f"transport: {WAYS[way][1]}, 2 data-parallel rank(s)" in (made[way] / "out").read_text()


def net_of(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


def is_rank(pid: int) -> bool:
    """Whether a process runs the script itself, and is no launcher or shell that has its name among its arguments."""
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return Path(words[0]).name.startswith("python") and "grace_ds.run" in words and "deepspeed.launcher.launch" not in words


@pytest.mark.parametrize("way", ["pdsh", "openmpi"])
def test_a_killed_rank_ends_the_job_on_both_hosts(hosts: Hosts, tmp_path: Path, way: str) -> None:
    child, out = start(hosts, tmp_path, way, script(tmp_path, "--steps", "1000", "--pause", "0.05"))
    try:
        wait_until(lambda: "step 5" in out.read_text() or child.poll() is not None, 90)
        far = [pid for pid in living(str(tmp_path / "ext")) if is_rank(pid) and net_of(pid) == net_of(hosts.inside("n2"))]
        os.kill(min(far), 9)
        assert child.wait(40) not in (0, None), out.read_text()[-3000:]
        wait_until(lambda: not living(str(tmp_path / "ext")), 15)
    finally:
        for pid in living(str(tmp_path / "ext")):
            os.kill(pid, 9)
        child.kill()


# (launcher, place, kind of cut)
CUTS = [("pdsh", "train", "drop"), ("openmpi", "gather", "link")]


def cut(folder: Path, way: str, place: str, how: str) -> tuple[int, dict[int, str], str, str]:
    """Exit status of the launcher, what is left of the job on both hosts, its output, and its last whole checkpoint."""
    hosts, at = Hosts(folder / "hosts", ssh=True), folder / "job"
    folder.mkdir()
    write_trusted(folder / "trusted.jsonl", Corpus(64, salt=3).tokens)
    fault = {"rank": 1, "how": "cut", "place": PLACES[place][0]}
    spec = write_spec(at, "spec.json", steps=1000, save=str(at / "saved"), fault=fault)
    hosts.start()
    child, out = start(hosts, at, way, [str(ROOT / "tests" / "cluster" / "fault_job.py"), str(spec)])
    try:
        wait_until(lambda: (at / "here").exists() or child.poll() is not None, 150)
        hosts.cut("n2", how)
        (at / "cut").touch()
        # The far ranks end by themselves, their launcher with them; ssh notices within its own 15 seconds.
        # In a refresh they go on to the job's own next collective.
        deadline = time.monotonic() + 2 * LIMIT + 3 * MARGIN
        status = child.wait(2 * LIMIT + 3 * MARGIN)
        while (left := living(str(at / "ext"))) and time.monotonic() < deadline:
            time.sleep(0.2)
        return status, left, out.read_text(), (at / "saved" / "latest").read_text()
    finally:
        for pid in living(str(at / "ext")):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        hosts.stop()
        child.kill()


def test_a_cut_link_leaves_nothing_on_either_host(tmp_path: Path) -> None:
    with ThreadPoolExecutor(len(CUTS)) as pool:  # they mostly wait
        ends = list(pool.map(lambda c: cut(tmp_path / c[0], *c), CUTS))
    for (way, _, _), (status, left, said, last) in zip(CUTS, ends, strict=True):
        assert status != 0 and left == {}, f"{way}: {said[-3000:]}"
        # mpirun has noticed by itself, a little before, that the daemon over there is gone; pdsh notices nothing.
        assert ("lost: rank 1 on n2 (its host cannot be reached)" if way == "pdsh" else "Remote host:   n2") in said
        assert last == "global_step4"
