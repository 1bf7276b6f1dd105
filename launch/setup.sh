#!/usr/bin/env bash
# Makes .venv in the project's folder and installs ShardGAN with what it needs, in the versions of
# launch/constraints.txt. Quick when it has been done already. Usage: bash launch/setup.sh [extras, as fast,test]
# An active virtual environment is used instead of making one. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${1:-fast}

venv=${VIRTUAL_ENV:-$PWD/.venv}
if [ ! -x "$venv/bin/python" ]; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
        echo "error: ShardGAN needs Python 3.11 or newer; set PYTHON to one ($python is not)." >&2
        exit 2
    }
    echo "Making a virtual environment in $venv"
    "$python" -m venv "$venv"
fi

stamp=$(cat pyproject.toml launch/constraints.txt | cksum)
if [ "$(cat "$venv/.shardgan-$extras" 2>/dev/null)" = "$stamp $PWD" ]; then
    exit 0
fi
pip() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt "$@"; }
echo "Installing torch (the largest part) …"
pip torch
echo "Installing the rest …"
# DeepSpeed comes as source and looks at the installed torch, so it must not be built in isolation.
pip setuptools wheel packaging ninja numpy psutil py-cpuinfo pydantic
DS_BUILD_OPS=0 pip --no-build-isolation -e ".[$extras]"
echo "$stamp $PWD" > "$venv/.shardgan-$extras"
