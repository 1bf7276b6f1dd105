#!/usr/bin/env bash
# Makes .venv in the project's folder and installs ShardGAN and its dependencies, in the versions of
# launch/constraints.txt. Quick if done before. Usage: bash launch/setup.sh [extras; default: fast,page]
# Uses an active environment, virtual or conda's (but not its base), instead. PYTHON: the interpreter of a new one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${1:-fast,page}

fail() {
    echo "error: $*" >&2
    exit 2
}
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

source launch/venv.sh
if [ ! -x "$venv/bin/python" ]; then
    [ "$venv" != "${CONDA_PREFIX:-}" ] || fail "the conda environment $venv has no Python: conda install python=3.12"
    python=${PYTHON:-python3}
    is_new_enough "$python" || fail "ShardGAN needs Python 3.11 or newer; set PYTHON to one ($python is not)."
    echo "Making a virtual environment in $venv"
    "$python" -m venv "$venv"
fi
is_new_enough "$venv/bin/python" ||
    fail "ShardGAN needs Python 3.11 or newer, but the active environment $venv is older. Deactivate it, or make another."

stamp=$(cat pyproject.toml launch/constraints.txt | cksum)
if [ "$(cat "$venv/.shardgan-$extras" 2>/dev/null)" = "$stamp $PWD" ]; then
    exit 0
fi
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >/dev/null 2>&1 ||
    fail "$venv has no pip, and ensurepip cannot install it. Install it: uv pip install --python $venv/bin/python pip"
pip() {
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile -c launch/constraints.txt "$@"
}
echo "Installing torch (the largest part) …"
pip torch
echo "Installing the rest …"
# DeepSpeed is built from source with the installed torch, hence not in isolation.
pip setuptools wheel packaging ninja numpy psutil py-cpuinfo pydantic
DS_BUILD_OPS=0 pip --no-build-isolation -e ".[$extras]"
# On all cores, unlike pip. Some packages hold files for other versions of Python.
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$venv/bin/python" -m compileall -qq -j 0 "$packages" || true
echo "$stamp $PWD" > "$venv/.shardgan-$extras"
