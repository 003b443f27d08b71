#!/usr/bin/env bash
# Everything that must hold, from a clean clone: style, types, layers, tests. Arguments, if any, go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
grace_help "$@"
# GRACE_TEST_GPU_WHEELS=1 checks the GPU code against the real RAPIDS, without a GPU; its wheels are about 4 GB.
grace_setup "test${GRACE_TEST_GPU_WHEELS:+,gpu-cu12}"
cd "$ROOT"
# The tests on a real Slurm and on two hosts (tests/cluster) skip with a reason where a tool is missing and cannot be had.
missing=()
for pair in "slurmctld slurm-wlm libpmix2 munge" "pdsh pdsh" "sshd openssh-server" "ssh openssh-client" "ip iproute2"; do
    PATH="$PATH:/usr/sbin:/sbin" command -v "${pair%% *}" >/dev/null || read -ra packages <<<"${pair#* }"
    missing+=(${packages[@]+"${packages[@]}"})
    packages=()
done
if ((${#missing[@]})) && [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null; then
    say "installing ${missing[*]} for tests/cluster"
    { DEBIAN_FRONTEND=noninteractive apt-get update -qq &&
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >/dev/null 2>&1 ||
        say "they cannot be installed: the tests that need them will be skipped"
fi
# Several processes share the cores; see tests/conftest.py for the rest of the tests' environment.
export OMP_NUM_THREADS=1
say ruff
"$PYTHON" -m ruff check .
say mypy
"$PYTHON" -m mypy --strict -p grace_ds -p benchmarks
say import-linter
"$VENV/bin/lint-imports"
say documentation
"$PYTHON" -m sphinx -W --keep-going -q -E docs build/docs
say pytest
"$PYTHON" -m pytest "$@"
