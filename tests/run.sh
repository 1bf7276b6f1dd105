#!/usr/bin/env bash
# Sets up and runs the tests. Usage: bash tests/run.sh [pytest arguments], as in `bash tests/run.sh -m long`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh fast,test
export SHARDGAN_CACHE=${SHARDGAN_CACHE:-$(mktemp -d)} WANDB_MODE=${WANDB_MODE:-offline}
source launch/venv.sh
python=$venv/bin/python
"$python" -m compileall -q pipeline launch tests  # which hundreds of processes import
[ $# -gt 0 ] || set -- -n 3 --dist loadscope --no-loadscope-reorder  # the whole suite, by three workers, as some wait
case " $* " in
    *" -m "*) exec "$python" -m pytest "$@" ;;
    *) exec "$python" -m pytest -m "not long" "$@" ;;
esac
