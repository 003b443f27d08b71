"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd, on free ports, under one folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.multirank.launch import free_port

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")
# Where Debian's packages put daemons, which a user's PATH does not name.
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}

_CONF = """
ClusterName=ci
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={at}/munge.sock
TmpFS={at}/tmp.%n
SlurmctldPort={ports[0]}
SlurmctldPidFile={at}/slurmctld.pid
SlurmctldLogFile={at}/slurmctld.log
StateSaveLocation={at}/state
SlurmdSpoolDir={at}/spool.%n
SlurmdPidFile={at}/slurmd.%n.pid
SlurmdLogFile={at}/slurmd.%n.log
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
JobRequeue=1
PropagateResourceLimits=NONE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=ci Nodes=n[1-2] Default=YES MaxTime=10 State=UP
"""


def missing() -> str:
    """Why there can be no Slurm here; empty where there can."""
    if os.geteuid() != 0:
        return "Slurm's daemons are started as root only"
    lacking = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    if lacking:
        return f"{', '.join(lacking)} not installed: apt-get install --no-install-recommends slurm-wlm libpmix2"
    return ""


def offer_pmix() -> None:
    """Debian's plugin opens the library by its unversioned name, which comes with a development package only."""
    for library in Path("/usr/lib").glob("*/pmix2/lib/libpmix.so.2"):
        name = library.with_name("libpmix.so")
        if not name.exists():
            name.symlink_to(library.name)


@dataclass
class Slurm:
    """The cluster, once :meth:`start` is through."""

    at: Path

    @property
    def env(self) -> dict[str, str]:
        return {**os.environ, "PATH": PATH, "SLURM_CONF": str(self.at / "slurm.conf")}

    def start(self) -> None:
        at = self.at
        offer_pmix()
        (at / "state").mkdir(parents=True)
        for node in ("n1", "n2"):
            (at / f"tmp.{node}").mkdir()
        key = at / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        ports = [free_port() for _ in range(3)]
        (at / "slurm.conf").write_text(_CONF.format(host=socket.gethostname().split(".")[0], at=at, ports=ports))
        files = {"socket": "munge.sock", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "munged.seed"}
        self.run("munged", "--force", f"--key-file={key}", *(f"--{name}={at / file}" for name, file in files.items()))
        self.run("slurmctld", "-f", str(at / "slurm.conf"))
        for node in ("n1", "n2"):
            self.run("slurmd", "-f", str(at / "slurm.conf"), "-N", node)
        self.until(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", 30, "two idle nodes")

    def stop(self) -> None:
        for name in ("slurmctld.pid", "slurmd.n1.pid", "slurmd.n2.pid", "munged.pid"):
            try:
                os.kill(int((self.at / name).read_text()), 9)
            except (OSError, ValueError):
                continue

    def run(self, *command: str) -> str:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def until(self, true: object, seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not true():  # type: ignore[operator]
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
            time.sleep(0.2)

    def submit(self, options: list[str], script: Path, arguments: list[str], env: dict[str, str], folder: Path) -> int:
        """Job number of a batch script run from ``folder``; its output goes to ``folder/out``."""
        command = ["sbatch", "--parsable", f"--output={folder / 'out'}", f"--chdir={folder}", *options, str(script), *arguments]
        done = subprocess.run(
            command, env={**self.env, **env}, cwd=folder, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def state(self, job: int) -> dict[str, str]:
        """What ``scontrol`` says of a job: JobState, ExitCode, Restarts and more."""
        words = self.run("scontrol", "-o", "show", "job", str(job)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def end(self, job: int, seconds: float) -> dict[str, str]:
        """Its state once it has ended."""
        self.until(lambda: self.state(job)["JobState"] in ENDED, seconds, f"the end of job {job}")
        return self.state(job)
