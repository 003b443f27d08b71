#!/usr/bin/env bash
# Whether grace_ds computes on this machine's GPU: an environment, the tests of tests/gpu, a timing; at most eight minutes.
# Other arguments go to the timing (--rows N, ...; see python -m benchmarks gpu_check --help).
#
#   OUT           folder of the results, gpu_check.json the summary  (default: runs/gpu_check)
#   GRACE_VENV    the environment, made once and reused              (default: build/gpu_check)
#   GRACE_PYTHON  the interpreter to make it with                    (default: one that has a CUDA torch, else any >= 3.10)
#
# Packages that GRACE_PYTHON has are used where they stand, torch above all. Without a package index the rest may come as wheels:
# PIP_NO_INDEX=1 PIP_FIND_LINKS=folder. What cannot be installed is told, and what works without it still runs.
# Exit status: 0 all passed, 1 something failed, 3 no GPU.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
grace_help "$@"

SETUP_SECONDS=245 TEST_SECONDS=110 TIMING_SECONDS=115 # hard limits
VENV="${GRACE_VENV:-$ROOT/build/gpu_check}"
OUT="${OUT:-$ROOT/runs/gpu_check}"

# The first interpreter whose torch is a CUDA build: torch alone is gigabytes.
python_with_torch() {
    local candidate
    for candidate in ${GRACE_PYTHON:+"$GRACE_PYTHON"} python3 python python3.13 python3.12 python3.11 python3.10; do
        if command -v "$candidate" >/dev/null && python_fits "$candidate" &&
            "$candidate" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    find_python
}

# Major version of CUDA to install for: torch's own, as one process must not load two; without it, the newest that the driver has.
cuda_major() {
    "$VENV/bin/python" -c 'import torch; print(torch.version.cuda.split(".")[0])' 2>/dev/null ||
        nvidia-smi | sed -n 's/.*CUDA[A-Za-z ]*Version *: *\([0-9]*\).*/\1/p' | head -n 1
}

# The packages of $1, behind those of the environment. Not --system-site-packages: $1 may be of a virtual environment itself.
lend_packages() {
    local folder
    folder="$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    "$1" -c 'import os, site, sysconfig
places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
for place in dict.fromkeys(places):
    if os.path.isdir(place):
        print(f"import site; site.addsitedir({place!r})")' >"$folder/zz_lent_packages.pth"
}

# Everything if it can be had, else as much as can: prints nothing, says what it leaves out, fails if it left out anything.
set_up() {
    local major extra
    export PIP_RETRIES="${PIP_RETRIES:-1}" PIP_DEFAULT_TIMEOUT="${PIP_DEFAULT_TIMEOUT:-20}"
    GRACE_PYTHON="$(python_with_torch)"
    if ! venv_works; then
        make_venv
        lend_packages "$GRACE_PYTHON"
    fi
    (install_torch) || return 1 # die ends a subshell only
    major="$(cuda_major)"
    extra="gpu-cu12"
    [[ "$major" =~ ^[0-9]+$ ]] && ((major >= 13)) && extra="gpu-cu13"
    say "CUDA ${major:-unknown}: $extra"
    if (GRACE_VENV="$VENV" grace_setup "cpu,$extra") && pip_install pytest pytest-timeout rich; then
        return 0
    fi
    say "not everything can be installed; trying without $extra"
    (GRACE_VENV="$VENV" grace_setup cpu) ||
        for package in array-api-compat omegaconf hjson faiss-cpu; do
            pip_install "$package" || say "no $package"
        done
    for package in pytest pytest-timeout rich; do
        pip_install "$package" || say "no $package"
    done
    return 1
}

if [[ "${1:-}" == --set-up ]]; then # this script calls itself, so that a limit can be set to it
    set_up
    exit
fi

has_gpu || { say "no NVIDIA GPU here (nvidia-smi lists none): there is nothing to check"; exit 3; }

mkdir -p "$OUT"
rm -f "$OUT"/{gpu_check,timing}.json "$OUT"/{setup,tests,timing}.log "$OUT/tests.xml"
declare -A status seconds
# stage NAME SECONDS COMMAND...: its output to a file, the end of it here if it fails.
stage() {
    local name="$1" limit="$2" began="$SECONDS"
    shift 2
    say "$name (at most $limit s)"
    status[$name]=0
    timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1 || status[$name]=$?
    seconds[$name]=$((SECONDS - began))
    if ((status[$name])); then
        say "$name: exit status ${status[$name]} after ${seconds[$name]} s; the end of $OUT/$name.log:"
        tail -n 15 "$OUT/$name.log" >&2
    fi
}

cd "$ROOT"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" # should installing it have failed, it is found all the same
stage setup "$SETUP_SECONDS" bash "$ROOT/launch/gpu_check.sh" --set-up
if [[ -x "$VENV/bin/python" ]]; then
    stage tests "$TEST_SECONDS" "$VENV/bin/python" -m pytest tests/gpu -v -p no:cacheprovider --junitxml "$OUT/tests.xml"
    stage timing "$TIMING_SECONDS" "$VENV/bin/python" -m benchmarks gpu_check --json "$OUT/timing.json" "$@"
fi

gpu="$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | head -n 1 || true)"
PYTHON="$VENV/bin/python"
python_fits "$PYTHON" || PYTHON="$(find_python)"
"$PYTHON" - "$OUT" "$gpu" "setup:${status[setup]}:${seconds[setup]}" "tests:${status[tests]:--1}:${seconds[tests]:-0}" \
    "timing:${status[timing]:--1}:${seconds[timing]:-0}" <<'END'
"""Joins what the stages left to one JSON file; exit status 1 where anything failed."""
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

out, gpu, stages = Path(sys.argv[1]), sys.argv[2], [word.split(":") for word in sys.argv[3:]]
meaning = {-1: "not started: there is no environment", 124: "ran past its limit", 137: "ran past its limit, or was killed"}
failed = [f"{name}: {meaning.get(int(code), f'exit status {code}')}" for name, code, _ in stages if int(code)]

tests = {"passed": 0, "failed": 0, "skipped": 0}
try:
    cases = list(ET.parse(out / "tests.xml").getroot().iter("testcase"))
except (OSError, ET.ParseError):
    cases = []
for case in cases:
    kind = next((k for k in ("failure", "error", "skipped") if case.find(k) is not None), None)
    tests[{None: "passed", "skipped": "skipped"}.get(kind, "failed")] += 1
    if kind:
        failed.append(f"test {case.get('name')}: {kind}: {' '.join((case.find(kind).get('message') or '').split())[:300]}")
if not tests["passed"]:
    failed.append("no test passed")

try:
    timing = json.loads((out / "timing.json").read_text())
except (OSError, ValueError):
    timing = None
for row in (timing or {}).get("rows", {}).get("stages", []):
    if row["failed"]:
        failed.append(f"timing, {row['stage']}: {row['failed']}")
for claim in (timing or {}).get("claims", []):
    if claim["met"] is False:
        failed.append(f"timing: {claim['name']} is {claim['value']}, asked for {claim['goal']}")

told = {
    "ok": not failed,
    "failed": failed,
    "gpu": gpu,
    "seconds": {name: int(seconds) for name, _, seconds in stages},
    "tests": tests,
    "timing": timing,
}
(out / "gpu_check.json").write_text(json.dumps(told, indent=1) + "\n")
print(f"gpu_check: {gpu}: " + ("all passed" if not failed else f"{len(failed)} failed"))
for line in failed:
    print(f"  {line}")
for claim in (timing or {}).get("claims", []):
    print(f"  {claim['name']}: {claim['value']:.4g} {claim['unit']}")
print(f"written: {out / 'gpu_check.json'}")
sys.exit(bool(failed))
END
