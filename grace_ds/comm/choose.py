"""Which transport a job gets: decided by all ranks together, never by one alone, and logged with the reason.

MPI is taken only where its world is torch's, rank for rank.  The launcher's environment is looked at before mpi4py is
imported, because initialising MPI in a process that no MPI launcher started gives a world of one at best and hangs at
worst.  After every step the ranks share their findings, so that all of them take the same branch.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from grace_ds import registry
from grace_ds.comm.base import Comm
from grace_ds.comm.local import LocalComm
from grace_ds.errors import TransportError

logger = logging.getLogger("grace_ds")

Transport = Callable[
    [Sequence[int], float], Comm
]  # of the torch ranks of this rank's data-parallel group, ascending, and a limit
for _name in ("mpi", "torch", "local"):
    registry.transports.register(_name)(None)  # what is built in is chosen by the rules below
UNKNOWN = -1
_CURE = "start the job with mpirun (or deepspeed --launcher openmpi), or set comm: auto"
# (rank, size) of the launchers' environments.  A PMI or PMIx rank without a size comes from a resource manager's step.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("PMIX_RANK", "SLURM_STEP_NUM_TASKS"),
    ("PMI_RANK", "SLURM_STEP_NUM_TASKS"),
    ("PMIX_RANK", ""),
    ("PMI_RANK", ""),
)


class Facts(NamedTuple):
    """What one rank knows before MPI is touched."""

    kind: str
    rank: int
    group: tuple[int, ...]  # torch ranks of its data-parallel group
    mpi_rank: int  # from the launcher's environment; UNKNOWN without one
    mpi_size: int  # 1 without a launcher, UNKNOWN where it does not tell
    launched: bool
    installed: bool  # mpi4py can be imported
    token: int  # rank 0's names the job in the handshake


def launcher_world(env: Mapping[str, str]) -> tuple[int, int] | None:
    """(rank, size) that an MPI launcher has put into ``env``; size UNKNOWN where it says none; None without one."""
    for rank, size in _LAUNCHERS:
        told = [env.get(key, "") for key in (rank, size) if key]
        if all(word.isdigit() for word in told):
            return int(told[0]), int(told[1]) if size else UNKNOWN
    return None


def choose(kind: str, *, dp_group: Any = None, members: Sequence[int] | None = None, timeout: float) -> Comm:
    """The transport for ``comm: kind``.  Called by every rank of torch's world, with its own data-parallel group.

    Args:
        kind: auto | mpi | torch | local | a registered one, the same on all ranks.
        dp_group: torch ProcessGroup of this rank's data-parallel peers, ranks ascending; None: torch's whole world.
        members: those peers as global ranks, in the place of ``dp_group``.
        timeout: seconds, limit of every wait on the transport.

    Returns:
        A transport whose rank and size are those of the data-parallel group.

    Raises:
        ConfigError: ``kind`` is not known.
        TransportError: what was asked for cannot be had; on every rank alike.
    """
    added: Transport | None = registry.transports.get(kind) if kind != "auto" else None
    if not _torch_ready():
        return _told(added((0,), timeout), f"comm: {kind}") if added is not None else _alone(kind, timeout)
    everyone = share(_facts(kind, dp_group, members))
    if len({f.kind for f in everyone}) > 1:
        raise TransportError(f"comm differs between the ranks: {[f.kind for f in everyone]}; use one configuration")
    me = everyone[_torch_rank()]
    if added is not None:
        return _told(_made(added, me, timeout), f"comm: {kind}")
    single = all(len(f.group) == 1 for f in everyone)
    if kind == "local" and not single:
        raise TransportError(f"comm: local is for one data-parallel rank, this job has {len(me.group)}; set comm: auto")
    if kind == "local" or (kind == "auto" and single):
        return _told(LocalComm(timeout), "one data-parallel rank")
    why = f"comm: {kind}"
    if kind in ("auto", "mpi"):
        comm, reason = _try_mpi(everyone, me, timeout)
        if comm is not None:
            return _told(comm, "MPI's world is torch's, rank for rank")
        if kind == "mpi":
            raise TransportError(f"comm: mpi cannot be used: {reason}")
        why = f"not MPI: {reason}"
    from grace_ds.comm.torch_dist import TorchComm

    return _told(TorchComm(sorted({f.group for f in everyone}), timeout), why)


def _made(transport: Transport, me: Facts, timeout: float) -> Comm:
    """A registered transport, on all ranks or on none.

    Raises:
        TransportError: it cannot be made, or counts the ranks in another way; on every rank alike.
    """
    comm: Comm | None = None
    found, place = "", (me.group.index(me.rank), len(me.group))
    try:
        comm = transport(me.group, timeout)
        if (comm.rank, comm.size) != place:
            found = f"rank {me.rank} is {comm.rank} of {comm.size} in it, and {place[0]} of {place[1]} in the job"
    except Exception as error:  # code of the user's own
        found = f"on rank {me.rank}: {type(error).__name__}: {error}"
    reason = _first(found)
    if reason or comm is None:
        if comm is not None:
            comm.close()
        raise TransportError(f"comm: {me.kind} cannot be used: {reason}; repair it, or set comm: auto")
    return comm


def _alone(kind: str, timeout: float) -> Comm:
    """Without torch.distributed there is one process, unless the environment says that there should be more."""
    launched = launcher_world(os.environ)
    sizes = [int(os.environ.get("WORLD_SIZE", "1") or 1), launched[1] if launched else 1]
    if max(sizes) > 1 or kind in ("mpi", "torch"):
        raise TransportError(
            f"comm: {kind} with {max(sizes)} process(es) needs torch.distributed: call deepspeed.init_distributed() "
            "before grace_ds, or run one process with comm: auto"
        )
    return _told(LocalComm(timeout), "torch.distributed is not initialised")


def _facts(kind: str, dp_group: Any, members: Sequence[int] | None) -> Facts:
    import torch.distributed as dist

    launched = launcher_world(os.environ)
    rank, size = launched or (UNKNOWN, 1)
    group = tuple(members or dist.get_process_group_ranks(dp_group if dp_group is not None else dist.group.WORLD))
    installed = importlib.util.find_spec("mpi4py") is not None
    token = int.from_bytes(os.urandom(7), "little")
    return Facts(kind, dist.get_rank(), group, rank, size, launched is not None, installed, token)


def _no_launch(everyone: list[Facts]) -> str:
    """Why MPI must not even be initialised; empty where it may.  The same on all ranks: of shared facts only."""
    size = len(everyone)
    if not all(f.installed for f in everyone):
        lacking = [f.rank for f in everyone if not f.installed]
        return f"mpi4py is not installed on rank(s) {lacking[:8]}: pip install grace_ds[mpi], or set comm: auto"
    idle = [f.rank for f in everyone if not f.launched]
    if idle:
        return f"MPI's world has 1 rank, torch's has {size}: no MPI launcher has started rank(s) {str(idle[:8])[1:-1]}; {_CURE}"
    sizes = {f.mpi_size for f in everyone} - {UNKNOWN, size}
    if sizes:
        return f"MPI's world has {sorted(sizes)[0]} rank(s), torch's has {size}; {_CURE}"
    if [f.mpi_rank for f in everyone] != list(range(size)):
        return f"torch's ranks 0..{size - 1} have the MPI ranks {[f.mpi_rank for f in everyone][:16]}; {_CURE}"
    return ""


def _try_mpi(everyone: list[Facts], me: Facts, timeout: float) -> tuple[Comm | None, str]:
    """The MPI transport on all ranks, or None and the reason on all ranks."""
    reason = _no_launch(everyone)
    if reason:
        return None, reason
    from grace_ds.comm import mpi

    comm: Comm | None = None
    found = ""
    try:
        size = mpi.world()[1]
        if size != len(everyone):
            found = f"MPI's world has {size} rank(s), torch's has {len(everyone)}; {_CURE}"
    except Exception as error:  # a broken MPI installation raises anything from ImportError to RuntimeError
        found = f"MPI does not start on rank {me.rank}: {type(error).__name__}: {error}"
    reason = _first(found)
    if not reason:
        try:
            found = mpi.Handshake(timeout).check(me.rank, everyone[0].token)
        except TransportError as error:
            found = str(error)
        reason = _first(found)
    if not reason:
        try:
            comm = mpi.MpiComm(me.group, timeout)
        except Exception as error:
            found = f"no communicator on rank {me.rank}: {error}"
        reason = _first(found)
        if reason and comm is not None:
            comm.close()
    return (None, reason) if reason else (comm, "")


def _told(comm: Comm, why: str) -> Comm:
    if not _torch_ready() or _torch_rank() == 0:
        logger.info("transport: %s, %d data-parallel rank(s) (%s)", comm.name, comm.size, why)
    return comm


def _torch_ready() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def _torch_rank() -> int:
    import torch.distributed as dist

    return dist.get_rank()


def share(mine: Any) -> list[Any]:
    """Everybody's value in torch's rank order, whatever the backend of the job."""
    import torch.distributed as dist

    got: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(got, mine)
    return got


def _first(found: str) -> str:
    """The findings of all ranks, joined into one answer: empty only where every rank found nothing."""
    return next((f for f in share(found) if f), "")
