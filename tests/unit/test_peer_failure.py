"""The last words of a rank: about others only where another rank may be the cause."""

from __future__ import annotations

import gc
import logging
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from torch.distributed.rendezvous import rendezvous

from grace_ds.comm import liveness
from grace_ds.comm import peer_failure as peer_failure_module
from grace_ds.comm.liveness import LivenessProbe
from grace_ds.comm.local import LocalComm
from grace_ds.comm.peer_failure import PeerFailureHandler
from grace_ds.errors import GraceError, PeerLost, ProbeFailed, TransportError, TransportTimeout, during
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
    monkeypatch.setattr(liveness, "_TRY_SECONDS", 0.4)
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
    assert_exit_waits_for_nobody(alone)


def assert_exit_waits_for_nobody(peer_failures: PeerFailureHandler) -> None:
    assert 0 < signal.alarm(0) <= 5
    with pytest.raises(TransportError, match="a rank is lost"):
        peer_failures.comm.agree()


def test_an_error_out_of_the_jobs_own_collective_is_followed_by_who_is_lost(
    alone: PeerFailureHandler, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        next(rendezvous("nothing://"))
    except RuntimeError:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    assert "lost: rank 1 on b" in capsys.readouterr().err
    assert_exit_waits_for_nobody(alone)


def test_a_probe_that_others_wait_in_ends_this_rank_at_once_and_blames_nobody(
    alone: PeerFailureHandler, capsys: pytest.CaptureFixture[str]
) -> None:
    end_by(ProbeFailed("x"))
    assert "lost" not in capsys.readouterr().err
    assert_exit_waits_for_nobody(alone)


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
    end_by(PeerLost("x"))
    assert_exit_waits_for_nobody(alone)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        alone.liveness.addresses[1] = s.getsockname()
        alone.check(TransportTimeout("late"), "in refresh 2")  # returns: it lives


@pytest.fixture
def leaving() -> Iterator[tuple[str, int]]:
    """Where a process is about to end: it answers once, and never again."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()

        def answer() -> None:
            s.accept()[0].close()
            s.close()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield s.getsockname()
        thread.join(10)


def test_a_broken_connection_is_followed_up_until_the_process_behind_it_has_ended(
    alone: PeerFailureHandler, leaving: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_failure_module, "_PATIENCE", 20.0)
    alone.liveness.addresses[1] = leaving
    with pytest.raises(PeerLost, match=r"rank 1 on b \(its process has ended\)"):
        alone.check(TransportError("broken"), "in refresh 2")


def test_where_time_is_up_already_nobody_is_asked_again(alone: PeerFailureHandler, leaving: tuple[str, int]) -> None:
    alone.liveness.addresses[1] = leaving
    alone.check(TransportTimeout("late"), "in refresh 2")  # returns: it has answered


def test_one_refusal_does_not_say_that_a_process_has_ended(alone: PeerFailureHandler, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        alone.liveness.addresses[1] = s.getsockname()
        pauses: list[float] = []

        def back(seconds: float) -> None:  # it listens again by the end of the pause
            pauses.append(seconds)
            s.listen()

        monkeypatch.setattr(liveness, "time", SimpleNamespace(sleep=back, monotonic=time.monotonic))
        assert alone.liveness.absent() == {} and len(pauses) == 1


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


def test_hooks_that_others_have_put_between_ours_do_not_have_it_said_twice(
    alone: PeerFailureHandler, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sys.excepthook
    sys.excepthook = lambda *args: before(*args)
    second = PeerFailureHandler(
        LivenessProbe(0, alone.liveness.addresses, alone.liveness.names), LocalComm(), lambda: "in training step 3"
    )
    try:
        end_by(TransportError("x"))
        assert capsys.readouterr().err.count("lost: rank 1 on b") == 1
    finally:
        second.close()
        sys.excepthook = before


def test_closing_puts_the_hook_back_and_a_rank_by_itself_asks_nobody() -> None:
    before = sys.excepthook
    peer_failures = PeerFailureHandler(LivenessProbe(0, [], []), LocalComm(), lambda: "")
    assert sys.excepthook is not before
    assert peer_failures.liveness.absent(patience=60.0) == {}
    peer_failures.close()
    assert sys.excepthook is before
