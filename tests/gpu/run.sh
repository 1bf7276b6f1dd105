#!/usr/bin/env bash
# All that a machine with GPUs has to run, in at most nine minutes: bash tests/gpu/run.sh [OUT] [PART …]
# It writes OUT/gpu.json and OUT/gpu.md (OUT: gpu-results). Interrupted, or out of time, the same command does what is
# missing. It needs Python 3.11, torch 2.11 and ShardGAN's other dependencies, but not ShardGAN installed. On a
# machine without GPUs it says what it cannot do, and does the rest. PYTHON: the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH="$PWD:$PWD/tests/gpu:$PWD/tests/benchmarks${PYTHONPATH:+:$PYTHONPATH}" WANDB_MODE=offline
python=${PYTHON:-python3}
"$python" -c "import torch" 2> /dev/null || {
    echo "error: $python has no torch: activate an environment that has it (launch/setup.sh makes one), or set PYTHON." >&2
    exit 2
}
exec "$python" -u tests/gpu/suite.py "$@"
