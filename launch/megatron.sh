#!/usr/bin/env bash
# A GPT by megatron-core on samples that GRACE chooses: launch/megatron.sh CONFIG.yaml [key=value ...]
#   configs/megatron_cpu.yaml: toy size on 2 CPU processes; configs/megatron_gpu.yaml: 8 GPUs.
# A second call goes on from the last checkpoint in the config's `out`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
grace_help "$@"
(($# >= 1)) && [[ -f "$1" ]] || die "usage: launch/megatron.sh CONFIG.yaml [key=value ...]"
grace_setup megatron,cpu
# A mistyped key must not become one that nobody reads.
processes="$("$PYTHON" -c '
import sys
from omegaconf import OmegaConf as O
try:
    config = O.load(sys.argv[1])
    O.set_struct(config, True)
    O.set_struct(config.grace, False)  # whose keys grace_ds checks itself
    print(O.merge(config, O.from_dotlist(sys.argv[2:])).processes)
except Exception as error:
    raise SystemExit(str(error).splitlines()[0])
' "$@")" || die "the config cannot be used: the line above says why"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$processes" "$ROOT/examples/megatron_core/pretrain_gpt.py" "$@"
