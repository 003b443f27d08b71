"""Connections tried to many addresses, a bounded number at once, and dropped as soon as they stand."""

from __future__ import annotations

import errno
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Mapping

from grace_ds.comm.listener import SCARCE, Address, family_of

AT_ONCE = 64  # descriptors in use at most
_TRY_SECONDS = 2.5  # a lost packet is sent again after one second
_ALL_SECONDS = 15.0  # for all addresses together, however many do not answer
_SCARCE_SECONDS = 0.05
# On close the connection is reset: hundreds of them a second would each hold a port for a minute otherwise.
_RESET = struct.pack("ii", 1, 0)


def failures(addresses: Mapping[int, Address], at_once: int = AT_ONCE, seconds: float = _ALL_SECONDS) -> dict[int, int]:
    """Tries each address once; returns the error number of those where no connection came about.

    ``ECONNREFUSED``: nobody listens there.  Any other one, such as ``ETIMEDOUT``: no answer.  An address that could not be
    tried, for lack of descriptors or of time, is left out: nothing is known of it.

    Args:
        addresses: by key; tried in this order.
        at_once: descriptors to use at most; fewer are used where the process has no more.
        seconds: after which no further one is tried.
    """
    failed: dict[int, int] = {}
    left, deadline, room = deque(addresses.items()), time.monotonic() + seconds, at_once
    with selectors.PollSelector() as waiting:  # needs no descriptor itself
        while left or waiting.get_map():
            now = time.monotonic()
            if now >= deadline:
                left.clear()
            while left and len(waiting.get_map()) < room:
                key, address = left[0]
                code = _begin(waiting, key, address)
                if code in SCARCE:
                    room = max(len(waiting.get_map()), 1)
                    break
                left.popleft()
                if code:
                    failed[key] = code
            if not waiting.get_map():
                time.sleep(_SCARCE_SECONDS if left else 0.0)
                continue
            _end(waiting, failed)
    return failed


def _begin(waiting: selectors.BaseSelector, key: int, address: Address) -> int:
    """Starts one connection; returns what has become of it: 0 also while it is under way."""
    try:
        s = socket.socket(family_of(address[0]), socket.SOCK_STREAM)
    except OSError as error:
        return error.errno or errno.EMFILE
    s.setblocking(False)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    code = s.connect_ex(address)
    if code == errno.EINPROGRESS:
        waiting.register(s, selectors.EVENT_WRITE, (key, time.monotonic() + _TRY_SECONDS))
        return 0
    s.close()
    return code


def _end(waiting: selectors.BaseSelector, failed: dict[int, int]) -> None:
    """Waits for the first of the connections under way, and drops those that stand, have failed or take too long."""
    first = min(end for _, end in (entry.data for entry in waiting.get_map().values()))
    ready = {entry.fd for entry, _ in waiting.select(max(0.0, first - time.monotonic()))}
    now = time.monotonic()
    for entry in list(waiting.get_map().values()):
        s, (key, end) = entry.fileobj, entry.data
        assert isinstance(s, socket.socket)
        if entry.fd in ready:
            code = s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        elif now >= end:
            code = errno.ETIMEDOUT
        else:
            continue
        if code:
            failed[key] = code
        waiting.unregister(s)
        s.close()
