"""Who of the job's processes is still there, asked without anybody's help.

A rank that is late and a rank that is gone look the same to a collective.  So every process holds a listening socket
(:mod:`grace_ds.comm.listener`): a connection to it stands as long as the process lives, is refused once it has ended, and
nobody answers where the host or the link is down.  Only a refusal says that a process has ended; no answer says nothing for sure.
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
_CONFIRM_SECONDS = 0.2  # between two refusals that count
_FIRST_PAUSE = 0.2  # seconds between two rounds, doubling
_LOOPBACK = "127.0.0.1"


class LivenessProbe:
    """The addresses of all ranks.

    Args:
        rank: of this process.
        addresses: (host, port) by rank; empty: nobody can be asked.
        names: host name by rank, for messages.
    """

    def __init__(self, rank: int, addresses: list[Address], names: list[str]) -> None:
        self.rank, self.addresses, self.names = rank, addresses, names

    @staticmethod
    def open(environ: Mapping[str, str]) -> LivenessProbe:
        """Has this process listen, and learns the others' addresses.  Collective over torch's world.

        Where some rank cannot reach another by the address that it gives, nobody is asked later, and rank 0 says why.

        Args:
            environ: ``MASTER_ADDR`` in it decides on which interface this process listens.
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
        told = share((mine, socket.gethostname()))
        call = LivenessProbe(dist.get_rank(), [address for address, _ in told], [name for _, name in told])
        silent = call._mute() or sorted(call.absent())
        if silent and not call._mute():
            silent = sorted(call.absent())  # at the start of a large job a packet may well be lost
        deaf = [rank for found in share(silent) for rank in found]
        if deaf:
            if call.rank == 0:
                where, port = call.addresses[deaf[0]]
                log.info("rank %d cannot be asked at %s:%d: lost ranks will not be told by name", deaf[0], where, port)
            call.close()
        return call

    def absent(self, patience: float = 0.0) -> dict[int, str]:
        """Ranks that do not answer, each with :data:`ENDED` or :data:`UNREACHABLE`; not collective.

        Args:
            patience: seconds to ask again in while nobody has ended: a process that is about to still answers.
        """
        n = len(self.addresses)
        # From the next rank on, round: where all ranks ask at once, no rank is asked by all of them at the same time.
        others = {rank: self.addresses[rank] for rank in ((self.rank + i) % n for i in range(1, n))}
        deadline, pause = time.monotonic() + patience, _FIRST_PAUSE
        while True:
            missing = {rank: ENDED if code == errno.ECONNREFUSED else UNREACHABLE for rank, code in _failures(others).items()}
            if ENDED in missing.values() or not others or time.monotonic() >= deadline:
                return missing
            time.sleep(pause)
            pause *= 2

    def words(self, missing: Mapping[int, str]) -> str:
        """``missing`` in words."""
        told = [f"rank {rank} on {self.names[rank]} ({why})" for rank, why in sorted(missing.items())[:8]]
        return ", ".join(told) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")

    def close(self) -> None:
        """Forgets the others; the process goes on answering.  A second call does nothing."""
        self.addresses = []

    def _mute(self) -> list[int]:
        """Ranks that cannot be asked by the address that they give: without a port, or on a loopback that is not ours."""
        several = len(set(self.names)) > 1
        return [r for r, (host, port) in enumerate(self.addresses) if not port or (several and _is_loopback(host))]


def address_of(environ: Mapping[str, str]) -> str:
    """The numeric address of this host on the way to rank 0's; nothing is sent.  The loopback's where no way is known."""
    try:
        ways = socket.getaddrinfo(environ.get("MASTER_ADDR", _LOOPBACK), 1, type=socket.SOCK_DGRAM)
    except OSError:
        return _LOOPBACK
    for family, kind, protocol, _, to in sorted(ways, key=lambda way: way[0] != socket.AF_INET):
        with socket.socket(family, kind, protocol) as way:
            try:
                way.connect(to)
                return str(way.getsockname()[0])
            except OSError:
                continue
    return _LOOPBACK


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


def _failures(addresses: Mapping[int, Address]) -> dict[int, int]:
    """As :func:`~grace_ds.comm.connect.failures`, a refusal only where it is met twice, with a pause between."""
    failed = failures(addresses)
    refused = {rank: addresses[rank] for rank, code in failed.items() if code == errno.ECONNREFUSED}
    if not refused:
        return failed
    time.sleep(_CONFIRM_SECONDS)
    return {rank: code for rank, code in failed.items() if rank not in refused} | failures(refused)
