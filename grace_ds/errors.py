"""The errors that grace_ds raises on purpose; each says what is wrong, the value and the cure.

``GraceError`` is the base, so that a launcher can tell our messages from bugs.  Anything that is raised inside a refresh
on one rank only is turned into :class:`PeerFailed` on the others by the transport, so that all ranks leave the refresh
together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class GraceError(Exception):
    """Base of every error that grace_ds raises on purpose.

    Attributes:
        stage: of the refresh in which it was raised; empty elsewhere.
    """

    stage = ""


@contextmanager
def during(stage: str) -> Iterator[None]:
    """Notes ``stage`` on an error of ours that leaves the block; the innermost one counts."""
    try:
        yield
    except GraceError as error:
        error.stage = error.stage or stage
        raise


class ConfigError(GraceError):
    """A key, type or combination in the configuration that cannot work; raised before training, on every rank."""


class DataError(GraceError):
    """The dataset, the trusted set or a batch does not have the form that a stage needs."""


class CheckpointError(GraceError):
    """A checkpoint of grace_ds is missing, torn, of another schema, or belongs to another run."""


class ExecutorError(GraceError):
    """The Dask executor could not finish a graph; the refresh is given up, the transport and the job go on."""


class DamagedState(CheckpointError):
    """A file of ours in a checkpoint is missing, torn or altered; the engine's own part may well be whole."""


class TransportError(GraceError):
    """The transport between ranks cannot be used as asked (wrong MPI world, unequal calls on the ranks)."""


class PeerFailed(TransportError):
    """Another rank has failed inside the current refresh; raised on every healthy rank at its next exchange.

    Attributes:
        ranks: the ranks that reported the failure.
    """

    def __init__(self, ranks: list[int]) -> None:
        super().__init__(f"refresh given up: rank(s) {ranks} reported a failure (their own log has the traceback)")
        self.ranks = ranks


class ProbeFailed(GraceError):
    """A probe has failed in the middle of a ZeRO-3 forward or backward, whose gathers the other ranks go on to: the job ends."""


class TransportTimeout(TransportError):
    """A peer did not take part within the time limit; the transport must not be used again."""


class PeerLost(GraceError):
    """A rank's process has ended: the job cannot go on; raised on every survivor that notices."""
