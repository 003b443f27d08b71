"""The transport of one rank, and what choosing a transport may look at before anything is imported."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from grace_ds.comm.choose import UNKNOWN, choose, launcher_world
from grace_ds.comm.local import LocalComm
from grace_ds.errors import TransportError
from tests.multirank.conformance import check_all


def test_conforms() -> None:
    check_all(LocalComm())


def test_result_is_a_copy() -> None:
    comm, x = LocalComm(), np.zeros(3)
    results = [comm.exchange([x])[0], comm.allgather(x)[0], comm.broadcast(x), comm.allreduce(x), comm.shift(x)]
    for got in [*results, comm.allreduce(np.zeros(3, np.int64))]:
        got += 1
    assert not x.any()


def test_abort_and_close() -> None:
    comm = LocalComm(timeout=3)
    comm.abort()
    comm.agree()
    comm.close()
    comm.close()
    with pytest.raises(TransportError, match=r"retired after: close\(\)"):
        comm.agree()
    with pytest.raises(ValueError, match="above 0 seconds, not 0"):
        LocalComm(timeout=0)


@pytest.mark.parametrize(
    ("env", "world"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "4"}, None),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "3"}, (3, 4)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, (1, 2)),
        ({"PMIX_RANK": "5", "SLURM_STEP_NUM_TASKS": "8"}, (5, 8)),
        ({"PMIX_RANK": "5"}, (5, UNKNOWN)),
        ({"OMPI_COMM_WORLD_RANK": "", "OMPI_COMM_WORLD_SIZE": "4"}, None),
    ],
)
def test_launcher_world(env: dict[str, str], world: tuple[int, int] | None) -> None:
    assert launcher_world(env) == world


def test_without_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"):
        monkeypatch.delenv(key, raising=False)
    for kind in ("auto", "local"):
        assert choose(kind, timeout=1.0).name == "local"
    for kind in ("mpi", "torch"):
        with pytest.raises(TransportError, match="init_distributed"):
            choose(kind, timeout=1.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TransportError, match=r"2 process\(es\) needs torch.distributed"):
        choose("auto", timeout=1.0)


def test_import_is_light() -> None:
    code = (
        "import sys, grace_ds.comm, grace_ds.comm.choose, grace_ds.comm.mpi, grace_ds.comm.torch_dist, grace_ds.refresh.table\n"
        "import grace_ds.refresh.gather\n"
        "sys.exit(' '.join(m for m in ('mpi4py', 'torch', 'deepspeed', 'faiss', 'safetensors') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
