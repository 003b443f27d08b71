#!/usr/bin/env bash
# An unchanged DeepSpeed script with GRACE, by the deepspeed launcher; rows and schedules travel by torch.distributed.
#   launch/deepspeed.sh [launcher options] -- train.py [its arguments]
#   e.g. launch/deepspeed.sh --num_accelerators 2 -- train.py --deepspeed_config configs/ds_zero2.json
#        launch/deepspeed.sh --hostfile hostfile -- train.py ...
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
grace_help "$@"
options=()
while (($#)) && [[ "$1" != -- ]]; do
    options+=("$1")
    shift
done
(($# >= 2)) || die "usage: launch/deepspeed.sh [launcher options] -- train.py [its arguments]"
shift
grace_setup mpi,cpu
exec "$VENV/bin/deepspeed" ${options[@]+"${options[@]}"} --module grace_ds.run "$@"
