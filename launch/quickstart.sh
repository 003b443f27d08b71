#!/usr/bin/env bash
# The main job, from nothing: makes .venv, installs, trains a small GPT with and without GRACE, compares.
# Arguments go to `python -m grace_ds.quickstart`, whose --help tells of all:
#   --pool crawl|natural   half near-duplicates and junk, put there on purpose; or the text as it is   (default: crawl)
#   --steps N              optimizer steps of each of the two runs                                      (default: 400)
#   --seed S               of the weights and the order of the samples                                  (default: 0)
#   --ranks N              processes that train together                                                (default: 2)
#   --out DIR              folder for all that it writes                              (default: runs/quickstart here)
#   --debug                full tracebacks
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
grace_help "$@"
grace_setup quickstart,mpi,cpu
case " $* " in
    *" --out"*) exec "$PYTHON" -m grace_ds.quickstart "$@" ;;
    *) exec "$PYTHON" -m grace_ds.quickstart --out "$ROOT/runs/quickstart" "$@" ;;
esac
