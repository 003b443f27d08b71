"""Probe which of the job's processes are alive, without a collective and without their cooperation.

A late rank and a dead rank look the same to a collective.  So every process holds a listening socket, whose connections are
accepted and dropped at once.  The kernel completes a connection however busy or stuck the process is, and refuses it once the
process has ended; if the host or the link is down, there is no answer.  (The accepting thread only keeps the queue of completed
connections from filling up, since a full queue looks like a host that is down.)  Only a refusal proves that a process has
ended; a missing answer proves nothing.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import selectors
import socket
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping

from grace_ds.comm.choose import share

log = logging.getLogger("grace_ds")

ENDED, UNREACHABLE = "its process has ended", "its host cannot be reached"
_CONFIRM_SECONDS = 0.2  # between the two refusals that prove that a process has ended
_FIRST_PAUSE = 0.2  # seconds between two rounds, doubling
_LOOPBACK = "127.0.0.1"
Address = tuple[str, int]
# Errors that an accept or a new socket gives for lack of local resources; they say nothing about the other end.
SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL, errno.EAGAIN})

_QUEUE = 4096  # connections held while the thread cannot run; the kernel caps it at net.core.somaxconn
_ACCEPT_PAUSE = 0.1  # seconds until the next accept if local resources are short
AT_ONCE = 64  # most descriptors in use at once
_TRY_SECONDS = 2.5  # a lost packet is sent again after one second
_ALL_SECONDS = 15.0  # for all addresses together, however many of them do not answer
_SCARCE_SECONDS = 0.05  # until the next connection is tried if descriptors are short
# Closing resets the connection.  Otherwise each of hundreds of connections a second would hold a port for a minute.
_RESET = struct.pack("ii", 1, 0)


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
            mine: Address = of_this_process(host).address
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
    """Return :func:`failures`, where a refusal counts only if it is met twice, with a pause between."""
    failed = failures(addresses)
    refused = {rank: addresses[rank] for rank, code in failed.items() if code == errno.ECONNREFUSED}
    if not refused:
        return failed
    time.sleep(_CONFIRM_SECONDS)
    return {rank: code for rank, code in failed.items() if rank not in refused} | failures(refused)


# -- the listening socket ------------------------------------------------------------------------------------------------


class Listener:
    """A listening socket on a free port and a daemon thread that accepts from it, until :meth:`close`.

    Args:
        host: numeric address of the interface to listen on; no other interface is bound.

    Raises:
        OSError: the address is not this host's, or no descriptor is left.
    """

    def __init__(self, host: str) -> None:
        self._socket = socket.socket(family_of(host), socket.SOCK_STREAM)
        try:
            self._socket.bind((host, 0))
            self._socket.listen(_QUEUE)
            name = self._socket.getsockname()
        except OSError:
            self._socket.close()
            raise
        self.address: Address = (name[0], name[1])
        _open.add(self)
        self._thread = threading.Thread(target=_drop_all, args=(self._socket,), name="grace_ds listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and free the port.  A second call does nothing."""
        with contextlib.suppress(OSError):  # closed already
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread; close() alone would not
        if self._thread.is_alive():
            self._thread.join()
        self._socket.close()

    def close_in_child(self) -> None:
        """Close a forked child's copy of the descriptor.  The thread and the socket itself stay with the parent."""
        self._socket.close()


def family_of(host: str) -> socket.AddressFamily:
    """Return the address family of a numeric address."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def of_this_process(host: str) -> Listener:
    """Return the process's one listener on ``host``, made at the first call and open until the process ends.

    It belongs to the process, not to an engine: closing it with an engine would make the process look ended.

    Raises:
        OSError: as :class:`Listener`.
    """
    if host not in _here:
        _here[host] = Listener(host)
    return _here[host]


def _drop_all(own: socket.socket) -> None:
    while True:
        try:
            peer, _ = own.accept()
        except OSError as error:
            if error.errno in SCARCE:
                time.sleep(_ACCEPT_PAUSE)  # the connection stays in the queue, complete
            elif error.errno != errno.ECONNABORTED:
                return  # closed
        else:
            peer.close()


def _leave_to_parent() -> None:
    for listener in list(_open):
        listener.close_in_child()
    _open.clear()
    _here.clear()


_here: dict[str, Listener] = {}
_open: weakref.WeakSet[Listener] = weakref.WeakSet()
# A data-loader worker that outlives its rank must not answer for the rank.
os.register_at_fork(after_in_child=_leave_to_parent)


# -- connections to many addresses ---------------------------------------------------------------------------------------


def failures(addresses: Mapping[int, Address], at_once: int = AT_ONCE, seconds: float = _ALL_SECONDS) -> dict[int, int]:
    """Try each address once and return the error number of each failed connection, by key.

    ``ECONNREFUSED``: no process listens there.  Any other error, such as ``ETIMEDOUT``: no answer.  An address that could
    not be tried, for lack of descriptors or of time, is left out: nothing is known of it.

    Args:
        addresses: by key; tried in this order.
        at_once: most descriptors to use; fewer are used if the process has no more.
        seconds: after which no further address is tried.
    """
    failed: dict[int, int] = {}
    left, deadline, room = deque(addresses.items()), time.monotonic() + seconds, at_once
    with selectors.PollSelector() as waiting:  # needs no descriptor of its own
        while left or waiting.get_map():
            now = time.monotonic()
            if now >= deadline:
                left.clear()
            while left and len(waiting.get_map()) < room:
                key, address = left[0]
                code = _start_connection(waiting, key, address)
                if code in SCARCE:
                    room = max(len(waiting.get_map()), 1)
                    break
                left.popleft()
                if code:
                    failed[key] = code
            if not waiting.get_map():
                time.sleep(_SCARCE_SECONDS if left else 0.0)
                continue
            _drop_finished(waiting, failed)
    return failed


def _start_connection(waiting: selectors.BaseSelector, key: int, address: Address) -> int:
    """Start one connection and return its error number; 0 if it is established or still under way."""
    try:
        connection = socket.socket(family_of(address[0]), socket.SOCK_STREAM)
    except OSError as error:
        return error.errno or errno.EMFILE
    connection.setblocking(False)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    code = connection.connect_ex(address)
    if code == errno.EINPROGRESS:
        waiting.register(connection, selectors.EVENT_WRITE, (key, time.monotonic() + _TRY_SECONDS))
        return 0
    connection.close()
    return code


def _drop_finished(waiting: selectors.BaseSelector, failed: dict[int, int]) -> None:
    """Wait for the first of the connections under way; drop those that are established, have failed or take too long."""
    first = min(end for _, end in (entry.data for entry in waiting.get_map().values()))
    ready = {entry.fd for entry, _ in waiting.select(max(0.0, first - time.monotonic()))}
    now = time.monotonic()
    for entry in list(waiting.get_map().values()):
        connection, (key, end) = entry.fileobj, entry.data
        assert isinstance(connection, socket.socket)
        if entry.fd in ready:
            code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        elif now >= end:
            code = errno.ETIMEDOUT
        else:
            continue
        if code:
            failed[key] = code
        waiting.unregister(connection)
        connection.close()
