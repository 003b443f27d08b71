"""The last words of a rank: about others only where another rank may be the cause."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Iterator

import pytest

from grace_ds.comm.local import LocalComm
from grace_ds.comm.rollcall import RollCall
from grace_ds.errors import GraceError, PeerLost, TransportError, TransportTimeout, during
from grace_ds.integrations.lookout import Lookout


@pytest.fixture
def alone() -> Iterator[Lookout]:
    """Rank 0 of two; where rank 1 was, nobody listens any more."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        gone = s.getsockname()
    lookout = Lookout(RollCall(0, None, [gone, gone], ["a", "b"]), LocalComm(), lambda: "in training step 3")
    before = signal.getsignal(signal.SIGALRM)
    try:
        yield lookout
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        lookout.close()


def end_by(error: Exception) -> None:
    """As the interpreter does with an error that nobody has caught."""
    try:
        raise error
    except type(error):
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]


def test_a_failed_transport_is_followed_by_who_is_lost(alone: Lookout, capsys: pytest.CaptureFixture[str]) -> None:
    end_by(TransportError("x"))
    last = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert "lost: rank 1 on b (its process has ended); noticed by rank 0 in training step 3" in last
    assert 0 < signal.alarm(0) <= 5  # its exit waits for nobody


@pytest.mark.parametrize("error", [ValueError("mine"), RuntimeError("mine"), GraceError("mine")])
def test_an_error_of_this_ranks_own_is_not_put_down_to_others(
    alone: Lookout, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    end_by(error)
    assert "lost" not in capsys.readouterr().err
    assert signal.alarm(0) == 0


def test_a_late_rank_is_told_from_a_lost_one(alone: Lookout) -> None:
    with pytest.raises(PeerLost, match="in refresh 2, stage graph"):
        try:
            with during("select"), during("graph"):
                raise TransportTimeout("late")
        except TransportTimeout as error:
            alone.check(error, "in refresh 2")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        alone.call.addresses[1] = s.getsockname()
        alone.check(TransportTimeout("late"), "in refresh 2")  # returns: it lives


def test_closing_puts_the_hook_back_and_a_rank_by_itself_asks_nobody() -> None:
    before = sys.excepthook
    lookout = Lookout(RollCall(0, None, [], []), LocalComm(), lambda: "")
    assert sys.excepthook is not before
    assert lookout.call.absent(patience=60.0) == {}
    lookout.close()
    assert sys.excepthook is before
