#!/usr/bin/env bash
# Everything that must hold, from a clean clone: style, types, layers, tests. Arguments, if any, go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
grace_setup test
cd "$ROOT"
# Several processes share the cores; see tests/conftest.py for the rest of the tests' environment.
export OMP_NUM_THREADS=1
say ruff
"$PYTHON" -m ruff check .
say mypy
"$PYTHON" -m mypy --strict -p grace_ds -p benchmarks
say import-linter
"$VENV/bin/lint-imports"
say pytest
"$PYTHON" -m pytest "$@"
