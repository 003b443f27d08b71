#!/usr/bin/env bash
# The documentation as pages to read in a browser, without a network: build/docs/index.html. Warnings are errors.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
grace_help "$@"
grace_setup docs
exec "$PYTHON" -m sphinx -W --keep-going -q -b html "$@" "$ROOT/docs" "$ROOT/build/docs"
