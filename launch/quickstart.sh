#!/usr/bin/env bash
# The main job, from nothing: makes .venv, installs, trains a small GPT with and without GRACE over MPI, compares.
# Arguments go to `python -m grace_ds_quickstart`; its --help tells of the same ones:
#   data
#     --pool crawl|natural    40 % unique text, 20 % near-duplicates, 25 % machine-written code and 15 % junk, put there
#                             on purpose; or the text as it is                                       (default: crawl)
#     --pool-size N           training sequences of 65 tokens                                        (default: 20000)
#   training
#     --arms uniform,grace    what to train: both, or one                                            (default: both)
#     --steps N               optimizer steps of each arm                                            (default: 400)
#     --seed S                of the weights and the order of the samples                            (default: 0)
#     --order-seed S          of the order alone                                                     (default: --seed)
#   launch
#     --launcher auto|openmpi|deepspeed
#                             rows travel over MPI, or over torch.distributed; auto: MPI if it is installed  (default: auto)
#     --ranks N               processes that train together                                          (default: 2)
#     --timeout S             seconds that one arm may take                                          (default: 900)
#   output
#     --out DIR               folder for all that it writes                       (default: runs/quickstart here)
#     --debug                 full tracebacks
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
grace_help "$@"
grace_setup quickstart,mpi,cpu
case " $* " in
    *" --out"*) exec "$PYTHON" -m grace_ds_quickstart "$@" ;;
    *) exec "$PYTHON" -m grace_ds_quickstart --out "$ROOT/runs/quickstart" "$@" ;;
esac
