"""Many connections tried at once, on real sockets: both directions, few descriptors, and ends that do not answer."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import threading
from collections.abc import Iterator

import pytest

from grace_ds.comm import liveness
from grace_ds.comm.liveness import ENDED, Listener, LivenessProbe, address_of, failures
from tests.unit.sockets import full_queue

pytestmark = pytest.mark.timeout(60)

MANY = 1024


@pytest.fixture
def one() -> Iterator[Listener]:
    own = Listener("127.0.0.1")
    try:
        yield own
    finally:
        own.close()


@contextlib.contextmanager
def descriptors(spare: int) -> Iterator[None]:
    """This process may open ``spare`` descriptors more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        for _ in range(spare):
            os.close(held.pop())
        yield
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_one_rank_is_asked_by_a_thousand_again_and_again(one: Listener) -> None:
    for _ in range(3):  # what is asked is forgotten: nothing stays in the queue
        assert failures(dict.fromkeys(range(MANY), one.address)) == {}


def test_one_rank_asks_a_thousand() -> None:
    with contextlib.ExitStack() as stack:
        others = [Listener("127.0.0.1") for _ in range(128)]
        for other in others:
            stack.callback(other.close)
        call = LivenessProbe(0, [others[rank % 128].address for rank in range(MANY)], ["h"] * MANY)
        assert call.absent(patience=1.0) == {}
        # All of them at the same time, as when a collective has broken.
        found: dict[int, dict[int, str]] = {}
        calls = [LivenessProbe(rank, call.addresses[:128], ["h"] * 128) for rank in range(0, 128, 16)]
        asking = [threading.Thread(target=lambda c=c: found.update({c.rank: c.absent()})) for c in calls]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        assert found == {c.rank: {} for c in calls}
        others[5].close()
        assert set(call.absent().values()) == {ENDED} and sorted(call.absent()) == list(range(5, MANY, 128))


def test_few_descriptors_are_enough_and_none_is_no_evidence(one: Listener) -> None:
    gone = ("127.0.0.1", 1)
    with descriptors(3):
        assert failures({**dict.fromkeys(range(MANY), one.address), MANY: gone}) == {MANY: errno.ECONNREFUSED}
    with descriptors(0):
        assert failures({0: gone, 1: one.address}, seconds=0.3) == {}
        with contextlib.suppress(OSError):  # the listener too has no descriptor for what comes
            Listener("127.0.0.1").close()
    assert failures(dict.fromkeys(range(MANY), one.address)) == {}


def test_no_answer_is_told_from_a_refusal_within_its_time(monkeypatch: pytest.MonkeyPatch, one: Listener) -> None:
    monkeypatch.setattr(liveness, "_TRY_SECONDS", 0.4)
    with full_queue() as address:
        mute = dict.fromkeys(range(20), address)
        assert set(failures(mute, at_once=8).values()) == {errno.ETIMEDOUT}
        # However many do not answer: no further one is tried after a while, and nothing is said of it.
        assert len(failures(mute, at_once=8, seconds=0.5)) == 16
    assert failures({7: one.address, 8: ("127.0.0.1", 1)}) == {8: errno.ECONNREFUSED}


def test_only_the_interface_towards_the_master_is_listened_on(one: Listener) -> None:
    host, port = one.address
    assert host == address_of({"MASTER_ADDR": "127.0.0.1"}) == address_of({}) == "127.0.0.1"
    assert failures({0: ("127.0.0.2", port)}) == {0: errno.ECONNREFUSED}
    assert address_of({"MASTER_ADDR": "no such host"}) == "127.0.0.1"


def test_a_process_has_one_listener_and_a_forked_child_none() -> None:
    mine = liveness.of_this_process("127.0.0.1")
    assert liveness.of_this_process("127.0.0.1") is mine
    here = len(threading.enumerate())
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        other = liveness.of_this_process("127.0.0.1")  # one of its own, where it asks for one
        os.write(writer, f"{other.address[1]} {mine._socket.fileno()}".encode())
        os._exit(0)
    told, _ = os.read(reader, 100).split(), os.waitpid(child, 0)
    os.close(reader), os.close(writer)
    assert int(told[0]) != mine.address[1] and int(told[1]) == -1
    assert failures({0: mine.address}) == {} and len(threading.enumerate()) == here
