#!/usr/bin/env bash
# An unchanged DeepSpeed script with GRACE, under mpirun; rows and schedules travel by MPI.
#   launch/mpirun.sh RANKS [mpirun options] -- train.py [its arguments]
#   e.g. launch/mpirun.sh 2 -- train.py --deepspeed_config configs/ds_zero2.json
#        launch/mpirun.sh 16 --hostfile hostfile -- train.py ...
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
grace_help "$@"
usage="usage: launch/mpirun.sh RANKS [mpirun options] -- train.py [its arguments]"
[[ "${1:-}" =~ ^[1-9][0-9]*$ ]] || die "$usage"
options=(-n "$1" --oversubscribe)
shift
while (($#)) && [[ "$1" != -- ]]; do
    options+=("$1")
    shift
done
(($# >= 2)) || die "$usage"
shift
grace_setup mpi,cpu
[[ "$(id -u)" != 0 ]] || options+=(--allow-run-as-root)
# DeepSpeed asks MPI for rank and world size only where torch's variables are missing: a stale one from another
# launcher would give every rank the same rank.
unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT
exec "$VENV/bin/mpirun" "${options[@]}" "$PYTHON" -m grace_ds.run "$@"
