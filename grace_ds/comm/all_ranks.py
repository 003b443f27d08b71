"""Run work outside of a refresh so that it succeeds on every rank or fails on every rank, with the same reason everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.errors import CheckpointError, ConfigError, DamagedState, DataError, GraceError, PeerFailed, TransportError

T = TypeVar("T")

_KINDS = {kind.__name__: kind for kind in (CheckpointError, DamagedState, ConfigError, DataError)}


def run_on_all_ranks(comm: Comm, work: Callable[[], T]) -> T:
    """Run ``work`` on all ranks and return its result; an exception on one rank becomes an exception on all.

    Args:
        comm: the transport; collective over its ranks.
        work: may itself use ``comm``.

    Raises:
        Exception: this rank's own exception, or else the kind and message of another rank's.
    """
    mine: Exception | None = None
    try:
        result = work()
        comm.agree()
        return result
    except PeerFailed:
        pass
    except TransportError:
        raise
    except Exception as error:
        comm.abort()
        mine = error
    # All ranks reach this point, whichever exception they came by.
    encoded = comm.allgather(np.frombuffer(json.dumps(_describe(mine)).encode(), np.uint8))
    if mine is not None:
        raise mine
    errors = [(rank, *json.loads(text.tobytes())) for rank, text in enumerate(encoded)]
    rank, kind, message = next(entry for entry in errors if entry[1])
    raise _KINDS.get(kind, GraceError)(f"on rank {rank}: {message if kind in _KINDS else f'{kind}: {message}'}")


def _describe(error: Exception | None) -> tuple[str, str]:
    """Return the error's kind and message; both empty without an error."""
    return ("", "") if error is None else (type(error).__name__, str(error))
