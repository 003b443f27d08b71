"""Publish a schedule from rank 0 to every data-parallel rank, and agree on the position where it takes over."""

from __future__ import annotations

import json

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.errors import TransportError
from grace_ds.records import Schedule
from grace_ds.utils.files import digest


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
    raw = comm.broadcast(np.frombuffer(facts, np.uint8), root).tobytes()
    header = json.loads(raw)
    received = Schedule(
        version=header["version"],
        start=header["start"],
        ids=comm.broadcast(schedule.ids if schedule else None, root),
        roles=comm.broadcast(schedule.roles if schedule else None, root),
        weights=comm.broadcast(schedule.weights if schedule else None, root),
        seed=header["seed"],
        meta=header["meta"],
        run=header["run"],
    )
    mine = digest(raw + received.digest().encode())  # the schedule's own leaves its meta and its run out
    digests = [part.tobytes().decode() for part in comm.allgather(np.frombuffer(mine.encode(), np.uint8))]
    if len(set(digests)) != 1:
        raise TransportError(f"schedule {received.version} differs between ranks after the broadcast: {digests}")
    return received


def activation(comm: Comm, issued: int, batch: int) -> int:
    """Return the position of the first global batch of which no rank's loader has samples yet.  Collective.

    Args:
        issued: samples (over all ranks) that this rank's sampler has handed out, prefetch included.
        batch: samples of one optimizer step over all ranks.
    """
    latest = int(comm.allreduce(np.array([issued], np.int64), "max")[0])
    return -(-latest // batch) * batch
