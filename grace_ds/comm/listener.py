"""Keep a listening socket that shows that this process is alive: each connection is accepted and dropped at once.

The kernel completes a connection however busy or stuck the process is, and refuses it once the process has ended.  The
accepting thread only keeps the queue of completed connections from filling up, since a full queue looks like a host that is
down.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
import weakref

Address = tuple[str, int]
# Errors that an accept or a new socket gives for lack of local resources; they say nothing about the other end.
SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL, errno.EAGAIN})

_QUEUE = 4096  # connections held while the thread cannot run; the kernel caps it at net.core.somaxconn
_SCARCE_SECONDS = 0.1


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
                time.sleep(_SCARCE_SECONDS)  # the connection stays in the queue, complete
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
