"""Tasks that were started together and have not found one another."""

from __future__ import annotations

import pytest

from grace_ds.errors import ConfigError
from grace_ds.integrations.world import check_world_size


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"SLURM_STEP_NUM_TASKS": "8"}, ("srun has started 8 tasks", "has 2 rank(s)", "launch/slurm/train.sbatch")),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, ("mpirun has started 4 tasks", "mpi4py")),
        ({"WORLD_SIZE": "3"}, ("3 tasks (WORLD_SIZE)", "init_distributed")),
    ],
)
def test_more_tasks_than_ranks_are_refused_with_the_cure(environ: dict[str, str], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_world_size(2, environ)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_NTASKS": "8"},  # of the allocation: an interactive shell in it runs what it likes
        {"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "4"},  # a launcher on each of two nodes
        {"WORLD_SIZE": ""},
    ],
)
def test_every_way_that_makes_one_world_is_let_through(environ: dict[str, str]) -> None:
    check_world_size(4, environ)
