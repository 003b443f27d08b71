#!/usr/bin/env bash
# The main job, from nothing: makes .venv, installs, trains a small GPT with and without GRACE, compares.
# Arguments go to `python -m grace_ds.quickstart`: --pool crawl|natural, --steps N, --seed S, --out DIR, ...
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
grace_setup quickstart,mpi,cpu
case " $* " in
    *" --out"*) exec "$PYTHON" -m grace_ds.quickstart "$@" ;;
    *) exec "$PYTHON" -m grace_ds.quickstart --out "$ROOT/runs/quickstart" "$@" ;;
esac
