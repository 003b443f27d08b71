"""Who of the job's processes is still there, asked without anybody's help.

A rank that is late and a rank that is gone look the same to a collective.  So every process holds a listening socket that
it never accepts from: the kernel completes a connection as long as the process lives, however busy or stuck it is, refuses
it once the process has ended, and nobody answers where the host or the link is down.
"""

from __future__ import annotations

import errno
import logging
import os
import selectors
import socket
import time
import weakref
from collections.abc import Mapping

from grace_ds.comm.choose import share

log = logging.getLogger("grace_ds")

_PROBE_SECONDS = 2.5  # one lost packet is sent again after a second
ENDED, UNREACHABLE = "its process has ended", "its host cannot be reached"
Address = tuple[str, int]


class RollCall:
    """The addresses of all ranks, and this process's own socket.

    Args:
        rank: of this process.
        addresses: (host, port) by rank; empty: nobody can be asked.
        names: host name by rank, for messages.
    """

    def __init__(self, rank: int, own: socket.socket | None, addresses: list[Address], names: list[str]) -> None:
        self.rank, self.addresses, self.names = rank, addresses, names
        self._own = own

    @staticmethod
    def open(environ: Mapping[str, str]) -> RollCall:
        """Opens this process's socket and learns the others' addresses.  Collective over torch's world.

        Where some rank cannot reach another by the address that it gives, nobody is asked later, and rank 0 says why.
        """
        import torch.distributed as dist

        if not dist.is_initialized() or dist.get_world_size() == 1:
            return RollCall(0, None, [], [])
        own = _listen()
        mine = (_address(environ), own.getsockname()[1]), socket.gethostname()
        told = share(mine)
        call = RollCall(dist.get_rank(), own, [address for address, _ in told], [name for _, name in told])
        deaf = [rank for found in share(sorted(call.absent())) for rank in found]
        if deaf:
            if call.rank == 0:
                host, port = call.addresses[deaf[0]]
                log.info("rank %d cannot be asked at %s:%d: lost ranks will not be told by name", deaf[0], host, port)
            call.close()
        return call

    def absent(self, patience: float = 0.0) -> dict[int, str]:
        """Ranks that do not answer, each with :data:`ENDED` or :data:`UNREACHABLE`; not collective.

        Args:
            patience: seconds to ask again in while all answer: a process that is about to end still does.
        """
        others = {rank: address for rank, address in enumerate(self.addresses) if rank != self.rank}
        deadline = time.monotonic() + patience
        while True:
            missing = _probe(others)
            if missing or not others or time.monotonic() >= deadline:
                return missing
            time.sleep(0.2)

    def words(self, missing: Mapping[int, str]) -> str:
        """``missing`` in words."""
        told = [f"rank {rank} on {self.names[rank]} ({why})" for rank, why in sorted(missing.items())[:8]]
        return ", ".join(told) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")

    def close(self) -> None:
        """Closes the socket and forgets the others.  A second call does nothing."""
        self.addresses = []
        if self._own is not None:
            self._own.close()
            self._own = None


def _listen() -> socket.socket:
    own = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    own.bind(("", 0))
    own.listen(128)
    _open.add(own)
    return own


def _close_in_child() -> None:
    for own in list(_open):
        own.close()


# A data worker that outlives its rank must not answer for it.
_open: weakref.WeakSet[socket.socket] = weakref.WeakSet()
os.register_at_fork(after_in_child=_close_in_child)


def _address(environ: Mapping[str, str]) -> str:
    """The address of this host on the way to rank 0's; nothing is sent."""
    master = environ.get("MASTER_ADDR", "127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        try:
            way.connect((master, 1))
            return str(way.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def _probe(addresses: Mapping[int, Address]) -> dict[int, str]:
    missing: dict[int, str] = {}
    with selectors.DefaultSelector() as waiting:
        for rank, address in addresses.items():
            s = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            s.setblocking(False)
            code = s.connect_ex(address)
            if code == errno.EINPROGRESS:
                waiting.register(s, selectors.EVENT_WRITE, rank)
            else:
                _note(missing, rank, code)
                s.close()
        deadline = time.monotonic() + _PROBE_SECONDS
        while waiting.get_map() and time.monotonic() < deadline:
            for key, _ in waiting.select(max(0.0, deadline - time.monotonic())):
                s = key.fileobj  # type: ignore[assignment]
                _note(missing, key.data, s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
                waiting.unregister(s)
                s.close()
        for key in list(waiting.get_map().values()):
            missing[key.data] = UNREACHABLE
            waiting.unregister(key.fileobj)
            key.fileobj.close()  # type: ignore[union-attr]
    return missing


def _note(missing: dict[int, str], rank: int, code: int) -> None:
    if code:
        missing[rank] = ENDED if code == errno.ECONNREFUSED else UNREACHABLE
