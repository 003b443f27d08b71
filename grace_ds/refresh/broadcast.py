"""Publish a schedule from rank 0 to every data-parallel rank, and agree on the position where it takes over."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.errors import TransportError
from grace_ds.records import Schedule


def broadcast_schedule(comm: Comm, schedule: Schedule | None, root: int = 0) -> Schedule:
    """Return ``root``'s schedule on every rank, checked by its digest.  Collective.

    Args:
        schedule: the one to publish, on ``root``; ignored elsewhere.

    Raises:
        TransportError: some rank received another schedule than was sent; raised on every rank.
    """
    facts = b""
    if comm.rank == root:
        assert schedule is not None
        facts = json.dumps(
            {
                "version": schedule.version,
                "start": schedule.start,
                "seed": schedule.seed,
                "meta": dict(schedule.meta),
                "run": schedule.run,
            }
        ).encode()
    raw = comm.broadcast(np.frombuffer(facts, np.uint8), root)
    ids, roles, weights = (
        comm.broadcast(getattr(schedule, name) if schedule else None, root) for name in ("ids", "roles", "weights")
    )
    hasher = hashlib.blake2b(digest_size=16)  # of all that was received, before any of it is read
    for part in (raw, ids, roles, weights):
        hasher.update(f"{part.dtype.str} {part.shape}".encode())
        hasher.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    digests = [part.tobytes().hex() for part in comm.allgather(np.frombuffer(hasher.digest(), np.uint8))]
    if len(set(digests)) != 1:
        raise TransportError(f"a schedule differs between ranks after the broadcast: {digests}")
    header = json.loads(raw.tobytes())
    return Schedule(header["version"], header["start"], ids, roles, weights, header["seed"], header["meta"], header["run"])


def activation(comm: Comm, issued: int, batch: int) -> int:
    """Return the position of the first global batch of which no rank's loader has samples yet.  Collective.

    Args:
        issued: samples (over all ranks) that this rank's sampler has handed out, prefetch included.
        batch: samples of one optimizer step over all ranks.
    """
    latest = int(comm.allreduce(np.array([issued], np.int64), "max")[0])
    return -(-latest // batch) * batch
