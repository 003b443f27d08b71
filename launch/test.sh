#!/usr/bin/env bash
# What must hold, from a clean clone: style, types, layers, the documentation, tests.
#
#   bash launch/test.sh           every test of one process that is not slow, and a slice of each kind with several (10 minutes on 2 cores)
#   bash launch/test.sh --all     every test that this machine can run, with the coverage of those of one process; what CI runs
#   bash launch/test.sh ARGS      the checks, then pytest ARGS
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
grace_help "$@"
# GRACE_TEST_GPU_WHEELS=1 checks the GPU code against the real RAPIDS, without a GPU; its wheels are about 4 GB.
grace_setup "test${GRACE_TEST_GPU_WHEELS:+,gpu-cu12}"
cd "$ROOT"
# Tests skip with a reason where a tool is missing and cannot be had: a browser, a real Slurm, two hosts (tests/cluster).
missing=()
for pair in "chromium chromium" "slurmctld slurm-wlm libpmix2 munge" "pdsh pdsh" "sshd openssh-server" "ssh openssh-client" "ip iproute2"; do
    PATH="$PATH:/usr/sbin:/sbin" command -v "${pair%% *}" >/dev/null || read -ra packages <<<"${pair#* }"
    missing+=(${packages[@]+"${packages[@]}"})
    packages=()
done
if ((${#missing[@]})) && [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null; then
    say "installing ${missing[*]} for the tests"
    { DEBIAN_FRONTEND=noninteractive apt-get update -qq &&
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >/dev/null 2>&1 ||
        say "they cannot be installed: the tests that need them will be skipped"
fi
# Several processes share the cores; see tests/conftest.py for the rest of the tests' environment.
export OMP_NUM_THREADS=1
say ruff
"$PYTHON" -m ruff check .
say mypy
"$PYTHON" -m mypy --strict -p grace_ds -p grace_ds_quickstart -p benchmarks
say import-linter
"$VENV/bin/lint-imports"
say documentation
"$PYTHON" -m sphinx -W --keep-going -q -E docs build/docs
one_process=(-n auto --maxprocesses 4 --dist loadfile tests/unit tests/docs tests/contract tests/gpu)
# One file at a time: beside another, jobs of four ranks run out of their time limits on 2 cores.
several_processes=(tests/multirank tests/cluster)
# One file of each kind: transports over gloo and MPI, the graph's ring, jobs under the deepspeed launcher, two hosts.
slice=(tests/multirank/test_comm.py tests/multirank/test_ring.py tests/multirank/test_plugins.py tests/multirank/test_liveness.py tests/cluster/test_two_hosts.py)
export GRACE_TEST_SKIPPED="$(mktemp)"
trap 'rm -f "$GRACE_TEST_SKIPPED"' EXIT
failed=0
if (($#)) && [[ "$1" != --all ]]; then
    say "pytest $*"
    exec "$PYTHON" -m pytest "$@"
elif (($#)); then
    say "pytest: one process"
    "$PYTHON" -m pytest --cov=grace_ds --cov-report=term:skip-covered "${one_process[@]}" || failed=1
    say "pytest: several processes"
    "$PYTHON" -m pytest "${several_processes[@]}" || failed=1
else
    say "pytest: one process, without the slow ones"
    "$PYTHON" -m pytest -m "not slow" "${one_process[@]}" || failed=1
    say "pytest: a slice of what takes several"
    "$PYTHON" -m pytest "${slice[@]}" || failed=1
fi
say "skipped (how many, where, why)"
if [[ -s "$GRACE_TEST_SKIPPED" ]]; then sort "$GRACE_TEST_SKIPPED" | uniq -c; else echo nothing; fi
exit "$failed"
