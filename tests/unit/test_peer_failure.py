"""The last words of a rank: about others only where another rank may be the cause."""

from __future__ import annotations

import gc
import logging
import signal
import socket
import sys
import weakref
from collections.abc import Iterator

import pytest

from grace_ds.comm import connect
from grace_ds.comm import peer_failure as peer_failure_module
from grace_ds.comm.liveness import LivenessProbe
from grace_ds.comm.local import LocalComm
from grace_ds.comm.peer_failure import PeerFailureHandler
from grace_ds.errors import GraceError, PeerLost, TransportError, TransportTimeout, during
from tests.unit.sockets import full_queue


@pytest.fixture
def alone() -> Iterator[PeerFailureHandler]:
    """Rank 0 of two; where rank 1 was, nobody listens any more."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        gone = s.getsockname()
    peer_failures = PeerFailureHandler(LivenessProbe(0, [gone, gone], ["a", "b"]), LocalComm(), lambda: "in training step 3")
    before = signal.getsignal(signal.SIGALRM)
    try:
        yield peer_failures
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        peer_failures.close()


@pytest.fixture
def mute(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    """Where a connection is neither made nor refused: a queue that is full, as a host that is cut off looks."""
    monkeypatch.setattr(connect, "_TRY_SECONDS", 0.4)
    monkeypatch.setattr(peer_failure_module, "_PATIENCE", 0.2)
    with full_queue() as address:
        yield address


def end_by(error: Exception) -> None:
    """As the interpreter does with an error that nobody has caught."""
    try:
        raise error
    except type(error):
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]


def test_a_failed_transport_is_followed_by_who_is_lost(alone: PeerFailureHandler, capsys: pytest.CaptureFixture[str]) -> None:
    end_by(TransportError("x"))
    last = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert "lost: rank 1 on b (its process has ended); noticed by rank 0 in training step 3" in last
    assert 0 < signal.alarm(0) <= 5  # its exit waits for nobody


@pytest.mark.parametrize("error", [ValueError("mine"), RuntimeError("mine"), GraceError("mine")])
def test_an_error_of_this_ranks_own_is_not_put_down_to_others(
    alone: PeerFailureHandler, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    end_by(error)
    assert "lost" not in capsys.readouterr().err
    assert signal.alarm(0) == 0


def test_a_late_rank_is_told_from_a_lost_one(alone: PeerFailureHandler) -> None:
    with pytest.raises(PeerLost, match="in refresh 2, stage graph"):
        try:
            with during("select"), during("graph"):
                raise TransportTimeout("late")
        except TransportTimeout as error:
            alone.check(error, "in refresh 2")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        alone.liveness.addresses[1] = s.getsockname()
        alone.check(TransportTimeout("late"), "in refresh 2")  # returns: it lives


def test_a_rank_that_only_does_not_answer_ends_nothing(
    alone: PeerFailureHandler, mute: tuple[str, int], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = alone.liveness.addresses[1]
    alone.liveness.addresses[1] = mute
    with caplog.at_level(logging.WARNING, "grace_ds"):
        alone.check(TransportTimeout("late"), "in refresh 2")  # returns: GRACE freezes, the job goes on
        alone.check(TransportError("broken"), "in refresh 3")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and all("no answer from rank 1 on b (its host cannot be reached)" in line for line in said)
    assert "noticed by rank 0 in refresh 2" in said[0] and "the job goes on" in said[0]
    end_by(TransportError("x"))  # the job's own collective has failed: now it is the best guess, and said
    assert "lost: rank 1 on b (its host cannot be reached)" in capsys.readouterr().err
    alone.liveness.addresses.append(gone)
    alone.liveness.names.append("c")
    with pytest.raises(PeerLost, match=r"rank 1 on b \(its host .*\), rank 2 on c \(its process has ended\)"):
        alone.check(TransportTimeout("late"), "in refresh 2")


def test_lookouts_that_nobody_holds_are_freed_and_foreign_hooks_stay(capsys: pytest.CaptureFixture[str]) -> None:
    before, seen = sys.excepthook, []

    def foreign(*args: object) -> None:
        seen.append(args)
        below(*args)  # type: ignore[arg-type]

    try:
        first = PeerFailureHandler(LivenessProbe(0, [], []), LocalComm(), lambda: "")
        below, sys.excepthook = sys.excepthook, foreign
        second = PeerFailureHandler(LivenessProbe(0, [], []), LocalComm(), lambda: "")
        refs = [weakref.ref(first), weakref.ref(second)]
        end_by(TransportError("x"))
        assert len(seen) == 1 and capsys.readouterr().err.count("TransportError: x") == 1
        del first
        gc.collect()
        assert [ref() is None for ref in refs] == [True, False]
        second.close()
        assert sys.excepthook is foreign
        del second
        gc.collect()
        assert refs[1]() is None
        end_by(TransportError("x"))  # what is left of ours below passes on
        assert capsys.readouterr().err.count("TransportError: x") == 1
    finally:
        sys.excepthook = before


def test_closing_puts_the_hook_back_and_a_rank_by_itself_asks_nobody() -> None:
    before = sys.excepthook
    peer_failures = PeerFailureHandler(LivenessProbe(0, [], []), LocalComm(), lambda: "")
    assert sys.excepthook is not before
    assert peer_failures.liveness.absent(patience=60.0) == {}
    peer_failures.close()
    assert sys.excepthook is before
