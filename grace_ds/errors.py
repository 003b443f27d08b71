"""Define the errors that grace_ds raises on purpose; each message names the problem, the value and the cure.

``GraceError`` is the base, so that a launcher can distinguish these errors from bugs.  If an error is raised inside a refresh
on one rank only, the transport raises :class:`PeerFailed` on the other ranks, so that all ranks leave the refresh together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class GraceError(Exception):
    """Base of every error that grace_ds raises on purpose.

    Attributes:
        stage: stage of the refresh in which it was raised; empty if it was raised elsewhere.
    """

    stage = ""


@contextmanager
def during(stage: str) -> Iterator[None]:
    """Record ``stage`` in a :class:`GraceError` that leaves the block; the innermost stage counts."""
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
    """The Dask executor could not finish a graph; the refresh is given up, the transport and the job continue."""


class DamagedState(CheckpointError):
    """A file of grace_ds in a checkpoint is missing, torn or altered; the engine's own part may be intact."""


class TransportError(GraceError):
    """The transport between ranks cannot be used as requested (wrong MPI world, unequal calls on the ranks)."""


class PeerFailed(TransportError):
    """Another rank has failed inside the current refresh; raised on every healthy rank at its next exchange.

    Attributes:
        ranks: the ranks that reported the failure.
    """

    def __init__(self, ranks: list[int]) -> None:
        super().__init__(f"refresh given up: rank(s) {ranks} reported a failure (their own log has the traceback)")
        self.ranks = ranks


class ProbeFailed(GraceError):
    """A probe has failed within a forward or backward that other ranks take part in, and wait in: the job ends."""


class TransportTimeout(TransportError):
    """A peer did not take part within the time limit; the transport must not be used again."""


class PeerLost(GraceError):
    """A rank's process has ended, so the job cannot continue; raised on every surviving rank that notices."""
