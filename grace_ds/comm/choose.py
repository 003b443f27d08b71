"""Choose the transport of a job: all ranks decide it together, and the choice is logged with its reason.

MPI is used only if its world equals torch's, rank for rank.  The launcher's environment is read before mpi4py is
imported, because initialising MPI in a process that no MPI launcher has started gives a world of one at best and hangs at
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

# Takes the torch ranks of this rank's data-parallel group, ascending, and the limit of every wait in seconds.
Transport = Callable[[Sequence[int], float], Comm]
for _name in ("mpi", "torch", "local"):
    registry.transports.register(_name)(None)  # the built-in ones are chosen by the rules below
UNKNOWN = -1
_CURE = "start the job with mpirun (or deepspeed --launcher openmpi), or set comm: auto"
# (rank, size) variables of the launchers.  A PMI or PMIx rank without a size comes from a resource manager's job step.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("PMIX_RANK", "SLURM_STEP_NUM_TASKS"),
    ("PMI_RANK", "SLURM_STEP_NUM_TASKS"),
    ("PMIX_RANK", ""),
    ("PMI_RANK", ""),
)


class Facts(NamedTuple):
    """What one rank knows before MPI is imported."""

    kind: str
    rank: int
    group: tuple[int, ...]  # torch ranks of its data-parallel group
    mpi_rank: int  # from the launcher's environment; UNKNOWN without one
    mpi_size: int  # 1 without a launcher, UNKNOWN if the launcher does not give it
    launched: bool  # by an MPI launcher
    installed: bool  # mpi4py can be imported
    token: int  # random; the one of rank 0 identifies the job in the handshake


def launcher_world(env: Mapping[str, str]) -> tuple[int, int] | None:
    """Return the (rank, size) that an MPI launcher has put into ``env``, or None without such a launcher.

    The size is UNKNOWN if the launcher gives none.
    """
    for rank, size in _LAUNCHERS:
        values = [env.get(key, "") for key in (rank, size) if key]
        if all(value.isdigit() for value in values):
            return int(values[0]), int(values[1]) if size else UNKNOWN
    return None


def choose(kind: str, *, dp_group: Any = None, members: Sequence[int] | None = None, timeout: float) -> Comm:
    """Return the transport for ``comm: kind``.  Collective: every rank of torch's world calls it for its own group.

    Args:
        kind: auto | mpi | torch | local | the name of a registered transport; the same on all ranks.
        dp_group: torch ProcessGroup of this rank's data-parallel peers, ranks ascending; None: torch's whole world.
        members: those peers as global ranks, instead of ``dp_group``.
        timeout: seconds, limit of every wait on the transport.

    Returns:
        A transport whose rank and size are those of the data-parallel group.

    Raises:
        ConfigError: ``kind`` is not known.
        TransportError: the transport cannot be set up as requested; raised on every rank.
    """
    registered: Transport | None = registry.transports.get(kind) if kind != "auto" else None
    if not _torch_ready():
        return _logged(registered((0,), timeout), f"comm: {kind}") if registered is not None else _single_process(kind, timeout)
    all_facts = share(_facts(kind, dp_group, members))
    if len({facts.kind for facts in all_facts}) > 1:
        raise TransportError(f"comm differs between the ranks: {[facts.kind for facts in all_facts]}; use one configuration")
    me = all_facts[_torch_rank()]
    if registered is not None:
        return _logged(_make_registered(registered, me, timeout), f"comm: {kind}")
    single = all(len(facts.group) == 1 for facts in all_facts)
    if kind == "local" and not single:
        raise TransportError(f"comm: local is for one data-parallel rank, this job has {len(me.group)}; set comm: auto")
    if kind == "local" or (kind == "auto" and single):
        return _logged(LocalComm(timeout), "one data-parallel rank")
    why = f"comm: {kind}"
    if kind in ("auto", "mpi"):
        comm, reason = _try_mpi(all_facts, me, timeout)
        if comm is not None:
            return _logged(comm, "MPI's world is torch's, rank for rank")
        if kind == "mpi":
            raise TransportError(f"comm: mpi cannot be used: {reason}")
        why = f"not MPI: {reason}"
    from grace_ds.comm.torch_dist import TorchComm

    return _logged(TorchComm(sorted({facts.group for facts in all_facts}), timeout), why)


def _make_registered(transport: Transport, me: Facts, timeout: float) -> Comm:
    """Make a registered transport, on all ranks or on none.

    Raises:
        TransportError: it cannot be made, or it numbers the ranks differently; raised on every rank.
    """
    place = me.group.index(me.rank), len(me.group)

    def misplaced(comm: Comm) -> str:
        if (comm.rank, comm.size) == place:
            return ""
        return f"rank {me.rank} is {comm.rank} of {comm.size} in it, and {place[0]} of {place[1]} in the job"

    comm, reason = _made_on_all(lambda: transport(me.group, timeout), misplaced, f"on rank {me.rank}")
    if comm is None:
        raise TransportError(f"comm: {me.kind} cannot be used: {reason}; repair it, or set comm: auto")
    return comm


def _single_process(kind: str, timeout: float) -> Comm:
    """Make the transport of a job without torch.distributed, which must be one process.

    Raises:
        TransportError: the environment or ``kind`` asks for more processes.
    """
    launched = launcher_world(os.environ)
    sizes = [int(os.environ.get("WORLD_SIZE", "1") or 1), launched[1] if launched else 1]
    if max(sizes) > 1 or kind in ("mpi", "torch"):
        raise TransportError(
            f"comm: {kind} with {max(sizes)} process(es) needs torch.distributed: call deepspeed.init_distributed() "
            "before grace_ds, or run one process with comm: auto"
        )
    return _logged(LocalComm(timeout), "torch.distributed is not initialised")


def _facts(kind: str, dp_group: Any, members: Sequence[int] | None) -> Facts:
    import torch.distributed as dist

    launched = launcher_world(os.environ)
    rank, size = launched or (UNKNOWN, 1)
    group = tuple(members or dist.get_process_group_ranks(dp_group if dp_group is not None else dist.group.WORLD))
    installed = importlib.util.find_spec("mpi4py") is not None
    token = int.from_bytes(os.urandom(7), "little")
    return Facts(kind, dist.get_rank(), group, rank, size, launched is not None, installed, token)


def _why_no_mpi(all_facts: list[Facts]) -> str:
    """Return why MPI must not even be initialised; empty if it may.

    The answer is the same on all ranks, because it follows from shared facts only.
    """
    size = len(all_facts)
    if not all(facts.installed for facts in all_facts):
        lacking = [facts.rank for facts in all_facts if not facts.installed]
        return f"mpi4py is not installed on rank(s) {lacking[:8]}: pip install grace_ds[mpi], or set comm: auto"
    idle = [facts.rank for facts in all_facts if not facts.launched]
    if idle:
        return f"MPI's world has 1 rank, torch's has {size}: no MPI launcher has started rank(s) {str(idle[:8])[1:-1]}; {_CURE}"
    sizes = {facts.mpi_size for facts in all_facts} - {UNKNOWN, size}
    if sizes:
        return f"MPI's world has {sorted(sizes)[0]} rank(s), torch's has {size}; {_CURE}"
    if [facts.mpi_rank for facts in all_facts] != list(range(size)):
        return f"torch's ranks 0..{size - 1} have the MPI ranks {[facts.mpi_rank for facts in all_facts][:16]}; {_CURE}"
    return ""


def _try_mpi(all_facts: list[Facts], me: Facts, timeout: float) -> tuple[Comm | None, str]:
    """Return the MPI transport on all ranks, or None and the reason on all ranks."""
    reason = _why_no_mpi(all_facts)
    if reason:
        return None, reason
    from grace_ds.comm import mpi

    def start() -> str:
        size = mpi.world()[1]
        return "" if size == len(all_facts) else f"MPI's world has {size} rank(s), torch's has {len(all_facts)}; {_CURE}"

    reason = _problem_on_any(start, f"MPI does not start on rank {me.rank}") or _problem_on_any(
        lambda: mpi.Handshake(timeout).check(me.rank, all_facts[0].token), f"no handshake over MPI on rank {me.rank}"
    )
    if reason:
        return None, reason
    return _made_on_all(lambda: mpi.MpiComm(me.group, timeout), lambda comm: "", f"no communicator on rank {me.rank}")


def _made_on_all(make: Callable[[], Comm], check: Callable[[Comm], str], failure: str) -> tuple[Comm | None, str]:
    """Make a transport on all ranks or on none.  Collective over torch's world.

    Args:
        make: returns the transport; may raise.
        check: returns what is wrong with it; empty if nothing is.
        failure: what an exception means, for the reason.

    Returns:
        The transport and an empty reason; or None and the same reason on all ranks.
    """
    comm: Comm | None = None

    def work() -> str:
        nonlocal comm
        comm = make()
        return check(comm)

    reason = _problem_on_any(work, failure)
    if reason and comm is not None:
        comm.close()  # only now: on all ranks that have one
    return (None, reason) if reason else (comm, "")


def _problem_on_any(work: Callable[[], str], failure: str) -> str:
    """Run ``work`` on all ranks; return the first problem that it returns or raises on any rank, else "".  Collective."""
    try:
        problem = work()
    except Exception as error:  # code of the user, or of a broken installation of MPI, may raise anything
        problem = f"{failure}: {type(error).__name__}: {error}"
    return next((found for found in share(problem) if found), "")


def _logged(comm: Comm, why: str) -> Comm:
    """Log the chosen transport on rank 0 and return it."""
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
    """Return the value of every rank in torch's rank order, whatever the backend of the job.  Collective.

    Without torch.distributed there is one rank.
    """
    import torch.distributed as dist

    if not _torch_ready():
        return [mine]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, mine)
    return values
