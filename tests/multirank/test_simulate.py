"""What a simulation counts is what real ranks count, and what these count is what gloo's sockets have sent."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from typing import Any

import pytest

from grace_ds.cli.simulate import Job, simulated_config, two_refreshes
from grace_ds.comm.base import Comm
from grace_ds.comm.choose import choose
from grace_ds.comm.simulated import simulate
from grace_ds.comm.traffic import Traffic
from grace_ds.config.load import load_config
from tests.multirank.harness import World, run_ranks

NARROW = ["features.dim=24", "collect.dim=16"]
WORDS = {
    "grace": ["recipe=grace", "graph.tier=clustered", *NARROW],
    "ring": ["recipe=grace", "graph.tier=exact", *NARROW],
    "facility": ["recipe=grace", "graph.tier=exact", "selection.objective=facility_location", *NARROW],
    "content": ["recipe=content"],
}
pytestmark = pytest.mark.timeout(240)
_PREAMBLE = 48  # bytes that gloo puts before each of its messages, and sends to announce one
_BYTES_SENT = 200  # offset of tcpi_bytes_sent in struct tcp_info (linux/tcp.h)


def refreshes(comm: Comm, name: str) -> tuple[dict[str, Traffic], dict[str, Traffic], str]:
    """What this rank sends in two refreshes, by stage, and the digest of the second schedule."""
    config = load_config({}, dotlist=WORDS[name])
    job = Job(comm.size, 6000 if name == "content" else 1200, 16, 8)  # histograms from 4,096 on
    found = two_refreshes(comm, job, simulated_config(config, job.samples, comm.size))
    return found.first, found.later, found.schedule.digest()


def really(world: World, name: str) -> Any:
    return refreshes(choose("torch", timeout=60.0), name)


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("size", [2, 4])
def test_simulated_counts_are_those_of_a_real_run(size: int, name: str) -> None:
    real = run_ranks(really, size, name, timeout=200)
    simulated = simulate(size, lambda comm: refreshes(comm, name)).results
    for rank in range(size):
        for which in (0, 1):
            assert simulated[rank][which] == real[rank][which], (rank, which)
        assert real[rank][0]["select"].messages > size and real[rank][1]["broadcast"].bytes > 0
    digests = {one[2] for one in real} | {one[2] for one in simulated}
    assert len(digests) == 1


def sent_by_sockets() -> int:
    """Bytes that this process has sent over all of its TCP connections, as the kernel counts them."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as one:
                    if one.type == socket.SOCK_STREAM and one.family != socket.AF_UNIX:
                        info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                        total += struct.unpack_from("Q", info, _BYTES_SENT)[0]
    return total


def on_the_wire(world: World, name: str) -> tuple[int, Traffic]:
    comm = choose("torch", timeout=60.0)
    comm.agree()
    time.sleep(0.5)  # until the last announcements have left
    before, counted = sent_by_sockets(), comm.traffic.copy()
    refreshes(comm, name)
    time.sleep(0.5)
    return sent_by_sockets() - before, comm.traffic.since(counted)


def test_counted_bytes_are_those_that_the_sockets_sent() -> None:
    size = 2
    found = run_ranks(on_the_wire, size, "grace", timeout=200)
    payload, messages, calls = (sum(getattr(traffic, of) for _, traffic in found) for of in ("bytes", "messages", "calls"))
    rest = sum(sent for sent, _ in found) - payload
    assert rest % _PREAMBLE == 0
    assert messages <= rest // _PREAMBLE <= 12 * size * calls
    assert payload > 10**6
