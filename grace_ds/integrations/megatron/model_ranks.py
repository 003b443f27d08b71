"""Talk between the ranks that hold one model together: one of them leads, and sends commands.

Only ranks with the dataset take part in a refresh.  One of each model's leads: before anything that all of its ranks must do
together it sends a command, by a small broadcast.  A rank without the dataset receives commands after every optimizer step, up
to the one that begins the next step.  A rank that has the dataset and does not lead makes the same refresh as the leader,
receives each command, and so notices if the two differ.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.comm.choose import choose, share
from grace_ds.comm.time_limits import job_limit, within_job_limit
from grace_ds.config.schema import GraceConfig
from grace_ds.errors import ConfigError, TransportError
from grace_ds.records import Array

Command = dict[str, Any]


class ModelRanks:
    """The ranks that hold one model together, as one of them sees it.  Peers of a sharded collector.

    Args:
        comm: between them.
        leader: rank of ``comm`` that leads.
        holds_data: whether this rank has the dataset, and so takes part in refreshes.

    Attributes:
        bytes: given to sums and broadcasts so far, on this rank.
    """

    def __init__(self, comm: Comm, leader: int, holds_data: bool) -> None:
        self.comm, self.leader, self.holds_data = comm, leader, holds_data
        self.size = comm.size
        self.bytes = 0

    @property
    def leads(self) -> bool:
        """Whether this rank leads."""
        return self.comm.rank == self.leader

    def allreduce(self, array: Array) -> Array:
        """Return the sum over these ranks, the same bits on all of them.  Collective."""
        self.bytes += array.nbytes
        return self.comm.allreduce(array)

    def send(self, what: str, **details: Any) -> None:
        """Send the command for what comes next; on every rank with the dataset, at the same point of its refresh.  Collective.

        Raises:
            TransportError: a rank with the dataset is at another point than the leader.
        """
        command = {"what": what, **details}
        received = self._broadcast_command(command)
        if received != command:
            raise TransportError(
                f"the leader of this model says {received}, and this rank, which has the dataset too, comes to {command}: "
                "restart the job; if it happens again, set recipe: content"
            )

    def receive(self) -> Command:
        """Return the next command of the leader; on a rank without the dataset.  Collective."""
        return self._broadcast_command(None)

    def broadcast(self, array: Array | None) -> Array:
        """Return the leader's array.  Collective."""
        found = self.comm.broadcast(array if self.leads else None, self.leader)
        self.bytes += found.nbytes
        return found

    def _broadcast_command(self, command: Command | None) -> Command:
        encoded = np.frombuffer(json.dumps(command).encode(), np.uint8) if self.leads else None
        received: Command = json.loads(self.broadcast(encoded).tobytes())
        return received


def model_ranks(config: GraceConfig, replica: int, holds_data: bool) -> ModelRanks:
    """Return the ranks that hold one model together with this one.  Collective over all ranks.

    Args:
        replica: this rank's data-parallel rank, context-parallel ranks counted as one.
        holds_data: whether this rank has the dataset.

    Raises:
        ConfigError: no rank of some model has it; on every rank.
    """
    places = share((replica, holds_data))
    for number in sorted({place for place, _ in places}):
        if (number, True) not in places:
            raise ConfigError(
                f"no rank of the model with data-parallel rank {number} has a training dataset, and recipe: {config.recipe} "
                "runs samples through each model: build the dataset on tensor-parallel rank 0 of its first stage"
            )
    members = [rank for rank, (place, _) in enumerate(places) if place == replica]
    leader = next(i for i, rank in enumerate(members) if places[rank][1])
    # A rank without the dataset waits for the leader throughout a refresh, each stage of which may take the limit.
    limit, most = within_job_limit(config.refresh.timeout_seconds), job_limit()
    timeout = limit if most is None else max(limit, most.total_seconds() / 2)
    return ModelRanks(choose(config.comm, members=members, timeout=timeout), leader, holds_data)
