"""The transports between real processes: gloo with 1 to 4 ranks, MPI under mpirun, and the choice between them."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Any

import numpy as np
import pytest

from grace_ds.comm.base import Comm
from grace_ds.comm.choose import choose
from grace_ds.errors import ConfigError, TransportError, TransportTimeout
from tests.multirank.conformance import check_all, works
from tests.multirank.harness import RanksFailed, World, run_ranks, run_ranks_under_mpi

LIMIT = 1.0  # seconds, of the transports that are made to time out


def conform_torch(world: World) -> dict[str, bytes]:
    comm = choose("torch", timeout=10.0)
    assert (comm.name, comm.rank, comm.size) == ("torch", world.rank, world.size)
    out = check_all(comm)
    comm.close()
    comm.close()
    with pytest.raises(TransportError, match="close"):
        comm.agree()
    again = choose("torch", timeout=10.0)  # a second group over the same ranks
    works(again)
    again.close()
    return out


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_torch_conforms(size: int) -> None:
    results = run_ranks(conform_torch, size, timeout=40)
    assert all(r == results[0] for r in results)


def wait_in_vain(comm: Comm) -> None:
    """The last rank stays away: the others are told within the limit, and never wait again."""
    works(comm)
    start = time.monotonic()
    if comm.rank == comm.size - 1:
        time.sleep(1.4 * LIMIT)
        return
    with pytest.raises(
        TransportTimeout, match=rf"allgather over {comm.name}.* {LIMIT:g} s on rank {comm.rank} .*refresh.timeout"
    ):
        comm.allgather(np.zeros(3))
    assert LIMIT * 0.9 < time.monotonic() - start < 2 * LIMIT
    start = time.monotonic()
    for call in (comm.agree, comm.abort, lambda: comm.allreduce(np.zeros(1))):
        with pytest.raises(TransportError, match="transport retired after.*allgather") as caught:
            call()
        assert not isinstance(caught.value, TransportTimeout)
    assert time.monotonic() - start < 0.1
    comm.close()


def never_comes(world: World) -> float:
    import torch
    import torch.distributed as dist

    wait_in_vain(choose("torch", timeout=LIMIT))
    job = torch.ones(1)
    dist.all_reduce(job)  # the job's own collectives are not touched
    assert job.item() == world.size
    return time.monotonic()


def test_torch_times_out_and_retires() -> None:
    run_ranks(never_comes, 3, timeout=20)


def dies(world: World) -> float:
    comm = choose("torch", timeout=5.0)
    works(comm)
    if world.rank == 1:
        os._exit(3)
    start = time.monotonic()
    with pytest.raises(TransportError):
        comm.agree()
    with pytest.raises(TransportError, match="retired"):
        comm.agree()
    return time.monotonic() - start


def test_torch_survives_a_dead_rank() -> None:
    assert run_ranks(dies, 2, timeout=20, may_fail=[1])[0] < 5.5


def choices(world: World) -> None:
    """All that can be decided without MPI, on two ranks that torch alone has started."""
    import torch.distributed as dist

    both = "1 rank.*torch's has 2.*comm: auto"
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("grace_ds").addHandler(handler)
    logging.getLogger("grace_ds").setLevel(logging.INFO)

    auto = choose("auto", timeout=5.0)
    assert auto.name == "torch"
    assert [("no MPI launcher" in s) for s in said] == ([True] if world.rank == 0 else [])
    with pytest.raises(TransportError, match=both):
        choose("mpi", timeout=5.0)
    with pytest.raises(TransportError, match="this job has 2"):
        choose("local", timeout=5.0)
    with pytest.raises(TransportError, match=r"\['auto', 'torch'\]"):
        choose(("auto", "torch")[world.rank], timeout=5.0)
    with pytest.raises(ConfigError, match="comm = 'nccl'; known: mpi, torch, local"):
        choose("nccl", timeout=5.0)

    alone = [dist.new_group([r]) for r in range(2)][world.rank]
    single = choose("auto", dp_group=alone, timeout=5.0)
    assert (single.name, single.size) == ("local", 1)

    # A launcher's environment on one rank only, of another size, in another order: no MPI, on any rank.
    for env, why in (
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"} if world.rank == 0 else {}, "started rank.s. 1;"),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, "world has 1 rank.*torch's has 2"),
        ({"PMI_RANK": str(1 - world.rank), "PMI_SIZE": "2"}, r"MPI ranks \[1, 0\]"),
        ({"PMIX_RANK": "0"}, r"MPI ranks \[0, 0\]"),
    ):
        os.environ.update(env)
        with pytest.raises(TransportError, match=why):
            choose("mpi", timeout=5.0)
        assert choose("auto", timeout=5.0).name == "torch"
        for key in env:
            del os.environ[key]
    assert "mpi4py.MPI" not in sys.modules
    works(auto)


def test_choices_without_mpi() -> None:
    run_ranks(choices, 2, timeout=30)


def grid(world: World) -> tuple[int, list[int]]:
    """Two data-parallel groups, {0, 2} and {1, 3}, that work at their own pace."""
    import torch.distributed as dist

    groups = [dist.new_group(g) for g in ([0, 2], [1, 3])]
    comm = choose("auto", dp_group=groups[world.rank % 2], timeout=5.0)
    for _ in range(1 + 3 * (world.rank % 2)):
        got = comm.allgather(np.array([world.rank]))
    return comm.rank, [int(x[0]) for x in got]


def test_data_parallel_groups_keep_to_themselves() -> None:
    assert run_ranks(grid, 4, timeout=30) == [(0, [0, 2]), (0, [1, 3]), (1, [0, 2]), (1, [1, 3])]


def check_reversed(world: World) -> None:
    """Torch's ranks are not MPI's."""
    torch_world = World(world.size - 1 - world.rank, world.size, world.rendezvous + "-reversed")
    torch_world.join()
    assert choose("auto", timeout=5.0).name == "torch"
    with pytest.raises(TransportError, match=r"MPI ranks \[1, 0\]"):
        choose("mpi", timeout=5.0)
    from grace_ds.comm.mpi import Handshake

    # What the environment cannot show, the handshake does.
    assert "torch ranks [1, 0]" in Handshake(5.0).check(torch_world.rank, token=1)
    assert Handshake(5.0).check(world.rank, token=1) == ""
    assert Handshake(5.0).check(world.rank, token=world.rank) != ""


def conform_mpi(world: World) -> dict[str, bytes]:
    """Under mpirun: with torch's ranks in MPI's order the transport is MPI, in another order it is not."""
    import torch.distributed as dist

    check_reversed(world)
    dist.destroy_process_group()
    world.join()
    comm = choose("auto", timeout=10.0)
    assert (comm.name, comm.rank, comm.size) == ("mpi", world.rank, world.size)
    out = check_all(comm)
    comm.close()
    groups = [dist.new_group([r]) for r in range(world.size)]
    alone = choose("mpi", dp_group=groups[world.rank], timeout=10.0)
    assert (alone.name, alone.rank, alone.size) == ("mpi", 0, 1)
    works(alone)
    wait_in_vain(choose("mpi", timeout=LIMIT))
    return out


def test_mpi_conforms_refuses_and_times_out() -> None:
    results = run_ranks_under_mpi(conform_mpi, 2, timeout=40)
    assert results[0] == results[1]


def stuck_at_exit(world: World) -> None:
    """Rank 0 gives up on rank 1, which never leaves: MPI_Finalize must not hold rank 0, nor mpirun the job."""
    from grace_ds.comm import mpi

    mpi._EXIT_LEAST = LIMIT
    world.join()
    comm = choose("mpi", timeout=LIMIT)
    if world.rank == 1:
        time.sleep(60)
    with pytest.raises(TransportTimeout):
        comm.agree()


def test_mpi_exit_is_limited() -> None:
    start = time.monotonic()
    with pytest.raises(RanksFailed, match="Alarm clock"):
        run_ranks_under_mpi(stuck_at_exit, 2, timeout=40)
    assert time.monotonic() - start < 25


def stuck(world: World) -> None:
    if world.rank == 1:
        time.sleep(60)


def raises(world: World) -> Any:
    print("said by", world.rank)
    raise RuntimeError(f"broken on {world.rank}")


def test_harness_shows_and_kills() -> None:
    start = time.monotonic()
    with pytest.raises(RanksFailed, match=r"(?s)rank\(s\) \[1\] of 2.*did not finish.*in stuck"):
        run_ranks(stuck, 2, timeout=12)
    assert time.monotonic() - start < 60
    with pytest.raises(RanksFailed, match=r"(?s)said by 0.*broken on 0.*said by 1.*broken on 1"):
        run_ranks(raises, 2, join=False)
