"""Try connections to many addresses, a bounded number at once, and drop each as soon as it is established."""

from __future__ import annotations

import errno
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Mapping

from grace_ds.comm.listener import SCARCE, Address, family_of

AT_ONCE = 64  # most descriptors in use at once
_TRY_SECONDS = 2.5  # a lost packet is sent again after one second
_ALL_SECONDS = 15.0  # for all addresses together, however many of them do not answer
_SCARCE_SECONDS = 0.05
# Closing resets the connection.  Otherwise each of hundreds of connections a second would hold a port for a minute.
_RESET = struct.pack("ii", 1, 0)


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
