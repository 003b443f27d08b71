"""Two hosts on this machine: network, mount, UTS and PID namespaces of their own, joined by a bridge, each with an sshd."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # where Debian's packages put what a user's PATH does not name
NAMES = ("n1", "n2")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
_numbers = itertools.count()

_SSHD = """
Port 22
HostKey {at}/host_key
AuthorizedKeysFile {at}/dotssh/id.pub
PidFile none
UsePAM no
StrictModes no
PermitRootLogin yes
SetEnv TMPDIR={tmp}
"""
_SSH = """
Host *
    IdentityFile {at}/dotssh/id
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
    ServerAliveInterval 5
    ServerAliveCountMax 3
"""
# Names the host, and puts the files that belong to it over the machine's.
_NODE = """
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/dotssh" "$HOME/.ssh"
shift 2
exec "$@"
"""


@cache
def missing(*tools: str) -> str:
    """Why there can be no two hosts with these tools here; empty where there can."""
    if os.geteuid() != 0:
        return "network namespaces are made as root only"
    packages = {"ip": "iproute2", "sshd": "openssh-server", "ssh-keygen": "openssh-client", "pdsh": "pdsh"}
    lacking = [tool for tool in ("ip", "nsenter", "unshare", *tools) if shutil.which(tool, path=PATH) is None]
    if lacking:
        return f"{', '.join(lacking)} not installed: apt-get install {' '.join(packages.get(t, 'util-linux') for t in lacking)}"
    name = f"gds{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False, env={"PATH": PATH})
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False, env={"PATH": PATH})
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass
class Hosts:
    """The hosts, once :meth:`start` is through; n1 is 10.77.0.1, n2 is 10.77.0.2."""

    at: Path
    ssh: bool = False
    prefix: str = field(default_factory=lambda: f"gds{os.getpid()}-{next(_numbers)}")

    def __post_init__(self) -> None:
        # Of these hosts alone, for daemons name their folders there by process ids, which each host counts from 1; and near
        # the root, for sockets in it have short names only.
        self._tmp = tempfile.mkdtemp(prefix="gds-", dir="/tmp")
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._inside: dict[str, int] = {}

    def start(self) -> None:
        self.at.mkdir(parents=True, exist_ok=True)
        self._files()
        hub = self._netns("hub")
        self._ip("netns", "add", hub)
        self._ip("-n", hub, "link", "add", "br0", "type", "bridge")
        self._ip("-n", hub, "link", "set", "br0", "up")
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            netns = self._netns(name)
            self._ip("netns", "add", netns)
            self._ip("-n", netns, "link", "set", "lo", "up")
            self._ip("-n", hub, "link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", netns)
            self._ip("-n", hub, "link", "set", f"v{name}", "master", "br0", "up")
            self._ip("-n", netns, "addr", "add", f"{address}/24", "dev", "eth0")
            self._ip("-n", netns, "link", "set", "eth0", "up")
            self._boot(name)

    def stop(self) -> None:
        for daemon in self._daemons:
            daemon.send_signal(signal.SIGKILL)  # with --kill-child its PID namespace ends with it
            daemon.wait()
        shutil.rmtree(self._tmp, ignore_errors=True)
        for name in ("hub", *NAMES):
            subprocess.run(["ip", "netns", "del", self._netns(name)], env={"PATH": PATH}, capture_output=True, check=False)

    def popen(
        self, name: str, command: Sequence[str], env: Mapping[str, str], cwd: Path, out: IO[str]
    ) -> subprocess.Popen[bytes]:
        """Starts a command on a host; its output goes to ``out``."""
        spaces = ["--net", "--mount", "--uts", "--pid", "--wd=" + str(cwd)]
        whole = ["nsenter", "-t", str(self._inside[name]), *spaces, "--", *command]
        return subprocess.Popen(
            whole,
            env={"PATH": PATH, **env, "TMPDIR": self._tmp},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )

    def inside(self, name: str) -> int:
        """Number out here of a host's first process, by which its namespaces are entered."""
        return self._inside[name]

    def cut(self, name: str, how: str) -> None:
        """Takes a host off the network: its ``link`` goes down, or the switch will ``drop`` all that it sends and gets."""
        if how == "link":
            self._ip("-n", self._netns(name), "link", "set", "eth0", "down")
        else:
            self._ip("-n", self._netns("hub"), "link", "set", f"v{name}", "nomaster")

    def heal(self, name: str) -> None:
        """Undoes :meth:`cut`, whatever it was."""
        self._ip("-n", self._netns(name), "link", "set", "eth0", "up")
        self._ip("-n", self._netns("hub"), "link", "set", f"v{name}", "master", "br0")

    def _netns(self, name: str) -> str:
        return f"{self.prefix}-{name}"

    def _ip(self, *words: str) -> None:
        done = subprocess.run(["ip", *words], env={"PATH": PATH}, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"

    def _files(self) -> None:
        at = self.at
        (at / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for n, a in zip(NAMES, ADDRESSES, strict=True)))
        (at / "dotssh").mkdir()
        (at / "dotssh" / "config").write_text(_SSH.format(at=at))
        (at / "sshd_config").write_text(_SSHD.format(at=at, tmp=self._tmp))
        (at / "node.sh").write_text(_NODE)
        (Path.home() / ".ssh").mkdir(mode=0o700, exist_ok=True)  # the place that the hosts' own is mounted over
        if self.ssh:
            Path("/run/sshd").mkdir(exist_ok=True)
            for key in (at / "host_key", at / "dotssh" / "id"):
                subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True, timeout=30)

    def _boot(self, name: str) -> None:
        sshd = shutil.which("sshd", path=PATH) or "sshd"
        first = [sshd, "-D", "-e", "-f", str(self.at / "sshd_config")] if self.ssh else ["sleep", "infinity"]
        spaces = ["--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        node = ["bash", str(self.at / "node.sh"), name, str(self.at), *first]
        command = ["ip", "netns", "exec", self._netns(name), "unshare", *spaces, *node]
        out = (self.at / f"{name}.log").open("w")
        daemon = subprocess.Popen(command, env={**os.environ, "PATH": PATH}, stdout=out, stderr=out, start_new_session=True)
        self._daemons.append(daemon)
        deadline = time.monotonic() + 30
        while not self._booted(name, daemon, first[0]):
            assert daemon.poll() is None and time.monotonic() < deadline, (self.at / f"{name}.log").read_text()
            time.sleep(0.05)

    def _booted(self, name: str, daemon: subprocess.Popen[bytes], first: str) -> bool:
        """Whether process 1 of the host is what it is to run; notes its number out here."""
        children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
        if not children:
            return False
        words = Path(f"/proc/{children[0]}/cmdline").read_text().split("\0")
        self._inside[name] = int(children[0])
        return words[0].endswith(Path(first).name) or words[0].startswith("sshd:")
