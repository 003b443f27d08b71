"""Check that the ranks that a launcher has started form one world."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from grace_ds.errors import ConfigError

# Launcher, variable with the number of tasks that it has started together, and how these become one world.
_STARTED = (
    (
        "srun",
        "SLURM_STEP_NUM_TASKS",
        "start it by launch/slurm/train.sbatch, or export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS "
        "LOCAL_RANK=$SLURM_LOCALID MASTER_ADDR and MASTER_PORT in each task, or use srun --mpi=pmix with mpi4py",
    ),
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "install mpi4py (pip install grace_ds[mpi]) and unset RANK, WORLD_SIZE and MASTER_PORT"),
    ("the launcher", "WORLD_SIZE", "call deepspeed.init_distributed() (or torch's init_process_group) before the engine is made"),
)


def check_world_size(world: int, environ: Mapping[str, str]) -> None:
    """Raise an error if a launcher has started more tasks than torch's world has ranks.

    Without this check each of these tasks would silently train alone, on all of the data.

    Args:
        world: ranks of torch's world; 1 if it is not initialised.
        environ: of this process.

    Raises:
        ConfigError: there are more tasks than ranks; on every task, with the cure.
    """
    for launcher, key, cure in _STARTED:
        tasks = environ.get(key, "")
        if tasks.isdigit() and int(tasks) > world:
            raise ConfigError(
                f"{launcher} has started {tasks} tasks ({key}), torch.distributed has {world} rank(s): they would train apart, "
                f"each on all of the data; {cure}. Where they are meant to be jobs of their own, unset {key}"
            )


def check_accelerate(world: int) -> None:
    """Raise an error if accelerate, where the job uses it, takes another number of processes for its world.

    Args:
        world: ranks of torch's world; 1 if it is not initialised.

    Raises:
        ConfigError: accelerate's loaders, gathers and steps would be those of another number of ranks.
    """
    state = getattr(sys.modules.get("accelerate.state"), "PartialState", None)
    seen = state._shared_state.get("num_processes") if state is not None else None
    if isinstance(seen, int) and seen != world:
        raise ConfigError(
            f"accelerate runs with {seen} process(es), torch.distributed with {world} rank(s): its loaders and gathers would be "
            "those of another world; start the job by accelerate launch --use_deepspeed, or make the Accelerator after "
            "deepspeed.init_distributed()"
        )
