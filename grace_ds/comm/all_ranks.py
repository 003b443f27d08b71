"""Work outside of a refresh that must succeed on every rank or fail on every rank, with the reason known everywhere."""

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
    """Runs ``work``, which may itself use ``comm``, on all ranks; an exception on one becomes an exception on all.

    Raises:
        Exception: this rank's own, or another rank's told by its kind and message.
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
    # However they came here, all ranks are here now.
    told = comm.allgather(np.frombuffer(json.dumps(_words(mine)).encode(), np.uint8))
    if mine is not None:
        raise mine
    said = [(rank, *json.loads(words.tobytes())) for rank, words in enumerate(told)]
    rank, kind, message = next(entry for entry in said if entry[1])
    raise _KINDS.get(kind, GraceError)(f"on rank {rank}: {message if kind in _KINDS else f'{kind}: {message}'}")


def _words(error: Exception | None) -> tuple[str, str]:
    return ("", "") if error is None else (type(error).__name__, str(error))
