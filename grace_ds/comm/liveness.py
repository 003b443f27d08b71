"""Probe which of the job's processes are alive, without a collective and without their cooperation.

A late rank and a dead rank look the same to a collective.  So every process holds a listening socket
(:mod:`grace_ds.comm.listener`).  A connection to it succeeds as long as the process lives, is refused once the process has
ended, and gets no answer if the host or the link is down.  Only a refusal proves that a process has ended; a missing answer
proves nothing.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
import time
from collections.abc import Mapping

from grace_ds.comm import listener
from grace_ds.comm.choose import share
from grace_ds.comm.connect import failures
from grace_ds.comm.listener import Address

log = logging.getLogger("grace_ds")

ENDED, UNREACHABLE = "its process has ended", "its host cannot be reached"
_CONFIRM_SECONDS = 0.2  # between the two refusals that prove that a process has ended
_FIRST_PAUSE = 0.2  # seconds between two rounds, doubling
_LOOPBACK = "127.0.0.1"


class LivenessProbe:
    """Probes the ranks of torch's world at the addresses where their processes listen.

    Args:
        rank: of this process.
        addresses: (host, port) by rank; empty: no rank can be probed.
        names: host name by rank, for messages.
    """

    def __init__(self, rank: int, addresses: list[Address], names: list[str]) -> None:
        self.rank, self.addresses, self.names = rank, addresses, names

    @staticmethod
    def open(environ: Mapping[str, str]) -> LivenessProbe:
        """Make this process listen, and gather the addresses of all ranks.  Collective over torch's world.

        If some rank cannot reach another at its address, no rank is probed later, and rank 0 logs why.

        Args:
            environ: its ``MASTER_ADDR`` decides on which interface this process listens.
        """
        import torch.distributed as dist

        if not dist.is_initialized() or dist.get_world_size() == 1:
            return LivenessProbe(0, [], [])
        host = address_of(environ)
        try:
            mine: Address = listener.of_this_process(host).address
        except OSError as error:
            log.info("this rank cannot listen on %s (%s)", host, error)
            mine = (host, 0)
        listeners = share((mine, socket.gethostname()))
        probe = LivenessProbe(dist.get_rank(), [address for address, _ in listeners], [name for _, name in listeners])
        silent = probe._without_address() or sorted(probe.absent())
        if silent and not probe._without_address():
            silent = sorted(probe.absent())  # at the start of a large job a packet may well be lost
        unreachable = [rank for ranks in share(silent) for rank in ranks]
        if unreachable:
            if probe.rank == 0:
                where, port = probe.addresses[unreachable[0]]
                log.info("rank %d cannot be probed at %s:%d: lost ranks will not be named", unreachable[0], where, port)
            probe.close()
        return probe

    def absent(self, patience: float = 0.0) -> dict[int, str]:
        """Return the ranks that do not answer, each with :data:`ENDED` or :data:`UNREACHABLE`.  Not collective.

        Args:
            patience: seconds during which the probe is repeated until some process has ended; a process that is about to end
                still answers.
        """
        size = len(self.addresses)
        # Each rank begins with the next one, so that ranks that probe at the same time do not all probe the same rank.
        others = {rank: self.addresses[rank] for rank in ((self.rank + i) % size for i in range(1, size))}
        deadline, pause = time.monotonic() + patience, _FIRST_PAUSE
        while True:
            missing = {
                rank: ENDED if code == errno.ECONNREFUSED else UNREACHABLE for rank, code in _confirmed_failures(others).items()
            }
            if ENDED in missing.values() or not others or time.monotonic() >= deadline:
                return missing
            time.sleep(pause)
            pause *= 2

    def words(self, missing: Mapping[int, str]) -> str:
        """Return ``missing`` in words, for messages."""
        ranks = [f"rank {rank} on {self.names[rank]} ({why})" for rank, why in sorted(missing.items())[:8]]
        return ", ".join(ranks) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")

    def close(self) -> None:
        """Forget the other ranks; this process keeps answering.  A second call does nothing."""
        self.addresses = []

    def _without_address(self) -> list[int]:
        """Return the ranks without a usable address: without a port, or on a loopback in a job of several hosts."""
        several = len(set(self.names)) > 1
        return [rank for rank, (host, port) in enumerate(self.addresses) if not port or (several and _is_loopback(host))]


def address_of(environ: Mapping[str, str]) -> str:
    """Return the numeric address of this host on the route to rank 0's host; nothing is sent.

    Without a route it is the loopback address.
    """
    try:
        routes = socket.getaddrinfo(environ.get("MASTER_ADDR", _LOOPBACK), 1, type=socket.SOCK_DGRAM)
    except OSError:
        return _LOOPBACK
    for family, kind, protocol, _, target in sorted(routes, key=lambda route: route[0] != socket.AF_INET):
        with socket.socket(family, kind, protocol) as datagram:
            try:
                datagram.connect(target)
                return str(datagram.getsockname()[0])
            except OSError:
                continue
    return _LOOPBACK


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


def _confirmed_failures(addresses: Mapping[int, Address]) -> dict[int, int]:
    """Return :func:`~grace_ds.comm.connect.failures`, where a refusal counts only if it is met twice, with a pause between."""
    failed = failures(addresses)
    refused = {rank: addresses[rank] for rank, code in failed.items() if code == errno.ECONNREFUSED}
    if not refused:
        return failed
    time.sleep(_CONFIRM_SECONDS)
    return {rank: code for rank, code in failed.items() if rank not in refused} | failures(refused)
